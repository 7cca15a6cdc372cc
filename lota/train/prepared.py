"""What a trainer starts from, found and checked before a model loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lota.data.batches import Example
from lota.masks import Mask
from lota.train.run_folder import Resumable
from lota.train.snip import SnipMask


@dataclass
class Prepared:
    """What a trainer starts from. mask: None for dense training; lengths: tokens per row when grouping by
    it. snip: the mask that is to be computed before training.
    """

    train: list[Example]
    held_out: list[Example]
    tokenizer: Any
    mask: Mask | None
    seen: dict[str, str | None]
    lengths: list[int] | None
    stop: tuple[str, ...]
    resumable: Resumable | None
    snip: SnipMask | None = None
