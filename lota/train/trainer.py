"""The training loop, from the first batch to the last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed

from lota.config import Config
from lota.config_checks import unused_settings
from lota.data.batches import Batch, Example, ScheduledBatch, batch_order
from lota.data.task import FindTask
from lota.models.loading import dtype_of, enable_activation_checkpointing
from lota.models.weights import WeightSource, open_weights
from lota.optim.compiled import compile_blocks
from lota.optim.fused import fuse_in_backward
from lota.optim.optimizers import OPTIMIZERS, learning_rate
from lota.storage import write_json
from lota.system import peak_memory_bytes, reset_peak_memory, versions
from lota.train import checkpoint, lora
from lota.train.interrupt import Interrupted, StopBetweenSteps
from lota.train.objectives import OBJECTIVES
from lota.train.preflight import Prepared, add_snip_mask, prepare
from lota.train.run_model import load_run_model
from lota.train.runlog import Meter, RunLog

logger = logging.getLogger(__name__)


class Trainer:
    """One run: `Trainer(config, find_task).train()`. Everything that can be checked before the model loads is
    checked by the constructor.
    """

    def __init__(self, config: Config, find_task: FindTask):
        self.check_processes()
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for line in unused_settings(config).values():
            logger.info("not used here: %s", line)
        self.data: Prepared = prepare(config, find_task)
        self.progress = checkpoint.Progress()
        self.stop = StopBetweenSteps()
        self.meter = Meter()
        self.saved: tuple[int, Path] | None = None  # step and folder of the last checkpoint
        self.metrics: dict[str, float] = {}  # the newest value of each key of metrics.jsonl

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
            return lora.merged_state(self.model, dtype, base)
        return checkpoint.policy_state(self.model, self.optimizer, dtype, base)

    def base(self) -> WeightSource:
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
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    # Setup

    def load(self) -> None:
        """Model, optimizer and objective as training starts, or as the checkpoint has left them."""
        config, resumable = self.config, self.data.resumable
        add_snip_mask(self.data, config, self.device, self.stop.check)
        set_seed(config.seed)  # of torch, NumPy and Python: all of them are stored in checkpoints
        archive: str | Path | None = config.model.archive
        if resumable is not None and config.adapter.name != "lora":  # which has the base and its adapter
            archive = resumable.folder / checkpoint.POLICY
        self.model = load_run_model(config, self.data.tokenizer, archive, self.working_dtype, self.device)
        self.lora = lora.adapt(self.model, config, resumable.folder if resumable else None)
        if config.activation_checkpointing:
            enable_activation_checkpointing(self.model)
        self.model.train()
        settings = config.optimizer_settings
        self.optimizer = OPTIMIZERS[config.optimizer](self.model, self.data.mask, **settings)
        fuse_in_backward(self.optimizer, config.gradient_accumulation_steps)
        if resumable is not None:
            self.progress = checkpoint.restore(resumable.content, self.optimizer)
            self.saved = (self.progress.step, resumable.folder)
        elif self.working_dtype != torch.float32:
            checkpoint.fill_masters(self.optimizer, self.base())
        self.objective = OBJECTIVES[config.loss.name](config, self.data.tokenizer, self.model, self.precision)
        self.objective.start(self)
        order = batch_order(config, len(self.data.train), self.data.lengths)
        sizes = [len(batch.rows) for batch in order]
        self.total_steps, self.total_examples = len(sizes), sum(sizes)
        self.part_size = config.batch_size // config.gradient_accumulation_steps
        if config.compile:
            self.compile_model()

    def compile_model(self) -> None:
        """Compile the blocks, for the sizes of the run's first batch wherever it continues.

        Whatever the compiler chooses by sizes is then the same in a run that was interrupted.
        """
        compile_blocks(self.model)
        order = batch_order(self.config, len(self.data.train), self.data.lengths)
        first = [self.data.train[i] for i in next(iter(order)).rows]
        with torch.random.fork_rng():  # of LoRA's dropout
            self.objective.losses(next(self.parts(first, self.part_size)))

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """The model loaded and the log open; what a run that is asked to stop has learnt is saved."""
        reset_peak_memory(self.device)
        self.load()
        write_json(self.folder.path / "versions.json", versions(self.device))
        if self.data.resumable is not None:
            logger.info("continuing %s after %d examples", self.data.resumable.folder, self.progress.examples)
        self.log = RunLog(self.config, self.folder.path, self.total_examples, self.progress.examples)
        try:
            yield
        except Interrupted:
            if self.progress.step == 0:
                logger.info("stopped before the first step: there is nothing to save")
            else:
                logger.info("stopped; saved %s. The same command resumes.", self.save())
            raise
        finally:
            self.log.close()

    # The loop

    def train(self) -> Path | None:
        """Run to the end; returns the last checkpoint. Raises Interrupted after saving when asked to stop."""
        resumable = self.data.resumable
        if resumable is not None and resumable.finished:
            done = "%s is already finished: %s (overwrite=true starts anew)"
            logger.info(done, self.config.run_dir, resumable.folder)
            return resumable.folder
        last = None
        with self.stop, self.data.folder as self.folder, self.loaded():
            first = self.config.do_first_eval and self.progress.step == 0
            if first or self.progress.evaluation_owed:
                self.evaluate()
            self.meter.reset()
            for batch in self.batches():
                self.set_learning_rate()
                examples = [self.data.train[i] for i in batch.rows]
                for part in self.parts(examples, self.part_size):
                    (self.loss(part, self.meter) / len(examples)).backward()
                self.optimizer.step()  # what had to wait for the end of the backward pass
                self.progress.advance(batch, self.total_steps)
                self.log_step(batch)
                with self.meter.paused():
                    if self.evaluation_is_due(batch):
                        self.evaluate()
                    if self.checkpoint_is_due(batch):
                        last = self.save()
                if not self.progress.finished:
                    self.stop.check()
        return last

    def batches(self) -> Iterator[ScheduledBatch]:
        """The batches still to come."""
        now = self.progress
        start = None if now.step == 0 else now.batch
        return batch_order(
            self.config, len(self.data.train), self.data.lengths, now.epoch, start, now.examples
        )

    def set_learning_rate(self) -> None:
        self.lr = learning_rate(
            self.progress.step,
            peak=self.config.lr,
            scheduler=self.config.lr_scheduler,
            warmup_steps=self.config.warmup_steps,
            total_steps=self.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def parts(self, examples: Sequence[Example], size: int) -> Iterator[Batch]:
        """The examples as tensors, `size` at a time."""
        for start in range(0, len(examples), size):
            yield self.objective.batch(examples[start : start + size])

    def loss(self, part: Batch, meter: Meter) -> Tensor:
        """The sum over the part's examples; what the log shows joins the meter."""
        losses, sums = self.objective.losses(part)
        meter.add(sums, examples=len(losses), tokens=part.n_tokens)
        return losses.sum()

    # Evaluation and logging

    def evaluation_is_due(self, batch: ScheduledBatch) -> bool:
        due = self.progress.finished or self._crossed(batch, self.config.eval_every)
        return due and bool(self.data.held_out)

    def _crossed(self, batch: ScheduledBatch, every: int) -> bool:
        """Whether this batch brought the number of examples to a multiple of `every`, or across one."""
        now = self.progress.examples
        return now // every > (now - len(batch.rows)) // every

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss (and samples) into metrics.jsonl; an example counts the same in whichever batch it
        is.
        """
        self.progress.evaluation_owed = True  # a stop saves this; the run that continues begins with it
        self.model.eval()
        meter = Meter()
        for part in self.parts(self.data.held_out, self.config.eval_batch_size):
            self.loss(part, meter)
            if not self.progress.finished:  # the last evaluation is part of a finished run
                self.stop.check()
        metrics = self.objective.metrics(meter, "eval")
        self.write(metrics)
        shown = ", ".join(f"{key} {metrics[key]:.4f}" for key in self.objective.headline)
        logger.info("held-out after %d examples: %s", self.progress.examples, shown)
        if self.config.sample_during_eval:
            examples = self.data.held_out[: self.config.n_eval_model_samples]
            self.log.samples(self.progress.examples, self.objective.complete(examples, self.data.stop))
        self.model.train()
        self.progress.evaluation_owed = False

    def log_step(self, batch: ScheduledBatch) -> None:
        """Move the bar; write a line when enough time has passed, and for the first and last step."""
        self.log.bar.update(len(batch.rows))
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
        """Write a line of metrics.jsonl."""
        line = {"examples": self.progress.examples, "step": self.progress.step, **metrics}
        line["trained_entries"] = self.optimizer.n_trained
        line["peak_memory_bytes"] = peak_memory_bytes(self.device)
        self.metrics |= line
        self.log.log(line)

    # Checkpoints

    def checkpoint_is_due(self, batch: ScheduledBatch) -> bool:
        unit, every = self.config.save_interval
        if self.progress.finished:
            return True
        if unit == "epoch":
            return batch.last_of_epoch and self.progress.epoch % every == 0
        return self._crossed(batch, every)

    def save(self) -> Path | None:
        """Write the checkpoint of this moment: epoch-N/ at the end of an epoch, else step-<examples>/."""
        if self.config.debug:
            return None
        if self.saved is not None and self.saved[0] == self.progress.step:
            return self.saved[1]  # a stop right after a checkpoint
        by_epoch = self.config.save_interval[0] == "epoch"
        folder = self.config.run_dir / self.progress.folder_name(by_epoch)
        if not all(self.optimizer.exact_values(p).isfinite().all() for p in self.optimizer.names):
            self.check_finite(math.nan)

        def write_more(temporary: Path) -> None:
            lora.save(self.lora, temporary)
            if self.config.save_delta:
                checkpoint.save_delta(self.config, self.data.mask, temporary, folder)

        self.stop.saving = True
        self.log.flush()  # a checkpoint never outlives the lines before it
        checkpoint.save(
            folder,
            state=self.gather_state(),
            optimizer=self.optimizer,
            progress=self.progress,
            metrics=self.metrics,
            seen=self.data.seen,
            write_more=write_more,
        )
        self.folder.keep()
        self.stop.saving = False
        self.saved = (self.progress.step, folder)
        return folder
