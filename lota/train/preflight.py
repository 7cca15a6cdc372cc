"""What can be found out before a model loads: data, tokenizer, mask, and whether the run may start."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import Config
from lota.config_checks import validated
from lota.data.batches import Example, batch_order, cut_text, encoder, examples_hash
from lota.data.examples import load_examples, load_held_out, with_options
from lota.data.prompts import Prompter
from lota.data.task import FindTask, Task
from lota.distributed.processes import ALONE, Processes
from lota.masks import Mask
from lota.masks.extract.importance import Listed
from lota.models.hashing import config_file_key, remembered_hash, tokenizer_key
from lota.models.loading import dtype_of, load_tokenizer
from lota.models.opening import embedding_rows, open_model
from lota.models.policy import is_policy
from lota.models.scope import find_scope, scope_share, share_sentence
from lota.models.weights import open_weights
from lota.share.delta.format import common_dtype
from lota.storage import content_key
from lota.train.lora import lora_targets, refuse_rank
from lota.train.run_folder import FollowedFolder, Resumable, RunFolder, look_together
from lota.train.run_mask import checked_mask, find_importance, find_mask, refuse_dense_replicas
from lota.train.run_model import load_run_tokenizer, run_skeleton
from lota.train.saved_model import folder_like, folder_source
from lota.train.snip import Shard, SnipMask, prepare_snip
from lota.utils import Problems

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """What a trainer starts from, found and checked before a model loads."""

    train: list[Example]
    held_out: list[Example]  # empty if the run never evaluates
    tokenizer: PreTrainedTokenizerBase
    skeleton: PreTrainedModel  # the model that will train, on the meta device
    mask: Mask | None  # None: dense training or LoRA
    snip: SnipMask | None  # the mask that has to be computed before training
    seen: dict[str, str | None]  # hashes of what the run is made from, which every checkpoint holds
    importance: Listed | None  # of what trains, if ewc reads it
    lengths: list[int] | None  # tokens per training example if batches are grouped by length
    stop: tuple[str, ...]  # texts that end a sampled completion
    resumable: Resumable | None  # None: the run starts anew
    folder: RunFolder | FollowedFolder


def prepare(config: Config, find_task: FindTask, together: Processes = ALONE) -> Prepared:
    """Check the run against the files it needs and load its data, before any model loads.

    together: the processes that train in this run, all of which call this. Raises one ValueError with all the
    problems that any of them has found, and if they do not start from the same.
    """
    validated(config)
    problems = Problems()
    attempt = problems.attempt
    folder = RunFolder(config) if together.first else FollowedFolder(config)
    resumable = attempt(look_together, folder, together)
    found = [attempt(with_options, find_task, name, config) for name in config.task_names]
    tasks = [task for task in found if task is not None]
    tokenizer = attempt(load_run_tokenizer, config)
    data = model = snip = mask = importance = None
    if tokenizer is not None and len(tasks) == len(found):
        data = attempt(_load_data, config, tasks, tokenizer)
    if tokenizer is not None:
        model = attempt(run_skeleton, config, tokenizer)
    else:
        attempt(open_model, config.model.name_or_path, config.model.archive)
    if tokenizer is not None and model is not None:
        for check in (_check_scope, _check_delta, _check_folder):
            attempt(check, config, model)
        attempt(_check_reference, config, model, tokenizer)
        if config.snip and data is not None:
            snip = attempt(prepare_snip, config, tokenizer, model, data[0])
        before = len(problems.found)
        mask = attempt(find_mask, config, model, snip)
        if config.ewc and len(problems.found) == before:
            importance = attempt(find_importance, config, model, mask)
        if together.count > 1 and mask is None and not config.snip and not problems.found:
            attempt(refuse_dense_replicas, config, together.count)
    problems.found = [problem for found in together.gather(problems.found) for problem in found]
    problems.refuse()
    assert tokenizer is not None and model is not None and data is not None
    train, held_out = data
    encode = encoder(config, tokenizer)
    prepared = Prepared(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        skeleton=model,
        mask=mask,
        snip=snip if mask is None else None,
        seen={
            "mask": mask.fingerprint() if mask else None,
            "data": examples_hash(train),
            **({"importance": importance.digest} if importance else {}),
            **({} if config.debug else _model_hashes(config, tokenizer, model, together)),
        },
        importance=importance,
        lengths=[max(map(len, encode(example))) for example in train] if config.group_by_length else None,
        stop=tuple({text for task in tasks[: len(config.datasets)] for text in task.stop}),
        resumable=resumable,
        folder=folder,
    )
    for what, content in prepared.seen.items():
        together.same(f"the {what}", content)
    if together.count > len(train):
        raise ValueError(
            f"{len(train)} training examples for {together.count} processes: start at most {len(train)}"
        )
    _refuse_other(prepared)
    return prepared


def add_snip_mask(
    data: Prepared,
    config: Config,
    device: torch.device,
    check: Callable[[], object],
    together: Processes = ALONE,
    shard: Shard | None = None,
) -> None:
    """Compute the mask that `prepare` has prepared, if there is one, and let the run train with it.

    Raises ValueError if a run that is continued was trained with another one. The arguments behind `config`
    are those of `SnipMask.compute`.
    """
    if data.snip is None:
        return
    mask = checked_mask(config, data.skeleton, data.snip.compute(device, check, together, shard))
    assert mask is not None
    together.same("the mask of snip=true", mask.fingerprint())
    data.mask, data.snip, data.seen["mask"] = mask, None, mask.fingerprint()
    _refuse_other(data)


def _model_hashes(
    config: Config, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, together: Processes
) -> dict[str, str | None]:
    """Hashes of the models and of the tokenizer that a run starts from."""
    if together.local_rank:  # the first process of each machine hashes, for the others to remember
        together.barrier()
    found = _own_model_hashes(config, tokenizer, model)
    if not together.local_rank:
        together.barrier()
    return found


def _own_model_hashes(
    config: Config, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> dict[str, str | None]:
    reference = _reference_archive(config)
    if reference is not None:
        reference = remembered_hash(reference, run_skeleton(config, tokenizer, "reference_archive"))
    return {
        "base": remembered_hash(config.model.archive or config.model.name_or_path, model),
        "config": config_file_key(config.model.name_or_path),
        "reference": reference,
        "tokenizer": tokenizer_key(tokenizer),
        "chat template": content_key(tokenizer.chat_template),
    }


def _refuse_other(data: Prepared) -> None:
    """Raise ValueError if the run was made from something else than is there now, naming what has changed."""
    if data.resumable is None:
        return
    before = data.resumable.content  # of older releases without hashes of the models
    known = [key for key in data.seen if key in before and not (key == "mask" and data.snip is not None)]
    changed = [key for key in known if before[key] != data.seen[key]]
    if changed:
        raise ValueError(
            f"run {data.resumable.folder.parent} was trained with another {' and other '.join(changed)} "
            "under the same name: put back what it was, use another exp_name, or overwrite=true to start anew"
        )


# Data


def _load_data(
    config: Config, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[Example]]:
    """Training examples and, if the run evaluates, held-out ones. tasks: the replayed ones last, of which no
    rows are held out.
    """
    prompter = Prompter(tokenizer, config.chat_template)
    tasks, replayed = tasks[: len(config.datasets)], tasks[len(config.datasets) :]
    train = load_examples(tasks, "train", config, prompter)
    train += load_examples(replayed, "train", config, prompter, config.replay_fraction)
    if cut := cut_text(config, tokenizer, train):
        logger.warning("%s", cut)
    steps = [len(batch.rows) for batch in batch_order(config, len(train), None)]
    if not steps:
        raise ValueError(f"fast_forward={config.fast_forward} skips the whole run of {len(train)} examples")
    if config.lr == 0:
        logger.warning("lr=0: no weight will change")
    elif len(steps) < config.warmup_steps:
        logger.warning(
            "warmup_steps=%d, but the run has %d steps: lr=%g is never reached",
            config.warmup_steps,
            len(steps),
            config.lr,
        )
    evaluates = config.do_first_eval or config.eval_every <= sum(steps)
    return train, load_held_out(tasks, config, prompter) if evaluates else []


# Model


def _check_scope(config: Config, model: PreTrainedModel) -> None:
    """Log which weights masks are chosen over, per role, and what LoRA adapts of them.

    Raises ValueError for a block that the model does not have, and if LoRA fits nothing.
    """
    scope = find_scope(model, config.model.scope, config.model.block_name)
    total = sum(p.numel() for p in model.parameters())
    inside = sum(tensor.numel for tensor in scope.values())
    logger.info("mask scope: %d tensors, %s of %s weights", len(scope), f"{inside:,}", f"{total:,}")
    share = scope_share(model, scope)
    remedy = "model.scope=REGEX" if config.model.scope is None else None
    logger.info("  %s", share_sentence(share.share, share.largest, remedy))
    for role in dict.fromkeys(tensor.role for tensor in scope.values()):
        tensors = {name: tensor for name, tensor in scope.items() if tensor.role == role}
        kinds = sorted({re.sub(r"\d+", "#", name).partition(".#.")[2] or name for name in tensors})
        entries = sum(tensor.numel for tensor in tensors.values())
        logger.info("  %s: %s entries in %s", role, f"{entries:,}", ", ".join(kinds))
    if config.adapter.name == "lora":
        adapted, frozen = lora_targets(model, config.model.scope, config.model.block_name)
        refuse_rank(config.lora_rank, model, adapted)
        logger.info("LoRA of rank %d on %d linear layers", config.lora_rank, len(adapted))
        if frozen:
            why = "  frozen, as peft adapts linear layers only: %d tensors (%s ...)"
            logger.info(why, len(frozen), frozen[0])


# Delta and reference


def _check_delta(config: Config, model: PreTrainedModel) -> None:
    """Raise ValueError if the run's result would differ from its base in more than what it trains."""
    if not config.save_delta or config.debug:
        return
    base = config.model.archive or config.model.name_or_path
    source = open_weights(base, model)
    grown = [n for n, p in model.named_parameters() if n in source and source.shape(n) != tuple(p.shape)]
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


