"""New masks from others, with metadata that are true of the result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch

from lota.masks import ORIGIN, Mask
from lota.masks.extract.saliency import uniform
from lota.masks.extract.topk import Keys, top_bits
from lota.models.chunks import Span


def random_like(mask: Mask, seed: int) -> Mask:
    """A random mask that keeps as many entries of each tensor; a function of seed, names and counts.

    Every entry of a tensor is as likely as any other. Memory: the bits, and a chunk of scores.
    """
    bits = {}
    for name in mask.names:
        found, _ = top_bits(_random_keys(seed), {name: mask.numel(name)}, [mask.kept(name)])
        bits[name] = torch.from_numpy(found[0][name])
    origin = {key: mask.meta[key] for key in (*ORIGIN, "layout") if key in mask.meta and key != "flipped"}
    return Mask(bits, mask.shapes, {**origin, "score": "random", "per": "tensor", "seed": seed})


def _random_keys(seed: int) -> Keys:
    """Numbers other than those of `extract_masks.py --score random` with that seed: where the mask is such a
    one, the same numbers would give the same mask.
    """

    def keys(span: Span) -> np.ndarray:
        return uniform(span, f"random-like {seed}").view(np.int32)

    return keys


def made_of(tool: str, masks: Sequence[Mask], names: Sequence[str], seed: int = 0) -> Mask:
    """The mask that a tool makes of these. names: of the files, for the metadata.

    tool: union, intersect (of two or more), flip, random-like (of one). Raises ValueError for another
    number of masks, masks of different models, or a flip without a scope.
    """
    several = tool in ("union", "intersect")
    if several != (len(masks) > 1):
        raise ValueError(f"{tool}: give {'two mask files or more' if several else 'one mask file'}")
    if tool == "flip" and masks[0].meta.get("layout") == "dense":
        raise ValueError(
            f"{names[0]} is of the older layout and has no scope to flip in: give --model FOLDER"
        )
    made = MAKE[tool](masks, seed)
    made.meta |= {
        "made_by": f"{tool} of {', '.join(names)}",
        "kept": made.n_kept,
        "sparsity": 1 - made.density,
    }
    return made


MAKE = {
    "union": lambda masks, seed: reduce(Mask.union, masks),
    "intersect": lambda masks, seed: reduce(Mask.intersect, masks),
    "flip": lambda masks, seed: masks[0].flip(),
    "random-like": lambda masks, seed: random_like(masks[0], seed),
}
