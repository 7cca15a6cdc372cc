"""Mask files: the packed layout and the older, dense one (masks/README.md describes both)."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lota.storage import atomic_path, save_tensors, torch_reason
from lota.utils import first_few

FORMAT = "lota-mask"
FORMAT_VERSION = 1


class Content(NamedTuple):
    """What a mask file holds."""

    bits: dict[str, Tensor]  # name -> packed bits, uint8
    shapes: Mapping[str, Iterable[int]]
    meta: dict[str, Any]  # `layout` is "dense" for the older one


def pack(kept: Tensor) -> Tensor:
    """Bool tensor of any shape -> uint8, eight entries to a byte, the first in the highest bit."""
    return torch.from_numpy(np.packbits(kept.detach().cpu().bool().reshape(-1).numpy()))


def unpack(bits: Tensor, n: int) -> np.ndarray:
    """The first n entries as uint8 zeros and ones."""
    return np.unpackbits(bits.numpy(), count=n)


def read(path: str | os.PathLike[str], mapped: bool = False) -> Content:
    """The content of a file of either layout. Raises ValueError for anything else.

    mapped: leave the bits on disk and let the system read them when they are looked at, so that many masks
    take little memory; the file must not change meanwhile.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"mask file {path} does not exist")
    mapped = mapped and zipfile.is_zipfile(path)  # else torch's oldest format, which cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = torch_reason(error)
        raise ValueError(f"{path} is no readable mask (truncated, or not plain tensors): {reason}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is not a mask file: expected a dict of tensors")
    if content.get("format") == FORMAT:
        return _packed(path, content)
    bad = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if bad:
        raise ValueError(f"{path} is not a mask file: {first_few(bad)} hold no tensors")
    bits = {name: pack(value == 0) for name, value in content.items()}
    return Content(bits, {name: value.shape for name, value in content.items()}, {"layout": "dense"})


def _packed(path: Path, content: Mapping[str, Any]) -> Content:
    if content.get("version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has mask format version {content['version']}; "
            f"this version reads up to {FORMAT_VERSION}: update lota"
        )
    missing = [key for key in Content._fields if key not in content]
    if missing:
        raise ValueError(f"{path} is not a whole mask file: {', '.join(missing)} missing")
    return Content(content["bits"], content["shapes"], content["meta"])


def write(
    path: str | os.PathLike[str], content: Content, all_shapes: Mapping[str, Iterable[int]] | None = None
) -> None:
    """Write a file atomically: bits and metadata, or, given all_shapes, the older layout.

    That is name -> bool tensor, True = frozen, for every name of all_shapes, in its order; names that the
    mask does not list are all True.
    """
    shapes = {name: list(shape) for name, shape in content.shapes.items()}
    whole: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **content._asdict(),
        "shapes": shapes,
    }
    if all_shapes is not None:
        whole = {name: torch.ones(tuple(shape), dtype=torch.bool) for name, shape in all_shapes.items()}
        for name, bits in content.bits.items():
            whole[name].view(-1)[:] = torch.from_numpy(unpack(bits, whole[name].numel()) == 0)
    with atomic_path(path) as temporary:
        save_tensors(whole, temporary)
