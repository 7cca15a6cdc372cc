"""Lottery Ticket Adaptation: masks, masked optimizers and sparse task vectors for language models.

Names are imported on first use, so that `python -m lota.masks` and `import lota` stay cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "FusedCallback": "lota.callback",
    "Mask": "lota.masks",
    "MaskedAdamW": "lota.optim",
    "MaskedRMSprop": "lota.optim",
    "MaskedSGD": "lota.optim",
    "Delta": "lota.delta.reader",
    "apply_mask_in_backward": "lota.fused",
    "collect_gradients": "lota.gradient_scores",
    "attach": "lota.delta.attaching",
    "attached": "lota.delta.attaching",
    "detach": "lota.delta.attaching",
    "extract": "lota.selection",
    "find_scope": "lota.scope",
    "switch": "lota.delta.attaching",
    "fuse_in_backward": "lota.fused",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lota' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
