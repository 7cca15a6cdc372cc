"""Mask files: the packed layout and the older, dense one (masks/README.md describes both)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lota.models.hub import MASK_FILE, local_copy
from lota.models.policy import LAYOUT
from lota.models.tensor_files import DELTA_FORMAT, read_metadata
from lota.models.torch_files import HoldsObjects, map_tensors, read_torch_file
from lota.models.zip_records import NotSupported
from lota.storage import atomic_path, refuse_foreign, save_tensors
from lota.utils import first_few

FORMAT = "lota-mask"
FORMAT_VERSION = 1
# Metadata that is computed with; everything else in `meta` is only shown.
META_TYPES = {
    "scope": str | None,
    "scope_share": int | float,
    "left_out": str,
    "layout": str,
    "flipped": bool,
    "sparsity": int | float,
}


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


def check_bits(name: str, bits: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `bits` holds one bit for each entry of the shape, and zeros behind them.

    Of bits that were left on disk it reads the last byte only.
    """
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != (n + 7) // 8:
        raise ValueError(
            f"mask entry {name!r}: {bits.numel()} bytes of {bits.dtype} cannot hold one bit for each of the "
            f"{n} entries of shape {shape}"
        )
    if n % 8 and int(bits.flatten()[-1]) & (0xFF >> n % 8):
        raise ValueError(f"mask entry {name!r}: bits are set behind the last of its {n} entries")


# Reading


def read(path: str | os.PathLike[str], mapped: bool = False) -> Content:
    """The content of a file of either layout, checked: names, shapes, bits and metadata fit together.

    mapped: leave the bits on disk and let the system read them when they are looked at, so that many masks
    take little memory; the file must not change meanwhile. A path may name a file of the hub
    (lota/models/hub.py). Raises ValueError naming the file for anything else, before it takes more memory
    than the file has bytes.
    """
    path = local_copy(path, MASK_FILE)
    try:
        _check_kind(path)
        content = _load(path)
        if not isinstance(content, dict) or not content:
            raise ValueError("is no mask file: it holds no dict of tensors")
        size = path.stat().st_size
        found = _packed(content, size) if content.get("format") == FORMAT else _dense(content, size)
        bits = found.bits if mapped else {name: packed.clone() for name, packed in found.bits.items()}
        return found._replace(bits=bits)
    except ValueError as error:
        raise ValueError(f"mask file {path} {error}") from error


def _check_kind(path: Path) -> None:
    """Raise ValueError for what is easily taken for a mask file."""
    if path.is_dir():
        inside = [file.name for file in sorted(path.glob("*_mask.pt"))]
        raise ValueError(f"is a folder; name a file in it{f': {first_few(inside)}' if inside else ''}")
    if not path.is_file():
        raise ValueError(
            f"{'is no file' if path.exists() else 'does not exist'}; extract_masks.py makes masks"
        )
    try:
        with path.open("rb") as file:
            begin = file.read(24)
        if begin.startswith(b"PK"):  # a zip archive, as torch.save writes
            return
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if not begin or begin.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer (`git lfs pull` fetches the file)" if begin else "empty (0 bytes)"
        raise ValueError(f"is {what}; copy it again, or extract the mask anew")
    try:
        is_delta = read_metadata(path).get("format") == DELTA_FORMAT
    except ValueError:
        return
    raise ValueError(f"is {'a delta' if is_delta else 'a file of weights'}, no mask: {_FROM_WEIGHTS}")


_FROM_WEIGHTS = "extract_masks.py --base BASE --tuned TUNED makes masks of two models"


def _load(path: Path) -> Any:
    """What torch.save wrote, tensors and plain values only."""
    try:
        return map_tensors(path, read_torch_file(path))
    except HoldsObjects as error:
        raise ValueError(
            "was not read: it holds Python objects, which no mask does, and loading them could run code. "
            f"{error}"
        ) from error
    except NotSupported as error:
        raise ValueError(f"was not read: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            "cannot be read: it is truncated, damaged or not written by torch.save; copy it again, or "
            f"extract the mask anew ({error})"
        ) from error


