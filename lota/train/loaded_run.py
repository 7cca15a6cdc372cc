"""A run's model, optimizer and objective: loaded as training starts, or as a checkpoint has left them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as hf_logging

from lota.config import Config
from lota.config_checks import started_processes, unused_settings
from lota.data.batches import batch_order
from lota.data.task import FindTask
from lota.distributed.processes import processes
from lota.distributed.replicated import Replicated, refuse_difference
from lota.models.loading import dtype_of, enable_activation_checkpointing
from lota.models.weights import WeightSource, open_weights
from lota.optim.compiled import compile_blocks
from lota.optim.fused import fuse_in_backward
from lota.optim.masked import MaskedOptimizer
from lota.optim.optimizers import OPTIMIZERS
from lota.optim.pull import pull_to_start
from lota.train import checkpoint, lora
from lota.train.interrupt import StopBetweenSteps
from lota.train.objectives import OBJECTIVES, Objective
from lota.train.preflight import Prepared, add_snip_mask, prepare
from lota.train.run_folder import Resumable
from lota.train.run_model import load_run_model
from lota.train.saved_model import SavedModel, Source, saved_model
from lota.train.snip import Shard

logger = logging.getLogger(__name__)


class LoadedRun:
    """What a trainer works on. Everything that can be checked before the model loads is checked by the
    constructor; `load` loads it.
    """

    model: PreTrainedModel
    optimizer: MaskedOptimizer
    objective: Objective
    total_steps: int
    total_examples: int
    unfuse: Callable[[], None]  # takes the optimizer's hooks off, so that the model can be freed

    def __init__(self, config: Config, find_task: FindTask):
        self.processes = processes()
        self.check_processes()
        self.config = config
        self.device = self.processes.device
        for line in unused_settings(config).values():
            logger.info("not used here: %s", line)
        self.part_size = config.batch_size // config.gradient_accumulation_steps  # of all processes together
        self.data: Prepared = prepare(config, find_task, self.processes)
        self.progress = checkpoint.Progress()
        self.stop = StopBetweenSteps(self.processes)
        self.saved: tuple[int, Path] | None = None  # step and folder of the last checkpoint

    def check_processes(self) -> None:
        """Raise ValueError if several processes were started and have not met: each would train alone."""
        if (started := started_processes()) != self.processes.count:
            raise ValueError(
                f"WORLD_SIZE={started}, but {self.processes.count} process has joined: call "
                "lota.distributed.processes.join() first, or unset the variable"
            )
        if not self.processes.first:
            hf_logging.disable_progress_bar()

    # Where weights live

    def load_model(
        self, archive: str | Path | None, dtype: torch.dtype, key: str = "archive"
    ) -> PreTrainedModel:
        """The model with the weights of `archive`, None: of model.name_or_path.

        key: the setting whose model this is, `archive` or `reference_archive`.
        """
        return load_run_model(self.config, self.data.tokenizer, archive, dtype, self.device)

    def snip_sharder(self) -> Shard | None:
        """See `SnipMask.compute`."""
        return None

    def saved_model(self) -> SavedModel:
        """The whole model as a checkpoint stores it."""
        dtype = dtype_of(self.config.model.policy_dtype)
        base = self.base() if self.working_dtype.itemsize < dtype.itemsize else None
        if self.lora is not None:
            return lora.saved_model(self.model, dtype, base)
        return saved_model(self.model, self.optimizer, dtype, base)

    def base(self) -> Source:
        """`stored_base`, or what this process holds of it."""
        return self.stored_base()

    def stored_base(self) -> WeightSource:
        """The weights that training starts from, on disk."""
        return open_weights(self.config.model.archive or self.config.model.name_or_path, self.data.skeleton)

    @property
    def working_dtype(self) -> torch.dtype:
        """bf16 if model.fsdp_policy_mp=bfloat16 and what trains is held in fp32 beside the weights (a mask's
        masters, LoRA's matrices), else policy_dtype.
        """
        beside = self.data.mask is not None or self.config.adapter.name == "lora"
        narrow = beside and self.config.model.fsdp_policy_mp == "bfloat16"
        return torch.bfloat16 if narrow else dtype_of(self.config.model.policy_dtype)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """Autocast for dense training and LoRA in mixed precision."""
        if self.data.mask is None and self.config.model.fsdp_policy_mp == "bfloat16":
            # each weight is used once in a forward pass: a cache of narrow copies only keeps them all
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        return contextlib.nullcontext()

    @property
    def n_trained(self) -> int:
        """Entries that train, in all processes."""
        return self.optimizer.n_trained

    def refuse_difference(self) -> None:
        """Raise ValueError unless all processes hold the same weights and trained values."""
        refuse_difference(
            dict(self.model.named_parameters()), self.optimizer, self.processes, self.progress.step
        )

    # Setup

    def load(self) -> None:
        """Model, optimizer and objective as training starts, or as the checkpoint has left them."""
        config, resumable = self.config, self.data.resumable
        add_snip_mask(self.data, config, self.device, self.stop.check, self.processes, self.snip_sharder())
        set_seed(config.seed)  # of torch, NumPy and Python: all of them are stored in checkpoints
        archive: str | Path | None = config.model.archive
        if resumable is not None and config.adapter.name != "lora":  # which has the base and its adapter
            archive = checkpoint.weights_of(resumable.folder)
        self.model = self.load_model(archive, self.working_dtype)
        self.lora = lora.adapt(self.model, config, resumable.folder if resumable else None)
        if config.activation_checkpointing:
            enable_activation_checkpointing(self.model)
        self.model.train()
        self.optimizer = self.make_optimizer()
        checkpoint.own_random_numbers(config.seed, self.processes.rank)
        if resumable is None and self.working_dtype != torch.float32:
            checkpoint.fill_masters(self.optimizer, self.base())
        self.pull()
        if resumable is not None:
            self.restore_optimizer(resumable)
            self.progress = checkpoint.restore(resumable.content, self.processes.rank)
            self.saved = (self.progress.step, resumable.folder)
        self.objective = OBJECTIVES[config.loss.name](config, self.data.tokenizer, self.model, self.precision)
        self.objective.start(self)
        order = batch_order(config, len(self.data.train), self.data.lengths)
        sizes = [len(batch.rows) for batch in order]
        self.total_steps, self.total_examples = len(sizes), sum(sizes)
        if config.compile:
            self.compile_model()

    def make_optimizer(self) -> MaskedOptimizer:
        """The optimizer at its start, fused into the backward pass."""
        config = self.config
        optimizer = OPTIMIZERS[config.optimizer](self.model, self.data.mask, **config.optimizer_settings)
        self.unfuse = fuse_in_backward(optimizer, config.gradient_accumulation_steps)
        if self.processes.count > 1:
            optimizer.peers = Replicated(optimizer, self.processes)
        return optimizer

    def pull(self) -> None:
        """Let the optimizer pull what it trains to where it stands, if the run wants that."""
        config, listed = self.config, self.data.importance
        if config.l2_sp or config.ewc:
            pull_to_start(self.optimizer, config.l2_sp, config.ewc, listed.values if listed else None)

    def restore_optimizer(self, resumable: Resumable) -> None:
        """Set the optimizer to what a checkpoint holds."""
        self.optimizer.load_state_dict(resumable.content["optimizer"])

    def compile_model(self) -> None:
        """Compile the blocks, for the sizes of the run's first batch wherever it continues.

        Whatever the compiler chooses by sizes is then the same in a run that was interrupted.
        """
        compile_blocks(self.model)
        order = batch_order(self.config, len(self.data.train), self.data.lengths)
        first = [self.data.train[i] for i in next(iter(order)).rows]
        with torch.random.fork_rng():  # of LoRA's dropout
            part = self.processes.share(first[: self.part_size])
            self.objective.losses(self.objective.batch(part))
