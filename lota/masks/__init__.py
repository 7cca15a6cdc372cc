"""Masks: which entries of which parameters may change; `python -m lota.masks` works on files of them."""

from __future__ import annotations

from lota.masks.mask import ORIGIN, Mask, kept_count

__all__ = ["ORIGIN", "Mask", "kept_count"]
