"""Everything that can be found out before a model loads: data, tokenizer, mask, and whether the run may
start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lota.atomic import atomic_path
from lota.checkpoint import delete_partial, delete_run, newest_checkpoint
from lota.config import Config
from lota.config_checks import differences
from lota.data import Example
from lota.masks import Mask
from lota.models import add_pad_token, find_block_class, load_tokenizer
from lota.policy_file import is_policy
from lota.prompting import Prompter
from lota.scope import find_scope, meta_model
from lota.trainable import fingerprint, mask_or_dense, trainable_mask
from lota.training_data import encoded_lengths, load_examples, load_held_out, plan

logger = logging.getLogger(__name__)


@dataclass
class Resumable:
    """The checkpoint that a run continues from. content: what `resume.pt` holds."""

    folder: Path
    content: dict[str, Any]


@dataclass
class Prepared:
    """What a trainer starts from. mask: None for dense training; lengths: tokens per row when grouping by
    it.
    """

    train: list[Example]
    held_out: list[Example]
    tokenizer: Any
    mask: Mask | None
    mask_fingerprint: str | None
    lengths: list[int] | None
    resumable: Resumable | None


def prepare(config: Config, tasks: Sequence[Any]) -> Prepared:
    """Check the run against the files it needs and load its data. Raises ValueError before any model loads.

    tasks: task objects, one per entry of `config.datasets`.
    """
    resumable = _find_resumable(config)
    tokenizer = load_tokenizer(config.model.tokenizer_name_or_path or config.model.name_or_path)
    if config.model.pad_token is not None:
        add_pad_token(tokenizer, config.model.pad_token)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model.name_or_path} has no end-of-sequence token")
    prompter = Prompter(tokenizer, config.chat_template)
    mask = _checked_mask(config)
    seen = fingerprint(mask)
    if resumable is not None and resumable.content["mask"] != seen:
        raise ValueError(
            f"run {config.run_dir} was trained with another mask under the same name; "
            "use another exp_name, or overwrite=true to start anew"
        )
    train = load_examples(tasks, "train", config, prompter)
    total = sum(len(rows) for *_, rows in plan(config, len(train), None))
    asked = config.do_first_eval or config.eval_every <= total
    held_out = load_held_out(tasks, config, prompter) if asked else []
    return Prepared(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        mask=mask,
        mask_fingerprint=seen,
        lengths=encoded_lengths(config, tokenizer, train) if config.group_by_length else None,
        resumable=resumable,
    )


def _checked_mask(config: Config) -> Mask | None:
    """The mask to train with, checked against the model's names and shapes; shows the scope."""
    mask = mask_or_dense(config.mask_path)
    protect = [Mask.load(path) for path in config.protect_masks]
    if config.flip_mask and mask is None:
        raise ValueError(
            f"flip_mask=true with mask_path={config.mask_path}: dense training has nothing to flip"
        )
    model = _meta_model(config)
    find_block_class(model, config.model.block_name)
    show_scope(model, config.model.scope, config.model.block_name)
    try:
        return trainable_mask(
            model,
            mask,
            flip=config.flip_mask,
            protect=protect,
            freeze_layers=config.freeze_layers,
            scope=config.model.scope,
            block_name=config.model.block_name,
        )
    except ValueError as error:
        raise ValueError(
            f"mask_path={config.mask_path}, protect_masks={config.protect_masks}: {error}"
        ) from error


def _meta_model(config: Config) -> nn.Module:
    archive = config.model.archive
    if archive is not None and not Path(archive).expanduser().exists():
        raise ValueError(f"model.archive={archive} does not exist: give a Hugging Face folder or a policy.pt")
    try:
        return meta_model(
            archive if archive is not None and not is_policy(archive) else config.model.name_or_path
        )
    except (OSError, KeyError) as error:
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: no model there: {error}"
        ) from error


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


# The run folder


def _find_resumable(config: Config) -> Resumable | None:
    """The checkpoint to continue from; None to start anew. Raises ValueError where neither is right."""
    run = config.run_dir
    if config.overwrite or config.debug or not (run / "config.yaml").is_file():
        return None
    if config.resume == "never":
        raise ValueError(f"resume=never, but {run} holds a run: use another exp_name, or overwrite=true")
    old = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    changed = differences(old, asdict(config))
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings ({'; '.join(changed)}): use another exp_name, "
            "overwrite=true to start anew, or the old settings to continue it"
        )
    newest = newest_checkpoint(run)
    if newest is None:
        logger.info("%s: no whole checkpoint yet, starting from the beginning", run)
        return None
    return Resumable(*newest)


def open_run_folder(config: Config, resuming: bool) -> None:
    """Create the run folder and write config.yaml; a run that starts anew first removes what an old one
    left.
    """
    run = config.run_dir
    run.mkdir(parents=True, exist_ok=True)
    delete_partial(run)
    if not resuming:
        delete_run(run)
    with atomic_path(run / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
