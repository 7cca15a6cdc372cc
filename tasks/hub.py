"""Data sets on the web, each pinned to one commit, and the command that stores one as a local file."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

# For a repository whose commit could not be confirmed: its newest state, held to the number of its rows.
UNPINNED = "main"
_SECONDS = 3.0  # to reach the hub in


@contextmanager
def without_retries() -> Iterator[None]:
    """Where the hub cannot be reached, let its libraries work offline meanwhile: with what they have cached.

    By themselves they ask for half a minute, with a line for every attempt. Behind a proxy they are left to
    it.
    """
    import datasets
    from huggingface_hub import constants

    if constants.is_offline_mode() or urllib.request.getproxies() or _reachable(constants.ENDPOINT):
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    logger.info(
        "%s cannot be reached; only data sets cached by an earlier run are at hand", constants.ENDPOINT
    )
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@functools.cache  # many tasks may ask, and a firewall may make each wait
def _reachable(url: str) -> bool:
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), _SECONDS).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hugging Face hub, or JSON files of a git repository, pinned to one commit.

    splits: our split name -> the set's, in which "{split}" of `file` is replaced. file: the data file that is
    read directly, for a repository that carries a loading script (`datasets` refuses those) or is none of the
    hub's (path then starts with https://). cut: where the set has one split only, the share of its rows that
    makes our test split; our train split is the rest. n_rows: by our split, of a set that is not pinned:
    another number means that the set is no longer what it was.
    """

    path: str
    revision: str
    splits: Mapping[str, str]
    name: str | None = None
    file: str | None = None
    data_dir: str | None = None
    cut: float = 0.0
    n_rows: Mapping[str, int] | None = None

    def arguments(self, split: str) -> dict[str, str]:
        """Keyword arguments of `datasets.load_dataset` for one of our splits."""
        if self.file is not None:
            file = self.file.format(split=self.splits[split])
            url = f"hf://datasets/{self.path}@{self.revision}/{file}"
            if self.path.startswith("https://"):
                url = f"{self.path}/{self.revision}/{file}"
            return {"path": "json", "data_files": url, "split": "train"}  # a lone file is always called train
        given = {"name": self.name, "data_dir": self.data_dir}
        named = {key: value for key, value in given.items() if value is not None}
        return {"path": self.path, **named, "split": self.splits[split], "revision": self.revision}

    def holds(self, split: str, row: Mapping[str, Any]) -> bool:
        """Whether a row of the set belongs to our split; by its hash, where the set is cut."""
        if not self.cut:
            return True
        digest = hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).digest()
        is_test = int.from_bytes(digest[:8]) < self.cut * 2**64
        return is_test == (split == "test")

    def load(self, split: str) -> list[dict[str, Any]]:
        """Our split's rows; raises what the network, the hub and the parsing libraries raise."""
        import datasets  # takes seconds, and most runs read local files

        with without_retries():
            found = [dict(row) for row in datasets.load_dataset(**self.arguments(split))]
        rows = [row for row in found if self.holds(split, row)]
        if self.n_rows is not None and len(rows) != self.n_rows[split]:
            raise ValueError(f"the set has changed: {len(rows)} rows instead of {self.n_rows[split]}")
        return rows

    def fetch_command(self, task: str, split: str, path: str) -> str:
        """Shell line that stores one of our splits as a local file."""
        if self.cut:  # which rows belong to the split is decided here, by no one else
            code = f"from tasks import get_task; get_task('{task}').fetch('{split}', '{path}')"
        else:
            call = ", ".join(f"{key}='{value}'" for key, value in self.arguments(split).items())
            code = f"import datasets; datasets.load_dataset({call}).to_json('{path}')"
        return f'python -c "{code}"'
