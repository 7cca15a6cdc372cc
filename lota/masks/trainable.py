"""Which entries of a model train: a mask file, flipped, less what other masks protect, less frozen layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from lota.masks import Mask
from lota.models.scope import find_scope, transformer_blocks


def mask_or_dense(path: str | Path | None, mapped: bool = False) -> Mask | None:
    """The mask at `path`; None (train densely) for null, or for `0.0_mask.pt` where no such file exists.

    mapped: see `Mask.load`.
    """
    if path is None:
        return None
    path = Path(path).expanduser()
    if not path.exists() and re.fullmatch(r"0(\.0*)?_mask\.pt", path.name):
        return None
    return Mask.load(path, mapped)


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
    """The mask to train with, checked against `model` (a meta-device model will do); None trains everything.

    flip: train the complement within the scope. protect: masks whose kept entries stay frozen.
    freeze_layers: `odd` or `even` transformer layers (counted from 0) stay frozen.
    scope: regular expression of parameter names; None is the default scope. block_name: class of the
    transformer blocks; None finds them. Without a mask but with
    something to freeze, all other entries of the model train. Raises ValueError for masks of another model.
    """
    protect = list(protect)
    if mask is None:
        if not protect and freeze_layers is None:
            return None
        mask = Mask.from_dense(
            {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
        )
    if (
        mask.meta.get("layout") == "dense"
    ):  # it lists every parameter, also an embedding of another vocabulary
        listed = [
            name for name in mask.names if mask.kept(name) or name in find_scope(model, scope, block_name)
        ]
        mask = mask.only(listed)
    mask.check(model)
    if flip:
        mask = mask.flip(find_scope(model, scope, block_name))
    for other in protect:
        other.check(model)
        mask = mask.minus(other)
    if freeze_layers is not None:
        frozen = _layer_prefixes(model, freeze_layers, block_name)
        mask = Mask.from_dense(
            {n: mask.dense(n) & (not n.startswith(frozen)) for n in mask.names},
            mask.meta,
        )
    return mask


def _layer_prefixes(model: nn.Module, which: str, block_name: str | None) -> tuple[str, ...]:
    remainder = {"even": 0, "odd": 1}[which]
    blocks = [prefix for prefix, _ in transformer_blocks(model, block_name)]
    return tuple(f"{prefix}." for i, prefix in enumerate(blocks) if i % 2 == remainder)
