"""The training loop, from the first batch to the last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.config import Config
from lota.config_checks import unused_settings
from lota.data.batches import Example, batch_order
from lota.models.loading import dtype_of, enable_activation_checkpointing, load_model
from lota.models.scope import meta_model
from lota.models.weights import WeightSource, open_weights
from lota.optim.fused import fuse_in_backward
from lota.optim.masked import MaskedOptimizer
from lota.optim.optimizers import OPTIMIZERS
from lota.optim.schedule import learning_rate
from lota.system import peak_memory_bytes, reset_peak_memory
from lota.train import lora as adapter
from lota.train.checkpoint import Progress, fill_masters, policy_state, save_checkpoint, set_random_state
from lota.train.interrupt import Interrupted, StopBetweenSteps
from lota.train.objectives import OBJECTIVES
from lota.train.preflight import add_snip_mask, prepare
from lota.train.prepared import Prepared
from lota.train.run_folder import RunFolder
from lota.train.runlog import Meter, open_log, write_versions
from lota.train.save_delta import save_delta

logger = logging.getLogger(__name__)


class Trainer:
    """One run: `Trainer(config, find_task).train()`. What can be refused is refused before the model
    loads.
    """

    def __init__(self, config: Config, find_task: Callable[[str], Any]):
        self.check_processes()
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for line in unused_settings(config):
            logger.info("not used here: %s", line)
        self.data: Prepared = prepare(config, find_task)
        self.progress = Progress()
        self.stop = StopBetweenSteps()
        self.metrics: dict[str, float] = {}

    # Where weights live

    def check_processes(self) -> None:
        """Raise ValueError when several processes were started and this trainer cannot use them."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: trainer={type(self).__name__} runs in one process; "
                "start it with `python train_single_gpu.py`, without torchrun"
            )

    def gather_state(self) -> dict[str, Tensor]:
        """The whole model as policy.pt stores it."""
        dtype = dtype_of(self.config.model.policy_dtype)
        base = self.base() if self.working_dtype.itemsize < dtype.itemsize else None
        if self.lora is not None:
            return adapter.merged_state(self.model, dtype, base)
        return policy_state(self.model, self.optimizer, dtype, base)

    def base(self) -> WeightSource:
        """The weights that training starts from, on disk."""
        model = self.config.model
        plain = self.model if self.lora is None else meta_model(model.name_or_path)
        return open_weights(model.archive or model.name_or_path, plain)

    @property
    def working_dtype(self) -> torch.dtype:
        """bf16 weights where model.fsdp_policy_mp=bfloat16 and what trains is held in fp32 beside them (a
        mask's masters, LoRA's matrices), else policy_dtype.
        """
        beside = self.data.mask is not None or self.config.adapter.name == "lora"
        narrow = beside and self.config.model.fsdp_policy_mp == "bfloat16"
        return torch.bfloat16 if narrow else dtype_of(self.config.model.policy_dtype)

    def precision(self) -> contextlib.AbstractContextManager:
        """Autocast for dense training and LoRA in mixed precision."""
        if self.data.mask is None and self.config.model.fsdp_policy_mp == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    # Setup

    def load(self) -> None:
        """Model, optimizer and position: from the base, or from the checkpoint that is continued."""
        config, resumable = self.config, self.data.resumable
        torch.manual_seed(config.seed)
        self.model = load_model(
            config.model.name_or_path,
            archive=self._archive(),
            dtype=self.working_dtype,
            device=self.device,
            pad_token=config.model.pad_token,
            tokenizer=self.data.tokenizer,
        )
        self.lora = adapter.adapt(self.model, config, resumable.folder if resumable else None)
        if config.activation_checkpointing:
            enable_activation_checkpointing(self.model)
        self.model.train()
        settings = config.optimizer_settings
        self.optimizer: MaskedOptimizer = OPTIMIZERS[config.optimizer](self.model, self.data.mask, **settings)
        fuse_in_backward(self.optimizer, config.gradient_accumulation_steps)
        if resumable is None:
            if self.working_dtype != torch.float32:
                fill_masters(self.optimizer, self.base())
        else:
            self.optimizer.load_state_dict(resumable.content["optimizer"])
            self.progress = Progress(**resumable.content["progress"])
            set_random_state(resumable.content["random"])
        objective = OBJECTIVES[config.loss.name]
        self.objective = objective(config, self.data.tokenizer, self.model, self.precision)
        self.objective.start(self)
        n_rows, lengths = len(self.data.train), self.data.lengths
        batches = [len(rows) for *_, rows in batch_order(config, n_rows, lengths)]
        self.total_steps, self.total_examples = len(batches), sum(batches)

    def _archive(self) -> str | Path | None:
        """Weights to load instead of the base's; LoRA continues from the base and the saved adapter."""
        if self.data.resumable is None or self.config.adapter.name == "lora":
            return self.config.model.archive
        return self.data.resumable.folder / "policy.pt"

    # The loop

    def train(self) -> Path | None:
        """Run to the end; returns the last checkpoint. Raises Interrupted after saving when asked to stop."""
        config, resumable = self.config, self.data.resumable
        if resumable is not None and resumable.finished:
            done = "%s is already finished: %s (overwrite=true starts anew)"
            logger.info(done, config.run_dir, resumable.folder)
            return resumable.folder
        with self.stop, RunFolder(config, replaces=resumable is None) as self.folder:
            reset_peak_memory(self.device)
            if self.data.snip is not None:
                add_snip_mask(self.data, self.config, self.device, self.stop.check)
            self.load()
            write_versions(self.folder.path, self.device)
            if resumable is not None:
                logger.info("continuing %s after %d examples", resumable.folder, self.progress.examples)
            self.log = open_log(config, self.folder.path, self.total_examples, self.progress.examples)
            try:
                return self._run()
            except Interrupted:
                self._save_before_stopping()
                raise
            finally:
                self.log.close()

    def _save_before_stopping(self) -> None:
        if self.progress.step == 0:
            logger.info("stopped before the first step: there is nothing to save")
            return
        logger.info("stopped; saved %s. Give the same command again to continue.", self.save())

    def _run(self) -> Path | None:
        config, progress = self.config, self.progress
        folder = None
        if config.do_first_eval and progress.step == 0:
            self.evaluate()
        self.meter = Meter()
        start = None if progress.step == 0 else progress.batch
        batches = batch_order(
            config, len(self.data.train), self.data.lengths, progress.epoch, start, progress.examples
        )
        for epoch, index, last_of_epoch, rows in batches:
            before = progress.examples
            self.step([self.data.train[i] for i in rows])
            progress.advance(epoch, index, last_of_epoch, len(rows))
            progress.finished = progress.step == self.total_steps
            self.log_step(len(rows))
            with self.meter.paused():
                if self._crossed(before, config.eval_every) or (progress.finished and self.data.held_out):
                    self.evaluate()
                if progress.finished or self._save_is_due(before, last_of_epoch):
                    folder = self.save()
            if not progress.finished:
                self.stop.check()
        return folder

    def step(self, examples: Sequence[Example]) -> None:
        """One optimizer step: learning rate, then backward for each part of the batch, which also updates."""
        self.set_learning_rate()
        size = self.config.batch_size // self.config.gradient_accumulation_steps
        for start in range(0, len(examples), size):
            batch = self.objective.batch(examples[start : start + size])
            losses, sums = self.objective.losses(batch)
            (losses.sum() / len(examples)).backward()
            self.meter.add(sums, examples=len(losses), tokens=batch.n_tokens)
        self.optimizer.step()

    def set_learning_rate(self) -> None:
        config = self.config
        self.lr = learning_rate(
            self.progress.step,
            peak=config.lr,
            scheduler=config.lr_scheduler,
            warmup_steps=config.warmup_steps,
            total_steps=self.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    # Evaluation and logging

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss (and samples) into metrics.jsonl; an example counts the same in whichever batch it
        is.
        """
        self.model.eval()
        meter = Meter()
        size = self.config.eval_batch_size
        for start in range(0, len(self.data.held_out), size):
            batch = self.objective.batch(self.data.held_out[start : start + size])
            losses, sums = self.objective.losses(batch)
            meter.add(sums, examples=len(losses), tokens=batch.n_tokens)
            if not self.progress.finished:  # the last evaluation is part of a finished run
                self.stop.check()
        metrics = self.objective.metrics(meter, "eval")
        self.write(metrics)
        told = ", ".join(f"{key} {metrics[key]:.4f}" for key in self.objective.headline)
        logger.info("held-out after %d examples: %s", self.progress.examples, told)
        if self.config.sample_during_eval:
            examples = self.data.held_out[: self.config.n_eval_model_samples]
            self.log.samples(self.progress.examples, self.objective.complete(examples, self.data.stop))
        self.model.train()

    def log_step(self, examples: int) -> None:
        """Move the bar; write a line when enough time has passed, and for the first and last step."""
        self.log.advance(examples)
        due = self.meter.seconds >= self.config.minimum_log_interval_secs
        if not (due or self.progress.step == 1 or self.progress.finished):
            return
        metrics = self.objective.metrics(self.meter, "train")
        self.write(metrics | {"grad_norm": self.optimizer.grad_norm, "lr": self.lr} | self.meter.rates())
        self.meter.reset()
        self.check_finite(metrics["loss/train"])

    def check_finite(self, loss: float) -> None:
        """Raise ValueError when training has diverged."""
        if not math.isfinite(loss):
            raise ValueError(
                f"the training loss is {loss} after {self.progress.examples} examples: lower "
                f"lr={self.config.lr} or max_grad_norm; the last checkpoint is as it was"
            )

    def write(self, metrics: dict[str, float]) -> None:
        line = {"examples": self.progress.examples, "step": self.progress.step, **metrics}
        line["trained_entries"] = self.optimizer.n_trained
        line["peak_memory_bytes"] = peak_memory_bytes(self.device)
        self.metrics |= line
        self.log.log(line)

    # Checkpoints

    def _crossed(self, before: int, every: int) -> bool:
        return bool(self.data.held_out) and self.progress.examples // every > before // every

    def _save_is_due(self, before: int, last_of_epoch: bool) -> bool:
        unit, every = self.config.save_interval
        if unit == "epoch":
            return last_of_epoch and self.progress.epoch % every == 0
        return self.progress.examples // every > before // every

    def save(self) -> Path | None:
        """Write the checkpoint of this moment: epoch-N/ at the end of an epoch, else step-<examples>/."""
        if self.config.debug:
            return None
        by_epoch = self.config.save_interval[0] == "epoch"
        folder = self.config.run_dir / self.progress.folder_name(by_epoch)
        if not all(values.isfinite().all() for _, _, values in self.optimizer.kept_values()):
            self.check_finite(math.nan)
        self.stop.saving = True
        save_checkpoint(
            folder,
            state=self.gather_state(),
            optimizer=self.optimizer,
            progress=self.progress,
            metrics=self.metrics,
            seen=self.data.seen,
            more=partial(self.save_more, folder),
        )
        self.folder.keep()
        self.stop.saving = False
        return folder

    def save_more(self, name: Path, folder: Path) -> None:
        """What lies beside policy.pt in `folder`, which will be called `name`."""
        adapter.save(self.lora, folder)
        if self.config.save_delta:
            save_delta(self.config, self.data.mask, folder, name)
