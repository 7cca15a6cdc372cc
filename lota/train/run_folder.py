"""The folder of a run: whether it may be started, continued or replaced, by one process at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml

from lota.config import Config
from lota.config_checks import differences
from lota.distributed.processes import Processes
from lota.places import fsync, remove, temporary_name, working_in
from lota.settings import stored_settings
from lota.storage import atomic_path, set_aside
from lota.train.checkpoint import CHECKPOINT_NAME, RESUME, newest_checkpoint

logger = logging.getLogger(__name__)
REPLACED = ".replaced"  # what overwrite=true replaces, until the new run has a checkpoint
MOVING = ".moving"  # the same on its way there or back: whatever lies in it belongs back


@dataclass
class Resumable:
    """The checkpoint that a run continues from."""

    folder: Path
    content: dict[str, Any]  # of resume.pt

    @classmethod
    def read(cls, folder: Path) -> Resumable:
        """Of a checkpoint that another process has found whole."""
        return cls(folder, torch.load(folder / RESUME, map_location="cpu", weights_only=True, mmap=True))

    @property
    def finished(self) -> bool:
        return self.content["progress"]["finished"]


class RunFolder:
    """Context manager: the folder of a run, held, cleared of what the new run replaces.

    What is replaced lies in REPLACED until `keep` says that the new run has a checkpoint; a run that fails
    before that gets it back. Under debug the folder is `<run>/debug`, and nothing else is touched.
    `look` tells beforehand what a run finds here. Raises ValueError if another process works in this folder,
    or has changed it since.
    """

    OWN = re.compile(rf"config\.yaml|versions\.json|(metrics|samples)\.jsonl|wandb|{CHECKPOINT_NAME.pattern}")

    def __init__(self, config: Config):
        self.config = config
        self.path = config.run_dir / "debug" if config.debug else config.run_dir
        self.continues = False  # the run that lies here; else a new one starts
        self._seen: list[tuple[str, int, int]] = []  # what lay here when it was looked at
        self._held: ExitStack  # the folder, while a run is in it

    def items(self) -> list[Path]:
        """What a run wrote into its folder, and nothing else that lies there."""
        found = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [item for item in found if self.OWN.fullmatch(item.name)]

    def results(self) -> list[str]:
        """Names of the items that only training can make again."""
        return [item.name for item in self.items() if CHECKPOINT_NAME.fullmatch(item.name)]

    def begun(self) -> bool:
        """Whether the run has a checkpoint: an evaluation of an older one may have made its folder again."""
        return any((self.path / name / RESUME).is_file() for name in self.results())

    def changes(self, old: dict[str, Any]) -> list[str]:
        """Settings that differ from those of the run that lies here, and that can change its weights."""
        return differences(old, self.config)

    # What lies here

    def look(self) -> Resumable | None:
        """What a run with these settings continues from; None: a new one starts.

        Raises ValueError if the run that lies here may be neither continued nor replaced, or if another
        process works on it.
        """
        if not self.path.is_dir():
            return None
        with self._settled():
            found = self._look()
            self._seen = self._snapshot()
            return found

    def _snapshot(self) -> list[tuple[str, int, int]]:
        """Name, inode and time of change of what lies here; a folder's own time changes with every lock."""
        found = [(item, item.stat()) for item in self.items()]
        return [(item.name, s.st_ino, 0 if item.is_dir() else s.st_mtime_ns) for item, s in found]

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """The folder, held, with whatever a killed process was about to move finished or undone."""
        try:
            with working_in(self.path):
                self.settle()
                yield
        except NotADirectoryError as error:
            raise ValueError(f"{self.path} cannot be the folder of a run: {error}") from error

    def _look(self) -> Resumable | None:
        if self.config.debug or not self.may_continue():
            return None
        newest = newest_checkpoint(self.path)
        if newest is None:
            self.refuse_orphans("none of its checkpoints is whole")
            logger.info("%s: no checkpoint yet, starting from the beginning", self.path)
            return None
        self.continues = True
        return Resumable(*newest)

    def may_continue(self) -> bool:
        """Whether the folder holds a run with these settings; False if a new one starts. The folder is held.

        Raises ValueError if the run that it holds may be neither continued nor replaced.
        """
        if self.config.overwrite:
            return False
        settings = self.path / "config.yaml"
        if not settings.is_file():
            self.refuse_orphans("config.yaml is missing")
            return False
        if self.config.resume == "never":
            raise ValueError(
                f"resume=never, but {self.path} holds a run: use another exp_name, or overwrite=true"
            )
        try:
            old = stored_settings(settings, self.config)
        except ValueError as error:
            raise ValueError(
                f"{error}; put the file back, use another exp_name, or overwrite=true to start anew"
            ) from error
        changed = self.changes(old)
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}): use another exp_name, "
                "overwrite=true to start anew, or the old settings to continue it"
            )
        return True

    def refuse_orphans(self, why: str) -> None:
        """Raise ValueError if there are results, which `why` cannot be continued."""
        if self.results():
            raise ValueError(
                f"{self.path} holds {', '.join(self.results())}, which cannot be continued ({why}): use "
                "another exp_name, or overwrite=true to replace them"
            )

    # A run in it

    def __enter__(self) -> RunFolder:
        with ExitStack() as stack:
            stack.enter_context(self._settled())
            if self._snapshot() != self._seen:
                raise ValueError(
                    f"{self.path} has changed while this run was being prepared: start the same command again"
                )
            if not self.continues:
                self._put_aside()
            with atomic_path(self.path / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(asdict(self.config), sort_keys=False), encoding="utf-8")
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if error is None:
                self.keep()
                return
            self.settle()
            if not self.begun() and not (self.path / "metrics.jsonl").exists():
                for item in self.items():  # the run failed before its first step
                    remove(item)

    def keep(self) -> None:
        """The new run has a checkpoint: what it replaced can go."""
        aside = self.path / REPLACED
        if aside.is_dir():
            gone = temporary_name(self.path / "replaced")  # half of it is no run to put back
            os.replace(aside, gone)
            fsync(self.path)
            with contextlib.suppress(OSError):  # a network file system keeps what is open
                remove(gone)

    def settle(self) -> None:
        """Undo a replacement that never got to a checkpoint; finish one that did."""
        self._put_back()
        aside = self.path / REPLACED
        if not aside.is_dir():
            return
        if self.begun():
            self.keep()
            return
        for item in self.items():
            remove(item)
        fsync(self.path)
        os.replace(aside, self.path / MOVING)
        fsync(self.path)
        self._put_back()

    def _put_aside(self) -> None:
        items = self.items()
        if not items:
            return
        moving = self.path / MOVING
        moving.mkdir()
        fsync(self.path)
        for item in items:
            os.replace(item, moving / item.name)
        fsync(moving)
        fsync(self.path)
        os.replace(moving, self.path / REPLACED)  # from here on a new run begins
        fsync(self.path)

    def _put_back(self) -> None:
        moving = self.path / MOVING
        if moving.is_dir():
            for item in sorted(moving.iterdir()):
                if (self.path / item.name).exists():  # made by an evaluation that was still running
                    set_aside(self.path / item.name)
                os.replace(item, self.path / item.name)
            fsync(self.path)
            moving.rmdir()
            fsync(self.path)


class FollowedFolder:
    """The folder of a run as seen by a process that writes nothing: the first one holds and changes it."""

    def __init__(self, config: Config):
        self.path = config.run_dir

    def __enter__(self) -> FollowedFolder:
        return self

    def __exit__(self, *_: object) -> None: ...
    def keep(self) -> None: ...


def look_together(folder: RunFolder | FollowedFolder, together: Processes) -> Resumable | None:
    """What all processes of a run continue from: what the first one finds, by its `look`."""
    found, problem = None, ""
    if isinstance(folder, RunFolder):
        try:
            found = folder.look()
        except ValueError as error:
            problem = str(error)
    checkpoint, problem = together.broadcast((found.folder if found else None, problem))
    if problem:
        raise ValueError(problem)
    if checkpoint is None or found is not None:
        return found
    try:
        return Resumable.read(checkpoint)
    except FileNotFoundError as error:
        raise ValueError(
            f"process {together.rank} does not see {checkpoint}: all machines of a run must share local_dirs"
        ) from error
