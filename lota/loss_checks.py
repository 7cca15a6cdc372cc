"""Settings that one loss has and another has not: their defaults, problems, and when nothing reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lota.config import Config

LOSS_KEYS: dict[str, dict[str, Any]] = {  # settings of each loss and their defaults
    "sft": {"average_log_prob": False},
    "dpo": {
        "beta": 0.1,
        "reference_free": False,
        "sft_reg": 0.0,
        "importance_correction": False,
        "ipo": False,
        "ipo_sum": False,
        "robust_eps": 0.0,
    },
}
REFERENCES = (None, "swap", "model", "precomputed")
_REFERENCE_KEYS = ("model.reference", "model.reference_archive", "model.reference_dtype")


def loss_problems(c: Config) -> Iterator[str]:
    """A line per setting of the loss or its reference that cannot be honoured."""
    loss = c.loss
    for name, keys in LOSS_KEYS.items():
        given = [f"loss.{key}={getattr(loss, key)}" for key in keys if getattr(loss, key) is not None]
        if given and name != loss.name and loss.name in LOSS_KEYS:
            settings = "settings" if len(given) > 1 else "a setting"
            yield (
                f"{', '.join(given)}: {settings} of loss={name}, and this run has loss={loss.name}; leave "
                f"out, or choose loss={name} (loss=, not loss.name=)"
            )
    yield from _number_problems(c)
    if loss.ipo and loss.robust_eps:
        yield (
            f"loss.robust_eps={loss.robust_eps} with loss.ipo=true: wrong labels are not defined for ipo; "
            "set one of them only"
        )
    if loss.reference_free and loss.importance_correction:
        yield (
            "loss.importance_correction=true with loss.reference_free=true: the correction needs a "
            "reference; set one of them only"
        )
    if c.model.reference == "swap" and c.model.reference_archive is not None:
        yield (
            f"model.reference=swap with model.reference_archive={c.model.reference_archive}: a swapped "
            "reference is the policy's own start; choose model.reference=model or precomputed"
        )


def _number_problems(c: Config) -> Iterator[str]:
    loss = c.loss
    if loss.beta is not None and not 0 < loss.beta < math.inf:
        yield f"loss.beta={loss.beta}: must be a finite number above 0"
    if loss.sft_reg is not None and not 0 <= loss.sft_reg < math.inf:
        yield f"loss.sft_reg={loss.sft_reg}: must be a finite number of at least 0"
    if loss.robust_eps is not None and not 0 <= loss.robust_eps < 0.5:
        yield f"loss.robust_eps={loss.robust_eps}: a share of wrong labels, at least 0 and below 0.5"


def unused_loss_keys(c: Config) -> dict[str, str]:
    """Dotted key -> why nothing reads it in this run."""
    if c.loss.name == "sft":
        return dict.fromkeys(_REFERENCE_KEYS, "loss=sft has no reference")
    reasons = {} if c.loss.ipo else {"loss.ipo_sum": "loss.ipo=false"}
    if c.loss.reference_free:
        reasons |= dict.fromkeys(_REFERENCE_KEYS, "loss.reference_free=true")
    elif c.model.reference_archive is None and c.model.reference in ("swap", "precomputed"):
        reasons["model.reference_dtype"] = f"model.reference={c.model.reference} computes with the policy"
    return reasons