def _check_folder(config: Config, model: PreTrainedModel) -> None:
    """Raise ValueError if checkpoints cannot be written as Hugging Face folders, as the run wants."""
    if config.save_format == "folder" and not config.debug:
        folder_source(folder_like(config), model)


def _check_reference(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a reference model that is not there, or whose token ids are not the policy's."""
    archive = _reference_archive(config)
    if archive is None:
        return
    reference = run_skeleton(config, tokenizer, "reference_archive")
    rows, own_rows = embedding_rows(reference), embedding_rows(model)
    try:
        theirs = None if is_policy(archive) else _vocabulary(load_tokenizer(archive), config)
    except ValueError:  # it has no tokenizer of its own
        theirs = None
    if rows != own_rows if theirs is None else theirs != _vocabulary(tokenizer, config):
        raise ValueError(
            f"model.reference_archive={archive} has another vocabulary ({rows} rows) than the policy "
            f"({own_rows} rows): give a reference that shares the policy's tokenizer"
        )


def _reference_archive(config: Config) -> str | None:
    """The model of the reference, if this run has one of its own."""
    used = config.loss.on_preferences and not config.loss.reference_free
    return config.model.reference_archive if used else None


def _vocabulary(tokenizer: PreTrainedTokenizerBase, config: Config) -> dict[str, int]:
    """Token -> id, without the pad token that the run may add."""
    return {token: i for token, i in tokenizer.get_vocab().items() if token != config.model.pad_token}
