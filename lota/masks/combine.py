"""New masks from others, with metadata that are true of the result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch

from lota.masks import ORIGIN, Mask
from lota.masks.extract.saliency import uniform
from lota.masks.extract.topk import top_bits
from lota.models.chunks import Span

SEVERAL = ("union", "intersect")  # tools that take two masks or more; the others take one
TOOLS = (*SEVERAL, "flip", "random-like")


def combine(tool: str, masks: Sequence[Mask], names: Sequence[str], seed: int = 0) -> Mask:
    """Returns the mask that a tool of TOOLS makes of these.

    names: of the files, for the metadata. seed: of random-like. Raises ValueError for another number of
    masks, masks of different models, or a flip without a scope.
    """
    first, *others = masks
    if (tool in SEVERAL) != bool(others):
        raise ValueError(f"{tool}: give {'two mask files or more' if tool in SEVERAL else 'one mask file'}")
    if tool == "flip" and first.meta.get("layout") == "dense":
        raise ValueError(
            f"{names[0]} is of the older layout and has no scope to flip in: give --model FOLDER"
        )
    if tool in SEVERAL:
        made = reduce(Mask.union if tool == "union" else Mask.intersect, masks)
    else:
        made = first.flip() if tool == "flip" else random_like(first, seed)
    made_by = f"{tool} of {', '.join(names)}"
    made.meta |= {"made_by": made_by, "kept": made.n_kept, "sparsity": 1 - made.density}
    return made


def random_like(mask: Mask, seed: int) -> Mask:
    """Returns a random mask that keeps as many entries of each tensor; a function of seed, names and counts.

    Every entry of a tensor is as likely as any other. Memory: the bits, and a chunk of random numbers.
    """

    def keys(span: Span) -> np.ndarray:
        # not the numbers of `extract_masks.py --score random` with that seed: of such a mask they would make
        # the same mask
        return uniform(span, f"random-like {seed}").view(np.int32)

    bits = {}
    for name in mask.names:
        (found,), _ = top_bits(keys, {name: mask.numel(name)}, [mask.kept(name)])
        bits[name] = torch.from_numpy(found[name])
    origin = {key: mask.meta[key] for key in (*ORIGIN, "layout") if key in mask.meta and key != "flipped"}
    return Mask(bits, mask.shapes, {**origin, "score": "random", "per": "tensor", "seed": seed})
