"""Data sets on the web, each pinned to one commit, and the command that stores one as a local file."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.models.hub import hub_is_used

logger = logging.getLogger(__name__)

# For a repository whose commit could not be confirmed: its newest state, held to the number of its rows.
UNPINNED = "main"


@contextmanager
def without_retries() -> Iterator[None]:
    """If the hub cannot be reached, its libraries work offline within the block, with what they have cached.

    Otherwise they would ask for half a minute, with a line for every attempt.
    """
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not hub_is_used():
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def unreachable(
    missing: str, places: str, error: Exception, command: str, file: str, folder: Path
) -> ValueError:
    """The error for data that are neither here nor on the hub, with the shell line that fetches `file`."""
    reason = f"{type(error).__name__}: {error}"
    return ValueError(
        f"{missing}. Looked at {places} ({reason}). On a machine with a network, run\n  {command}\n"
        f"and put {file} into {folder}"
    )


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hugging Face hub, or JSON files of a git repository, pinned to one commit."""

    path: str  # starts with https:// for a repository outside the hub
    revision: str
    splits: Mapping[str, str]  # our name of a split -> the set's
    name: str | None = None  # of one of the configurations of the set
    # A data file that is read directly, for a repository outside the hub or with a loading script, which
    # `datasets` refuses; "{split}" in it is replaced.
    file: str | None = None
    data_dir: str | None = None  # folder of the set's repository
    cut: float = 0.0  # of a set with one split: the share of rows that are our test split; train is the rest
    first: int | None = (
        None  # only so many rows from the start of a set that is too large to fetch as a whole
    )
    n_rows: Mapping[str, int] | None = None  # by our split, of a set that is not pinned: refused if changed

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
        """Whether a row of the set belongs to our split; by its hash, if the set is cut."""
        if not self.cut:
            return True
        digest = hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).digest()
        is_test = int.from_bytes(digest[:8]) < self.cut * 2**64
        return is_test == (split == "test")

    def load(self, split: str) -> list[dict[str, Any]]:
        """Our split's rows; raises what the network, the hub and the parsing libraries raise."""
        import datasets  # takes seconds, and most runs read local files

        with without_retries():
            streamed = {"streaming": True} if self.first else {}
            entries = datasets.load_dataset(**self.arguments(split), **streamed)
            found = [dict(row) for row in itertools.islice(entries, self.first)]
        rows = [row for row in found if self.holds(split, row)]
        if self.n_rows is not None and len(rows) != self.n_rows[split]:
            raise ValueError(f"the set has changed: {len(rows)} rows instead of {self.n_rows[split]}")
        return rows

    def fetch_command(self, task: str, split: str, path: str) -> str:
        """Shell line that stores one of our splits as a local file."""
        if self.cut or self.first:  # only `load` knows which rows belong to the split
            code = f"from tasks import get_task; get_task('{task}').fetch('{split}', '{path}')"
        else:
            call = ", ".join(f"{key}='{value}'" for key, value in self.arguments(split).items())
            code = f"import datasets; datasets.load_dataset({call}).to_json('{path}')"
        return f'python -c "{code}"'
