"""Reference log-probabilities kept on disk, for runs on the same pairs and weights."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.utils import atomic_path, content_key, save_tensors, set_aside

FOLDER = "reference_logps"  # of the cache folder
logger = logging.getLogger(__name__)


class LogpsFile:
    """Log-probabilities of pairs in a file that is read only under the key that it was written with.

    It lies in `folder` under a name made from the key. Values: (pairs, 2) fp32, chosen and rejected, nan
    where they have not been computed yet.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        self.key = dict(key)
        self.path = folder / f"{content_key(self.key)[:24]}.pt"

    def read(self, pairs: int) -> Tensor:
        """What is stored, which may be nothing. A file made under another key, or broken, is set aside."""
        nothing = torch.full((pairs, 2), math.nan)
        if not self.path.is_file():
            return nothing
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            return self._checked(content, pairs)
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            moved = set_aside(self.path)
            logger.warning("%s is not reused: %s. It is now %s", self.path, str(error)[:200], moved.name)
            return nothing

    def _checked(self, content: Any, pairs: int) -> Tensor:
        logps = content["logps"]
        differ = [name for name, value in self.key.items() if content["key"].get(name) != value]
        if differ:
            raise ValueError(f"made with another {', '.join(differ)}")
        if logps.shape != (pairs, 2):
            raise ValueError(f"it does not hold two numbers for each of {pairs} pairs")
        return logps

    def write(self, logps: Tensor) -> None:
        with atomic_path(self.path) as temporary:
            save_tensors({"key": self.key, "logps": logps}, temporary)
