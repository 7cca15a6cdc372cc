"""Lottery Ticket Adaptation: masks, masked optimizers and sparse task vectors for language models.

Names are imported on first use, so that `python -m lota.masks` and `import lota` stay cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "FusedCallback": "lota.optim.hf_callback",
    "Mask": "lota.masks",
    "MaskedAdamW": "lota.optim.optimizers",
    "MaskedRMSprop": "lota.optim.optimizers",
    "MaskedSGD": "lota.optim.optimizers",
    "Delta": "lota.share.delta.reader",
    "apply_mask_in_backward": "lota.optim.fused",
    "collect_gradients": "lota.masks.extract.gradients",
    "attach": "lota.share.delta.attach",
    "attached": "lota.share.delta.attach",
    "detach": "lota.share.delta.attach",
    "extract": "lota.masks.extract.select",
    "find_scope": "lota.models.scope",
    "switch": "lota.share.delta.attach",
    "fuse_in_backward": "lota.optim.fused",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lota' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
