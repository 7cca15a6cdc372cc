"""delta.safetensors beside a checkpoint's policy.pt: what the run changed of its base."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from lota.config import Config
from lota.masks import Mask
from lota.models.loading import dtype_of
from lota.models.policy import is_policy
from lota.models.weights import open_weights
from lota.share.delta.extract import extract
from lota.share.delta.format import common_dtype

FILE = "delta.safetensors"
logger = logging.getLogger(__name__)


def check_run(config: Config, structure: nn.Module) -> None:
    """Raise ValueError where the run's result would differ from its base in more than what it trains.

    structure: the model that will train, on the meta device.
    """
    base = _base(config)
    source = open_weights(base, structure)
    grown = [n for n, p in structure.named_parameters() if n in source and source.shape(n) != tuple(p.shape)]
    if grown:
        raise ValueError(
            f"save_delta=true: model.pad_token={config.model.pad_token} gives {grown[0]} rows that {base} "
            "does not have; use model.pad_token=null (padding with an existing token), or save_delta=false"
        )
    policy, stored = dtype_of(config.model.policy_dtype), {source.dtype(name) for name in source.names()}
    lossy = sorted(str(dtype) for dtype in stored if common_dtype(policy, dtype) != policy)
    if lossy:
        raise ValueError(
            f"save_delta=true: model.policy_dtype={config.model.policy_dtype} cannot hold the {lossy[0]} "
            f"weights of {base}, which would all change; use model.policy_dtype=float32, or save_delta=false"
        )


def save_delta(config: Config, mask: Mask | None, checkpoint: Path, name: Path) -> dict[str, Any] | None:
    """Write the delta between the run's base and `checkpoint`/policy.pt; returns its metadata.

    name: what the checkpoint's folder will be called. A base that is no longer what it was when the run
    started is no reason to lose the checkpoint: it is saved without a delta (None), and the log says why.
    """
    base = _base(config)
    try:
        return extract(
            base,
            checkpoint / "policy.pt",
            checkpoint / FILE,
            mask=mask,
            task=",".join(config.datasets),
            model=config.model.name_or_path if is_policy(base) else None,
            tuned_id=str(name / "policy.pt"),
        )
    except ValueError as error:
        logger.error("%s was not written: %s", name / FILE, error)
        return None


def _base(config: Config) -> str:
    return config.model.archive or config.model.name_or_path
