"""Which entries of a model train: a mask file, flipped, less what other masks protect, less frozen layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lota.masks import Mask
from lota.models.hashing import remembered_hash
from lota.models.hub import is_hub_reference
from lota.models.scope import find_scope, frozen_towers, layer_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mask_or_dense(path: str | Path | None, mapped: bool = False) -> Mask | None:
    """Returns the mask at `path`; None (train densely) for null, or for an absent `0.0_mask.pt`.

    mapped: see `Mask.load`.
    """
    return None if path is None or is_dense(path) else Mask.load(path, mapped)


def is_dense(path: str | Path | None) -> bool:
    """Whether `mask_path` asks for dense training; see `mask_or_dense`."""
    if path is None:
        return True
    if is_hub_reference(path):  # a file that is there, or an error
        return False
    path = Path(path).expanduser()
    return not path.exists() and re.fullmatch(r"0(\.0*)?_mask\.pt", path.name) is not None


def refuse_other_base(mask: Mask, name: str, start: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a mask that was extracted from other weights than those of `start`.

    A flipped mask, and one that records no base or is made of masks of several, may be of any. name: what the
    error calls the mask. model: the structure of `start`; a meta-device model will do.
    """
    of_mask = mask.meta.get("base_hash")
    if not isinstance(of_mask, str) or mask.meta.get("flipped"):
        return
    found = remembered_hash(start, model)
    if found != of_mask:
        raise ValueError(
            f"{name}: the mask was extracted from {mask.meta.get('base')} (weights of hash {of_mask[:9]}), "
            f"and this run starts from {start} ({found[:9]}), other weights of the same shapes: extract a "
            "mask from these, start from those (model.name_or_path or model.archive), or set "
            "mask_of_other_base=true"
        )


def trainable_mask(
    model: nn.Module,
    mask: Mask | None,
    *,
    flip: bool = False,
    protect: Iterable[Mask] = (),
    freeze_layers: str | None = None,
    scope: str | None = None,
    block_name: str | None = None,
) -> Mask | None:
    """Returns the mask to train with, checked against `model` (a meta-device model will do).

    None means that everything trains. Without a mask but with something to freeze, all other entries of the
    model train. flip: train the complement within the scope. protect: masks whose kept entries stay frozen.
    freeze_layers: `odd` or `even` transformer layers (counted from 0) stay frozen. scope: regular expression
    of parameter names; None is the default scope. block_name: class of the transformer blocks; None finds
    them. Raises ValueError for masks of another model.
    """
    protect = list(protect)
    if mask is None:
        if not protect and freeze_layers is None:
            return None
        still = set(frozen_towers(model, scope))
        mask = Mask.from_dense({n: torch.full(p.shape, n not in still) for n, p in model.named_parameters()})
    if mask.meta.get("layout") == "dense":  # it lists all parameters, also an embedding that grew since
        found = find_scope(model, scope, block_name)
        mask = mask.only([name for name in mask.names if mask.kept(name) or name in found])
    mask.check(model)
    if flip:
        mask = mask.flip(find_scope(model, scope, block_name))
    for other in protect:
        other.check(model)
        mask = mask.minus(other)
    if freeze_layers is not None:
        remainder = {"even": 0, "odd": 1}[freeze_layers]
        numbers = layer_numbers(model, block_name)
        frozen = tuple(f"{prefix}." for prefix, number in numbers.items() if number % 2 == remainder)
        bits = {n: torch.zeros_like(b) if n.startswith(frozen) else b for n, b in mask.bits.items()}
        mask = Mask(bits, mask.shapes, mask.meta)
    return mask
