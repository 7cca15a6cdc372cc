"""Everything that can be found out before a model loads: data, tokenizer, mask, and whether the run may
start.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lota.config import Config
from lota.data.batches import Example, batch_order, encoder
from lota.data.examples import load_examples, load_held_out, with_options
from lota.data.prompts import Prompter
from lota.masks import Mask
from lota.masks.trainable import mask_or_dense, trainable_mask
from lota.models.scope import find_scope
from lota.train import save_delta as saving
from lota.train.lora import lora_targets
from lota.train.prepared import Prepared
from lota.train.run_folder import find_resumable, refuse_other
from lota.train.snip import SnipMask, plan_snip
from lota.train.structure import check_reference, run_structure, run_tokenizer
from lota.utils import Problems

logger = logging.getLogger(__name__)


def prepare(config: Config, find_task: Callable[[str], Any]) -> Prepared:
    """Check the run against the files it needs and load its data, before any model loads.

    find_task: gives the task object of a name. Raises one ValueError with all the problems found.
    """
    problems = Problems()
    attempt = problems.attempt
    resumable = attempt(find_resumable, config)
    tasks = [attempt(with_options, find_task, name, config) for name in config.datasets]
    tokenizer = attempt(run_tokenizer, config)
    model = attempt(_checked_structure, config, tokenizer) if tokenizer is not None else None
    if tokenizer is not None and config.save_delta and not config.debug:
        attempt(_check_delta, config, tokenizer)
    if tokenizer is not None and config.loss.on_preferences and not config.loss.reference_free:
        attempt(check_reference, config, tokenizer)
    data = attempt(_examples, config, tasks, tokenizer) if tokenizer is not None and all(tasks) else None
    snip = attempt(plan_snip, config, tokenizer, data[0]) if config.snip and data is not None else None
    mask = attempt(_mask, config, model, snip) if model is not None else None
    problems.refuse()
    pending = config.snip and mask is None
    train, held_out = data
    seen = {"mask": mask.fingerprint() if mask else None, "data": _content_hash(train)}
    refuse_other(resumable, str(config.run_dir), {"data": seen["data"]} if pending else seen)
    return Prepared(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        mask=mask,
        seen=seen,
        lengths=_lengths(config, tokenizer, train) if config.group_by_length else None,
        stop=tuple({text for task in tasks for text in task.stop}),
        resumable=resumable,
        snip=snip if pending else None,
    )


def add_snip_mask(data: Prepared, config: Config, device: torch.device, check: Callable[[], object]) -> None:
    """Compute the mask that `prepare` has planned, and let the run train with it.

    Raises ValueError when a run that is continued was trained with another one. check: see
    `SnipMask.compute`.
    """
    model = run_structure(config, data.tokenizer)
    data.mask = _checked_mask(config, model, data.snip.compute(device, check))
    data.seen["mask"], data.snip = data.mask.fingerprint(), None
    refuse_other(data.resumable, str(config.run_dir), data.seen)


def _examples(config: Config, tasks: Sequence[Any], tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Training examples and, where the run evaluates, held-out ones."""
    prompter = Prompter(tokenizer, config.chat_template)
    train = load_examples(tasks, "train", config, prompter)
    steps = [len(rows) for *_, rows in batch_order(config, len(train), None)]
    if not steps:
        raise ValueError(f"fast_forward={config.fast_forward} skips the whole run of {len(train)} examples")
    if 0 < len(steps) <= config.warmup_steps:
        logger.warning(
            "warmup_steps=%d, but the run has %d steps: lr=%g is never reached",
            config.warmup_steps,
            len(steps),
            config.lr,
        )
    asked = config.do_first_eval or config.eval_every <= sum(steps)
    return train, load_held_out(tasks, config, prompter) if asked else []


def _lengths(config: Config, tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Tokens of every example's longest row, cut as in training."""
    return [max(map(len, rows)) for rows in map(encoder(config, tokenizer), examples)]


def _check_delta(config: Config, tokenizer: Any) -> None:
    saving.check_run(config, run_structure(config, tokenizer))


def _content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the texts: a continued run must see the rows that it started with."""
    digest = hashlib.sha256()
    for example in examples:
        texts = [example.prompt, example.response]
        digest.update(json.dumps(texts if example.rejected is None else [*texts, example.rejected]).encode())
    return digest.hexdigest()


def _checked_structure(config: Config, tokenizer: Any) -> nn.Module:
    """Names and shapes of the model that will train; shows the scope."""
    model = run_structure(config, tokenizer)
    show_scope(model, config.model.scope, config.model.block_name)
    if config.adapter.name == "lora":
        show_adapted(model, config)
    return model


def _mask(config: Config, model: nn.Module, snip: SnipMask | None) -> Mask | None:
    """The mask of the run's file, or the stored one of snip; None for dense training and where snip has none
    yet.
    """
    if not config.snip:
        return _checked_mask(config, model, mask_or_dense(config.mask_path))
    stored = snip.stored() if snip is not None else None
    return None if stored is None else _checked_mask(config, model, stored)


def _checked_mask(config: Config, model: nn.Module, mask: Mask | None) -> Mask | None:
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
        return mask
    except ValueError as error:
        raise ValueError(
            f"mask_path={config.mask_path}, protect_masks={config.protect_masks}: {error}"
        ) from error


def show_adapted(model: nn.Module, config: Config) -> None:
    """Log what LoRA adapts and what of the scope it leaves frozen; ValueError where it fits nothing."""
    adapted, frozen = lora_targets(model, config.model.scope, config.model.block_name)
    logger.info("LoRA of rank %d on %d linear layers", config.lora_rank, len(adapted))
    if frozen:
        logger.info(
            "  frozen, as peft adapts linear layers only: %d tensors (%s ...)", len(frozen), frozen[0]
        )


def show_scope(model: nn.Module, pattern: str | None, block_name: str | None = None) -> None:
    """Log which weights masks are chosen over: tensors and entries per role."""
    scope = find_scope(model, pattern, block_name)
    total = sum(p.numel() for p in model.parameters())
    inside = sum(torch.Size(t.shape).numel() for t in scope.values())
    logger.info("mask scope: %d tensors, %s of %s weights", len(scope), f"{inside:,}", f"{total:,}")
    for role in dict.fromkeys(t.role for t in scope.values()):
        names = [name for name, t in scope.items() if t.role == role]
        kinds = sorted({name.rpartition(f".{scope[name].layer}.")[2] for name in names})
        entries = sum(torch.Size(scope[name].shape).numel() for name in names)
        logger.info("  %s: %s entries in %s", role, f"{entries:,}", ", ".join(kinds))
