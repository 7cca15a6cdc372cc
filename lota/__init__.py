"""Lottery Ticket Adaptation: masks, masked optimizers and sparse task vectors for language models.

Names are imported on first use, so that `python -m lota.masks` and `import lota` stay cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; _HOMES is what happens
    from lota.masks import Mask as Mask
    from lota.masks.extract.gradients import collect_gradients as collect_gradients
    from lota.masks.extract.importance import importance_of as importance_of
    from lota.masks.extract.select import extract as extract
    from lota.models.scope import find_scope as find_scope
    from lota.models.scope import scope_share as scope_share
    from lota.optim.compiled import compile_blocks as compile_blocks
    from lota.optim.fused import apply_mask_in_backward as apply_mask_in_backward
    from lota.optim.fused import fuse_in_backward as fuse_in_backward
    from lota.optim.hf_callback import FusedCallback as FusedCallback
    from lota.optim.low_precision import SwallowedUpdatesWarning as SwallowedUpdatesWarning
    from lota.optim.optimizers import MaskedAdamW as MaskedAdamW
    from lota.optim.optimizers import MaskedRMSprop as MaskedRMSprop
    from lota.optim.optimizers import MaskedSGD as MaskedSGD
    from lota.share.delta.attach import attach as attach
    from lota.share.delta.attach import attached as attached
    from lota.share.delta.attach import detach as detach
    from lota.share.delta.attach import switch as switch
    from lota.share.delta.reader import Delta as Delta

__version__ = "0.1.0"  # setuptools reads it without importing this file
_HOMES = {
    "FusedCallback": "lota.optim.hf_callback",
    "Mask": "lota.masks",
    "MaskedAdamW": "lota.optim.optimizers",
    "MaskedRMSprop": "lota.optim.optimizers",
    "MaskedSGD": "lota.optim.optimizers",
    "SwallowedUpdatesWarning": "lota.optim.low_precision",
    "Delta": "lota.share.delta.reader",
    "apply_mask_in_backward": "lota.optim.fused",
    "compile_blocks": "lota.optim.compiled",
    "collect_gradients": "lota.masks.extract.gradients",
    "attach": "lota.share.delta.attach",
    "attached": "lota.share.delta.attach",
    "detach": "lota.share.delta.attach",
    "extract": "lota.masks.extract.select",
    "find_scope": "lota.models.scope",
    "importance_of": "lota.masks.extract.importance",
    "scope_share": "lota.models.scope",
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
