"""Everything that can be found out before a model loads: data, tokenizer, mask, and whether the run may
start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lota.adapter import lora_targets
from lota.config import Config
from lota.data import Example
from lota.masks import Mask
from lota.models import add_pad_token, find_block_class, load_tokenizer
from lota.policy_file import is_policy
from lota.prompting import Prompter
from lota.run_folder import Resumable, find_resumable, refuse_other
from lota.scope import find_scope, meta_model
from lota.trainable import fingerprint, mask_or_dense, trainable_mask
from lota.training_data import encoder, load_examples, load_held_out, plan
from lota.weights import open_weights

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """What a trainer starts from. mask: None for dense training; lengths: tokens per row when grouping by
    it.
    """

    train: list[Example]
    held_out: list[Example]
    tokenizer: Any
    mask: Mask | None
    seen: dict[str, str | None]
    lengths: list[int] | None
    stop: tuple[str, ...]
    resumable: Resumable | None


def prepare(config: Config, find_task: Callable[[str], Any]) -> Prepared:
    """Check the run against the files it needs and load its data, before any model loads.

    find_task: gives the task object of a name. Raises one ValueError with all the problems found.
    """
    problems: list[str] = []

    def attempt(check: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return check(*arguments)
        except ValueError as error:
            problems.append(str(error))
            return None

    resumable = attempt(find_resumable, config)
    tasks = [attempt(_with_options, find_task, name, config) for name in config.datasets]
    tokenizer = attempt(_tokenizer, config)
    mask = attempt(_checked_mask, config, tokenizer) if tokenizer is not None else None
    data = attempt(_examples, config, tasks, tokenizer) if tokenizer is not None and all(tasks) else None
    if problems or data is None:
        raise ValueError("\n".join(problems))
    train, held_out = data
    seen = {"mask": fingerprint(mask), "data": _content_hash(train)}
    refuse_other(resumable, str(config.run_dir), seen)
    return Prepared(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        mask=mask,
        seen=seen,
        lengths=_lengths(config, tokenizer, train) if config.group_by_length else None,
        stop=tuple({text for task in tasks for text in task.stop}),
        resumable=resumable,
    )


def _with_options(find_task: Callable[[str], Any], name: str, config: Config) -> Any:
    """The task, with the settings of its own that the run gives; one that it does not have is told."""
    task = find_task(name)
    given = {key: getattr(config, key) for key in ("num_turns", "prefs_path")}
    for key, value in given.items():
        if key not in task.options and value != Config.__dataclass_fields__[key].default:
            logger.info("not used here: %s=%s (task %s)", key, value, name)
    return task.with_options(**{key: value for key, value in given.items() if key in task.options})


def _tokenizer(config: Config) -> Any:
    tokenizer = load_tokenizer(config.model.tokenizer_name_or_path or config.model.name_or_path)
    if config.model.pad_token is not None:
        add_pad_token(tokenizer, config.model.pad_token)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model.name_or_path} has no end-of-sequence token")
    return tokenizer


def _examples(config: Config, tasks: Sequence[Any], tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Training examples and, where the run evaluates, held-out ones."""
    prompter = Prompter(tokenizer, config.chat_template)
    train = load_examples(tasks, "train", config, prompter)
    steps = [len(rows) for *_, rows in plan(config, len(train), None)]
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
    """Tokens of every example, cut as in training."""
    return [len(encoded) for encoded in map(encoder(config, tokenizer), examples)]


def _content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the texts: a continued run must see the rows that it started with."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.prompt, example.response]).encode())
    return digest.hexdigest()


def _checked_mask(config: Config, tokenizer: Any) -> Mask | None:
    """The mask to train with, checked against the model's names and shapes; shows the scope."""
    mask = mask_or_dense(config.mask_path)
    protect = [Mask.load(path) for path in config.protect_masks]
    if config.flip_mask and mask is None:
        raise ValueError(
            f"flip_mask=true with mask_path={config.mask_path}: dense training has nothing to flip"
        )
    model = _meta_model(config, tokenizer)
    find_block_class(model, config.model.block_name)
    show_scope(model, config.model.scope, config.model.block_name)
    if config.adapter.name == "lora":
        show_adapted(model, config)
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


def _meta_model(config: Config, tokenizer: Any) -> nn.Module:
    """Names and shapes of the model that will train, its vocabulary as large as it will be."""
    archive = config.model.archive
    if archive is not None and not Path(archive).expanduser().exists():
        raise ValueError(f"model.archive={archive} does not exist: give a Hugging Face folder or a policy.pt")
    from_policy = archive is not None and is_policy(archive)
    try:
        model = meta_model(config.model.name_or_path if archive is None or from_policy else archive)
    except (OSError, KeyError) as error:
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: no model there: {error}"
        ) from error
    _check_positions(model, config)
    rows = model.get_input_embeddings().weight.shape[0]
    if from_policy:
        rows = _policy_rows(model, archive)
    if config.model.pad_token is not None:
        rows = max(rows, len(tokenizer))
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def _policy_rows(model: nn.Module, archive: str) -> int:
    """Rows of the token embedding in a policy.pt."""
    name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    return open_weights(archive, model).shape(name)[0]


def _check_positions(model: nn.Module, config: Config) -> None:
    """Raise ValueError when a model with a table of positions has fewer of them than max_length."""
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if table and re.search(r"wpe|position", name) and module.num_embeddings < config.max_length:
            raise ValueError(
                f"max_length={config.max_length}: the model has {module.num_embeddings} positions; lower it"
            )


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
