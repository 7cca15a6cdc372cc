"""The folder of a run: whether it may be started, continued or replaced, by one process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from lota.config import Config
from lota.config_checks import differences
from lota.train.checkpoint import CHECKPOINT_NAME, newest_checkpoint
from lota.utils import TEMPORARY_SUFFIX, atomic_path, remove

logger = logging.getLogger(__name__)
REPLACED = ".replaced"  # a run that overwrite=true replaces, until the new one has a checkpoint
_ITEMS_OF_A_RUN = ("config.yaml", "versions.json", "metrics.jsonl", "samples.jsonl", "wandb")


@dataclass
class Resumable:
    """The checkpoint that a run continues from. content: what `resume.pt` holds."""

    folder: Path
    content: dict[str, Any]

    @property
    def finished(self) -> bool:
        return self.content["progress"]["finished"]


def find_resumable(config: Config) -> Resumable | None:
    """The checkpoint to continue from; None to start anew. Raises ValueError where neither is right."""
    run = config.run_dir
    if config.debug:
        return None
    _recover(run)
    if config.overwrite:
        return None
    settings = run / "config.yaml"
    if not settings.is_file():
        _refuse_orphans(run, "config.yaml is missing")
        return None
    if config.resume == "never":
        raise ValueError(f"resume=never, but {run} holds a run: use another exp_name, or overwrite=true")
    changed = differences(yaml.safe_load(settings.read_text(encoding="utf-8")), config)
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings ({'; '.join(changed)}): use another exp_name, "
            "overwrite=true to start anew, or the old settings to continue it"
        )
    newest = newest_checkpoint(run)
    if newest is None:
        _refuse_orphans(run, "none of its checkpoints has a readable resume.pt")
        logger.info("%s: no checkpoint yet, starting from the beginning", run)
        return None
    return Resumable(*newest)


def refuse_other(resumable: Resumable | None, what: str, seen: Mapping[str, str | None]) -> None:
    """Raise ValueError when the run was trained on another mask or other data than is there now."""
    if resumable is None:
        return
    changed = [key for key, value in seen.items() if resumable.content[key] != value]
    if changed:
        raise ValueError(
            f"run {what} was trained with another {' and other '.join(changed)} under the same name; "
            "use another exp_name, or overwrite=true to start anew"
        )


def _refuse_orphans(run: Path, why: str) -> None:
    found = sorted(path.name for path in _items(run) if CHECKPOINT_NAME.fullmatch(path.name))
    if found:
        raise ValueError(
            f"{run} holds {', '.join(found)}, which cannot be continued ({why}): use another exp_name, or "
            "overwrite=true to replace them"
        )


class OpenRun:
    """Context manager: the run's folder, locked, cleared of what the new run replaces.

    What overwrite=true replaces is kept aside until `keep` says that the new run has a checkpoint; a run that
    fails before that gets it back. Under debug the folder is `<run>/debug`, and nothing else is touched.
    Raises ValueError when another process trains in this folder.
    """

    def __init__(self, config: Config, resuming: bool):
        self.config, self.resuming = config, resuming
        self.path = config.run_dir / "debug" if config.debug else config.run_dir

    def __enter__(self) -> OpenRun:
        self.path.mkdir(parents=True, exist_ok=True)
        self._handle = lock_folder(self.path)
        for item in self.path.glob(f".*{TEMPORARY_SUFFIX}"):
            remove(item)
        if not self.resuming:
            aside = self.path / REPLACED
            remove(aside)
            move(_items(self.path), aside)
        write_settings(self.path, self.config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            _recover(self.path)
        elif self.config.debug:
            self.keep()
        os.close(self._handle)

    def keep(self) -> None:
        """The new run has a checkpoint: what it replaced can go."""
        remove(self.path / REPLACED)


def write_settings(folder: Path, config: Config) -> None:
    """config.yaml of a run."""
    with atomic_path(folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")


def lock_folder(path: Path) -> int:
    """A file handle that holds the folder for this process; the lock goes with it, however it ends.

    Raises ValueError while another process holds it.
    """
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 32).decode().strip()
        os.close(handle)
        raise ValueError(
            f"another process (pid {holder}) is training in {path}: wait, or use another exp_name"
        ) from error
    os.truncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle


def _items(run: Path) -> list[Path]:
    """What a run wrote into its folder, and nothing else that lies there."""
    found = sorted(run.iterdir()) if run.is_dir() else []
    return [p for p in found if p.name in _ITEMS_OF_A_RUN or CHECKPOINT_NAME.fullmatch(p.name)]


def move(items: list[Path], folder: Path) -> None:
    """Move the items into a new folder; no folder where there are none."""
    if items:
        folder.mkdir()
    for item in items:
        os.replace(item, folder / item.name)


def _recover(run: Path) -> None:
    begun = any(CHECKPOINT_NAME.fullmatch(path.name) for path in _items(run))
    recover(run, _items(run), begun)


def recover(run: Path, items: list[Path], begun: bool) -> None:
    """Undo a replacement that never got to a checkpoint; finish one that did.

    items: what the new run wrote into its folder; begun: whether a checkpoint is among it.
    """
    aside = run / REPLACED
    if not aside.is_dir():
        return
    if begun:
        remove(aside)
        return
    for item in items:
        remove(item)
    for item in aside.iterdir():
        os.replace(item, run / item.name)
    remove(aside)
