"""The folder of a run: whether it may be started, continued or replaced, by one process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from lota.config import Config
from lota.config_checks import differences
from lota.storage import TEMPORARY_SUFFIX, atomic_path, remove
from lota.train.checkpoint import CHECKPOINT_NAME, newest_checkpoint

logger = logging.getLogger(__name__)
REPLACED = ".replaced"  # what overwrite=true replaces, until the new run has a checkpoint


class RunFolder:
    """Context manager: the folder of a run, locked, cleared of what the new run replaces.

    What is replaced lies in REPLACED until `keep` says that the new run has a checkpoint; a run that fails
    before that gets it back. Under debug the folder is `<run>/debug`, and nothing else is touched.
    Raises ValueError if another process works in this folder.
    """

    OWN = re.compile(rf"config\.yaml|versions\.json|(metrics|samples)\.jsonl|wandb|{CHECKPOINT_NAME.pattern}")

    def __init__(self, config: Config, replaces: bool = False):
        self.config, self.replaces = config, replaces
        self.path = config.run_dir / "debug" if config.debug else config.run_dir

    def items(self) -> list[Path]:
        """What a run wrote into its folder, and nothing else that lies there."""
        found = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [item for item in found if self.OWN.fullmatch(item.name)]

    def results(self) -> list[str]:
        """Names of the items that only training can make again."""
        return [item.name for item in self.items() if CHECKPOINT_NAME.fullmatch(item.name)]

    def begun(self) -> bool:
        """Whether the run has a checkpoint."""
        return bool(self.results())

    def changes(self, old: dict[str, Any]) -> list[str]:
        """Settings that differ from those of the run that lies here, and that can change its weights."""
        return differences(old, self.config)

    def may_continue(self) -> bool:
        """Whether the folder holds a run with these settings; False if a new one starts.

        Raises ValueError if the run that it holds may be neither continued nor replaced.
        """
        self.recover()
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
        changed = self.changes(yaml.safe_load(settings.read_text(encoding="utf-8")))
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

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._handle = _lock(self.path)
        for item in self.path.glob(f".*{TEMPORARY_SUFFIX}"):
            remove(item)
        if self.replaces:
            aside = self.path / REPLACED
            remove(aside)
            for item in self.items():
                aside.mkdir(exist_ok=True)
                os.replace(item, aside / item.name)
        with atomic_path(self.path / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(asdict(self.config), sort_keys=False), encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.keep()
        else:
            self.recover()
        os.close(self._handle)

    def keep(self) -> None:
        """The new run has a checkpoint: what it replaced can go."""
        remove(self.path / REPLACED)

    def recover(self) -> None:
        """Undo a replacement that never got to a checkpoint; finish one that did."""
        aside = self.path / REPLACED
        if aside.is_dir() and not self.begun():
            for item in self.items():
                remove(item)
            for item in aside.iterdir():
                os.replace(item, self.path / item.name)
        self.keep()


def _lock(path: Path) -> int:
    """Returns a file handle that holds the folder for this process; the lock goes with it, however it ends.

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


@dataclass
class Resumable:
    """The checkpoint that a run continues from."""

    folder: Path
    content: dict[str, Any]  # of resume.pt

    @property
    def finished(self) -> bool:
        return self.content["progress"]["finished"]


def find_resumable(config: Config) -> Resumable | None:
    """The checkpoint to continue from; None: a new run starts. Raises ValueError if neither may be."""
    folder = RunFolder(config)
    if config.debug or not folder.may_continue():
        return None
    newest = newest_checkpoint(folder.path)
    if newest is None:
        folder.refuse_orphans("none of its checkpoints has a readable resume.pt")
        logger.info("%s: no checkpoint yet, starting from the beginning", folder.path)
        return None
    return Resumable(*newest)
