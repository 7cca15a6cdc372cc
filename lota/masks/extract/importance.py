"""What entries matter to tasks: mean squares of gradients, in memory for masks, on disk for training runs.

The importance of an entry to a task is the sum of its squared gradients, one for each example, divided by the
mean of these sums over all entries that were collected: 1 is what an entry has on average. With one example
per batch it is the diagonal of the empirical Fisher information in that unit (EWC, Kirkpatrick et al., arXiv
1612.00796). The importances to several tasks are added up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lota.masks.extract.gradients import Collected
from lota.masks.mask import Mask
from lota.models.torch_files import map_tensors, read_torch_file
from lota.storage import DAMAGED, atomic_path, save_tensors

KIND, FORMAT = "importance", "lota-importance"


class Avoid(NamedTuple):
    """What a mask shall rather not keep: each saliency is divided by sqrt(1 + strength * importance)."""

    importance: Collected
    strength: float

    def check(self, shapes: Mapping[str, tuple[int, ...]], smallest: bool) -> None:
        """Raise ValueError for what cannot be avoided. shapes: of the scope."""
        if not self.strength >= 0 or self.strength == float("inf"):
            raise ValueError(f"avoid_strength={self.strength}: must be finite and at least 0")
        if smallest:
            raise ValueError("avoid with smallest=True would keep what matters: leave one of them out")
        if self.importance.kind != KIND:
            raise ValueError(
                f"avoid is of kind={self.importance.kind!r}: pass lota.importance_of([collected]), of "
                "gradients collected with kind='squares'"
            )
        self.importance.check(shapes, KIND)


def importance_of(tasks: Iterable[Collected]) -> Collected:
    """Returns the sum over tasks of their importances, fp32 on the CPU, as what `avoid` and `ewc` read.

    tasks: of each the squares of its gradients, asked for one after the other, so that only one need be in
    memory. Raises ValueError without tasks, for sums of another kind or other parameters, and for a task that
    has no gradient at all.
    """
    total: dict[str, Tensor] = {}
    metas = []
    for one in tasks:
        if one.kind != "squares":
            raise ValueError(f"importance is of squares, not of kind={one.kind!r}: collect kind='squares'")
        if total and total.keys() != one.values.keys():
            raise ValueError("importances of other parameters cannot be added up: collect the same names")
        entries = sum(value.numel() for value in one.values.values())
        mean = sum(value.sum(dtype=torch.float64).item() for value in one.values.values()) / entries
        if not 0 < mean < float("inf"):
            raise ValueError(f"the mean squared gradient of {one.meta.get('datasets', 'a task')} is {mean}")
        for name, value in one.values.items():
            own = value.to("cpu", torch.float32) / mean
            total[name] = total[name].add_(own) if name in total else own
        metas.append(one.meta)
    if not metas:
        raise ValueError("importance of no tasks: give at least one")
    return Collected(total, KIND, {"tasks": metas})


@dataclass(frozen=True)
class Listed:
    """The importance of what a mask keeps."""

    values: Mapping[str, Tensor]  # name -> fp32 (kept,), in the order of flat positions
    key: str | None  # what it was made from, as whoever stored it says

    @property
    def digest(self) -> str:
        """SHA-256 over names and values."""
        digest = hashlib.sha256()
        for name in sorted(self.values):
            digest.update(f"{name}\0{len(self.values[name])}\0".encode())
            digest.update(self.values[name].contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def save_importance(
    path: str | os.PathLike[str], importance: Collected, mask: Mask | None, key: str | None = None
) -> None:
    """Write the importance of what a mask keeps, None: of all entries. Its names must be among those of
    `importance`.
    """
    values = {}
    for name in importance.values if mask is None else _kept(mask):
        flat = importance.values[name].float().view(-1)
        values[name] = flat.clone() if mask is None else flat[mask.positions(name)]
    content = {"format": FORMAT, "version": 1, "key": key, "mask": _fingerprint(mask), "importance": values}
    with atomic_path(path) as temporary:
        save_tensors(content, temporary)


def load_importance(path: str | os.PathLike[str], mask: Mask | None) -> Listed:
    """What `save_importance` has written for this mask, mapped. Raises ValueError for anything else,
    before it takes more memory than the file has bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        content = map_tensors(path, read_torch_file(path))
        known = content["format"] == FORMAT and content["version"] == 1
        values, of_mask, key = content["importance"], content["mask"], content["key"]
        sound = known and all(_is_sound(value) for value in values.values())
    except (*DAMAGED, OSError) as error:
        raise ValueError(f"{path} is no file of importances: {str(error)[:200]}") from error
    if not sound:
        raise ValueError(f"{path} is no file of importances that are finite and at least 0")
    listed = {name: len(value) for name, value in values.items()}
    if of_mask != _fingerprint(mask) or (mask is not None and listed != _kept(mask)):
        raise ValueError(f"{path} lists the importance of other entries than those that train")
    return Listed(values, key)


def _is_sound(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.dim() == 1 and bool((value.isfinite() & (value >= 0)).all())


def _kept(mask: Mask) -> dict[str, int]:
    """Name -> entries that are kept, of those with any."""
    return {name: count for name in mask.names if (count := mask.kept(name))}


def _fingerprint(mask: Mask | None) -> str | None:
    """Of what is kept: names with nothing kept do not count."""
    return None if mask is None else mask.only([*_kept(mask)]).fingerprint()
