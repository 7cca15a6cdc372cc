"""What is no local file or folder: models, deltas and masks, from the hub's cache or from the hub itself.

A file of the hub is named `hub:org/name[@revision][/FILE]`, as in hf:// URIs: a revision is a branch, a tag
or a commit, with %2F for a slash in it. Where only deltas can be meant, `org/name[@revision]` will do. Files
of the hub are files of strangers, so only the one that is named is fetched, and its own bounded reader reads
it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from lota import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
PREFIX = "hub:"
DELTA_FILE, MASK_FILE = "delta.safetensors", "mask.pt"  # their names in a repository, unless others are given
_REFERENCE = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/pr/\d+|[^/@]+))?(?:/(.+))?")
_SECONDS = 3.0  # to reach the hub in; a firewall or a name server may let one wait for minutes
_TELLING = ("config.json", "tokenizer_config.json", "tokenizer.json")  # one of them is in every model


def refuse_absent(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for what neither exists here nor can be had from the hub, without asking it for long.

    A hub that cannot be reached is not asked again in this process: its libraries would retry for a minute.
    """
    if not str(path).strip():  # it would be the working directory
        raise ValueError("the model's name is empty: give a Hugging Face folder or a hub id")
    if Path(path).expanduser().exists():
        return
    if not _is_hub_id(str(path)):
        raise ValueError(f"{path} does not exist: give a Hugging Face folder, a hub id or a policy.pt")
    if not hub_is_used() and not _is_cached(str(path)):
        from huggingface_hub import constants

        raise ValueError(
            f"{path} does not exist: it is no folder or file here, there is no hub model of that name in "
            f"{constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached or is switched off "
            "(HF_HUB_OFFLINE); give a Hugging Face folder, or fetch the model on a machine with a network"
        )


# Files of repositories


class NoSuchFile(ValueError):
    """The repository is there, and has no file of that name."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository of the hub."""

    repo: str  # org/name
    revision: str | None  # branch, tag or commit; None: main
    file: str

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{at} (file {self.file})"

    @property
    def address(self) -> str:
        """The shortest name that `hub_file` reads."""
        at = "" if self.revision in (None, "main") else f"@{quote(self.revision or '', safe='')}"
        return f"{PREFIX}{self.repo}{at}" + ("" if self.file in (DELTA_FILE, MASK_FILE) else f"/{self.file}")


def is_hub_reference(path: str | os.PathLike[str]) -> bool:
    """Whether a path says that it is a file of the hub: `hub:...`."""
    return os.fspath(path).startswith(PREFIX)


def hub_file(path: str | os.PathLike[str], file: str) -> HubFile | None:
    """The file of the hub that a path names, `file` if it names a repository only; None: it names none.

    Without the prefix only `org/name[@revision]` is one. Raises ValueError for what follows a prefix and is
    none.
    """
    text = os.fspath(path)
    found = _REFERENCE.fullmatch(text.removeprefix(PREFIX))
    if found is not None and _is_hub_id(found[1]):
        given = found[3] if is_hub_reference(text) else None
        if found[3] is None or given is not None:
            revision = None if found[2] is None else unquote(found[2])
            named = HubFile(found[1], revision, given or file)
            if Path(named.file).suffix == Path(file).suffix and ".." not in named.file.split("/"):
                return named
    if is_hub_reference(text):
        suffix = Path(file).suffix
        raise ValueError(
            f"{text} names no file of the hub: give {PREFIX}org/name, {PREFIX}org/name@revision or "
            f"{PREFIX}org/name/FILE{suffix}"
        )
    return None


def local_copy(path: str | os.PathLike[str], file: str, bare: bool = False) -> Path:
    """The local file that a path means: of a file of the hub, the one in its cache, fetched if need be.

    file: as in `hub_file`. bare: `org/name` is one as well, if there is no such file or folder here. A path
    that names no file of the hub is returned as it is, be it there or not. Raises ValueError for a file of
    the hub that cannot be had, NoSuchFile if its repository has none of that name.
    """
    local = Path(path).expanduser()
    if not is_hub_reference(path) and (not bare or local.exists()):
        return local
    named = hub_file(path, file)
    return local if named is None else fetch(named)