def _packed(content: Mapping[str, Any], size: int) -> Content:
    """size: bytes of the file."""
    version = content.get("version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"has mask format version {version}; this version reads up to {FORMAT_VERSION}: update lota"
        )
    if type(version) is not int or version < 1:
        raise ValueError(f"is no whole mask file: its version is {version!r:.60}, not {FORMAT_VERSION}")
    for key in Content._fields:
        part = content.get(key)
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            found = f"is {part!r:.60}" if key in content else "is missing"
            raise ValueError(f"is no whole mask file: {key!r}, a dict with names as keys, {found}")
    bits, shapes, meta = (content[key] for key in Content._fields)
    alone = sorted({*bits} ^ {*shapes})
    if alone:
        raise ValueError(f"is no whole mask file: of {first_few(alone)} it has bits or a shape, not both")
    for name, shape in shapes.items():
        if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"is damaged: the shape of {name!r} is {shape!r:.60}, no list of sizes")
        if not isinstance(bits[name], Tensor):
            raise ValueError(f"is damaged: the bits of {name!r} are {bits[name]!r:.60}, no tensor")
        try:
            check_bits(name, bits[name], tuple(shape))
        except ValueError as error:
            raise ValueError(f"is damaged: {error}") from error
    for key, kind in META_TYPES.items():
        if key in meta and not isinstance(meta[key], kind):
            raise ValueError(f"is damaged: its metadata say {key}={meta[key]!r:.60}")
    if sum(packed.numel() for packed in bits.values()) > size:
        raise ValueError("is damaged: it says that it has more entries than the file holds")
    return Content(bits, shapes, meta)


def _dense(content: Mapping[Any, Any], size: int) -> Content:
    """size: bytes of the file, which holds every entry."""
    if set(LAYOUT) <= set(content) and isinstance(content["state"], dict):
        raise ValueError(f"is a checkpoint, no mask: {_FROM_WEIGHTS}")
    bad = [
        repr(name) for name, value in content.items() if type(name) is not str or not torch.is_tensor(value)
    ]
    if bad:
        raise ValueError(f"is no mask file: of its entries {first_few(bad)} are no named tensors")
    if sum(value.numel() * value.element_size() for value in content.values()) > size:
        raise ValueError("is no mask file: its tensors have more entries than the file holds")
    bits = {}
    for name, value in content.items():
        if value.dtype != torch.bool and not value.is_floating_point():
            raise ValueError(
                f"holds {str(value.dtype).removeprefix('torch.')} numbers in {name!r}, of which nobody can "
                "tell whether 1 means kept or frozen: save bool tensors, True = frozen"
            )
        if value.is_floating_point() and not bool(((value == 0) | (value == 1)).all()):
            raise ValueError(
                f"is no mask: {name!r} holds other numbers than 0 and 1: weights or scores; {_FROM_WEIGHTS}"
            )
        bits[name] = pack(value == 0)
    return Content(bits, {name: value.shape for name, value in content.items()}, {"layout": "dense"})


# Writing


def check_target(path: str | os.PathLike[str], argument: str = "out") -> None:
    """Raise ValueError if a mask would take the place of anything else than a mask file.

    argument: what names the file, for the error.
    """
    refuse_foreign(argument, Path(path), "mask file", _is_mask)


def _is_mask(path: Path) -> bool:
    try:
        read(path, mapped=True)
    except ValueError:
        return False
    return True


def write(
    path: str | os.PathLike[str], content: Content, all_shapes: Mapping[str, Iterable[int]] | None = None
) -> None:
    """Write a file atomically: bits and metadata, or, given all_shapes, the older layout.

    That is name -> bool tensor, True = frozen, for every name of all_shapes, in its order; names that the
    mask does not list are all True. Raises ValueError if there is something else than a mask at `path`.
    """
    check_target(path)
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
