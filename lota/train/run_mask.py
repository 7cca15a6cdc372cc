"""The mask that a run trains with, and what its entries matter to earlier tasks, before a model loads."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from lota.config import Config
from lota.config_checks import dense_problem
from lota.masks import Mask
from lota.masks.extract.importance import Listed, load_importance
from lota.masks.trainable import mask_or_dense, refuse_other_base, trainable_mask
from lota.train.snip import SnipMask


def find_mask(config: Config, model: PreTrainedModel, snip: SnipMask | None) -> Mask | None:
    """The mask of the run's file, or the stored one of snip=true; None for dense training, and if snip=true
    has stored none yet.
    """
    if not config.snip:
        given = mask_or_dense(config.mask_path)
        if given is not None and not config.flip_mask and not config.mask_of_other_base:
            start = config.model.archive or config.model.name_or_path
            refuse_other_base(given, f"mask_path={config.mask_path}", start, model)
        return checked_mask(config, model, given)
    stored = snip.stored() if snip is not None else None
    return None if stored is None else checked_mask(config, model, stored)


def find_importance(config: Config, model: PreTrainedModel, mask: Mask | None) -> Listed:
    """What ewc reads. Raises ValueError if it is not of the entries that train."""
    assert config.importance_path is not None  # config_checks has seen to it
    try:
        found = load_importance(config.importance_path, mask)
        for name, p in model.named_parameters() if mask is None else ():
            if p.requires_grad and (name not in found.values or len(found.values[name]) != p.numel()):
                raise ValueError(f"it lacks {name}, which trains")
        return found
    except ValueError as error:
        raise ValueError(f"importance_path={config.importance_path}: {error}") from error


def refuse_dense_replicas(config: Config, count: int) -> None:
    """Raise ValueError if a run without a mask would send whole gradients."""
    if config.adapter.name == "none" and config.trainer.name == "BasicTrainer":
        raise ValueError(dense_problem(f"mask_path={config.mask_path or 'null'}", count))


def checked_mask(config: Config, model: PreTrainedModel, mask: Mask | None) -> Mask | None:
    """The mask to train with, checked against the model's names and shapes."""
    protect = [Mask.load(path) for path in config.protect_masks]
    if config.flip_mask and mask is None:
        raise ValueError(
            f"flip_mask=true with mask_path={config.mask_path}: dense training has nothing to flip"
        )
    try:
        mask = trainable_mask(
            model,
            mask,
            flip=config.flip_mask,
            protect=protect,
            freeze_layers=config.freeze_layers,
            scope=config.model.scope,
            block_name=config.model.block_name,
        )
        if mask is not None and mask.n_kept == 0:
            raise ValueError("nothing would train: no kept entry is left")
        if mask is not None and config.optimizer_state == "factored":
            _refuse_single_entries(mask)
        return mask
    except ValueError as error:
        raise ValueError(
            f"mask_path={config.mask_path}, protect_masks={config.protect_masks}: {error}"
        ) from error


def _refuse_single_entries(mask: Mask) -> None:
    """Raise ValueError for a mask under which a square average cannot be factored."""
    for name in mask.names:
        if 0 < mask.kept(name) < math.prod(mask.shapes[name]):
            raise ValueError(
                f"optimizer_state=factored needs whole matrices, and {mask.kept(name):,} entries of {name} "
                "train: choose optimizer_state=bfloat16"
            )