def fetch(named: HubFile) -> Path:
    """A file of the hub in its cache, as new as the hub has it. Errors: as `local_copy`."""
    from huggingface_hub import constants  # slow to import

    if not hub_is_used():
        if folder := cached_snapshot(named):
            return folder / named.file
        raise ValueError(
            f"{named} is neither here nor in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be "
            "reached or is switched off (HF_HUB_OFFLINE): fetch it first where there is a network (python -m "
            "lota.delta pull, python -m lota.masks pull)"
        )
    with hub_errors(str(named), named.repo):
        return Path(hub_api().hf_hub_download(named.repo, named.file, revision=named.revision))


def cached_snapshot(named: HubFile) -> Path | None:
    """The folder of the hub's cache that holds this file; its name is the commit. None if it is not there."""
    from huggingface_hub import try_to_load_from_cache  # slow to import

    cached = try_to_load_from_cache(named.repo, named.file, revision=named.revision)
    return Path(cached).parents[named.file.count("/")] if isinstance(cached, str) else None


def hub_api() -> HfApi:
    """The hub's library: its endpoint, its cache, and the token of HF_TOKEN or `hf auth login`."""
    from huggingface_hub import HfApi  # slow to import

    return HfApi(library_name="lota", library_version=__version__)


@contextlib.contextmanager
def hub_errors(what: str, repo: str) -> Iterator[None]:
    """Raise ValueError, with the remedy, for what the hub's libraries raise in this block.

    what: that was wanted. repo: the repository that was asked.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library in use

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        where = f"{constants.ENDPOINT}/{repo}"
        raise ValueError(
            f"{what}: its owner grants access on request; ask for it at {where} and {log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{what}: {constants.ENDPOINT} shows you no repository {repo}; check the name or, if it is "
            f"private, {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{what}: the repository has no such branch, tag or commit") from error
    except errors.RemoteEntryNotFoundError as error:
        raise NoSuchFile(
            f"{what}: the repository has no such file; name one with {PREFIX}{repo}/FILE"
        ) from error
    except errors.HfHubHTTPError as error:
        status, reason = error.response.status_code, error.server_message or "no reason given"
        remedy = f"; {log_in} with a token that may do this" if status in (401, 403) else ""
        raise ValueError(f"{what}: {constants.ENDPOINT} answers {status} ({reason}){remedy}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # a connection that broke; RuntimeError: of an upload
        if isinstance(error, OSError) and error.errno is not None:  # of this machine, such as a full disk
            raise
        said = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(f"{what}: {constants.ENDPOINT} failed ({said}); try again later") from error


# Whether there is a hub


def hub_is_used() -> bool:
    """Whether the hub's libraries may ask it; if it cannot be reached, from now on they may not.

    Behind a proxy they always may: whether it leads to the hub, only they can tell.
    """
    from huggingface_hub import constants  # slow to import

    if constants.is_offline_mode():
        return False
    if urllib.request.getproxies() or _reachable(constants.ENDPOINT):
        return True
    constants.HF_HUB_OFFLINE = True
    logger.info("%s cannot be reached; only what is cached can be read", constants.ENDPOINT)
    return False


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith((".pt", ".safetensors", ".bin"))


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in _TELLING)


@functools.cache  # many may ask
def _reachable(url: str) -> bool:
    """Whether a connection can be made. In a thread: looking up the host's name has no time limit."""
    parts = urlsplit(url)
    address = parts.hostname, parts.port or (80 if parts.scheme == "http" else 443)
    reached = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, _SECONDS).close()
        except OSError:
            return
        reached.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return reached.is_set()
