"""Reference log-probabilities kept on disk, for runs on the same pairs and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.utils import atomic_path, content_key, read_keyed, save_tensors

FOLDER = "reference_logps"  # of the cache folder


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

        def stored(path: Path) -> tuple[Any, Tensor]:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["logps"].shape != (pairs, 2):
                raise ValueError(f"it does not hold two numbers for each of {pairs} pairs")
            return content["key"], content["logps"]

        found = read_keyed(self.path, self.key, stored)
        return torch.full((pairs, 2), math.nan) if found is None else found

    def write(self, logps: Tensor) -> None:
        with atomic_path(self.path) as temporary:
            save_tensors({"key": self.key, "logps": logps}, temporary)
