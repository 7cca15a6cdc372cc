"""The training loop, from the first batch to the last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.config import Config
from lota.data.batches import Example, ScheduledBatch, batch_order
from lota.data.task import FindTask
from lota.optim.optimizers import learning_rate
from lota.storage import write_json
from lota.system import peak_memory_bytes, reset_peak_memory, versions
from lota.train import checkpoint, lora
from lota.train.interrupt import Interrupted
from lota.train.loaded_run import LoadedRun
from lota.train.runlog import Meter, NoLog, RunLog
from lota.train.saved_model import folder_like, folder_order

logger = logging.getLogger(__name__)


class Trainer(LoadedRun):
    """One run: `Trainer(config, find_task).train()`, on one or several processes.

    All processes go through the same batches in the same order; each computes its share of every part of a
    batch, and the first one writes.
    """

    log: RunLog | NoLog

    def __init__(self, config: Config, find_task: FindTask):
        super().__init__(config, find_task)
        self.meter = Meter()
        self.metrics: dict[str, float] = {}  # the newest value of each key of metrics.jsonl

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """The model loaded and the log open; what a run that is asked to stop has learnt is saved."""
        reset_peak_memory(self.device)
        self.load()
        if self.data.resumable is not None:
            logger.info("continuing %s after %d examples", self.data.resumable.folder, self.progress.examples)
        self.log = NoLog()
        if self.processes.first:
            write_json(self.folder.path / "versions.json", versions(self.device, self.processes.count))
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
            self.unfuse()

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
                self.learn([self.data.train[i] for i in batch.rows])
                self.optimizer.step()  # what had to wait for the end of the backward pass
                self.progress.advance(batch, self.total_steps)
                asked, due = self.agree()
                self.log_step(batch, due)
                with self.meter.paused():
                    if self.comparison_is_due():
                        self.refuse_difference()
                    if self.evaluation_is_due(batch):
                        self.evaluate()
                    if self.checkpoint_is_due(batch):
                        last = self.save()
                if not self.progress.finished:
                    self.stop.settle(asked)
        return last

    def learn(self, examples: Sequence[Example]) -> None:
        """Backward through this process's share of each part of a batch; it may have none of the last."""
        for start in range(0, len(examples), self.part_size):
            whole = examples[start : start + self.part_size]
            if part := self.processes.share(whole):
                (self.loss(part, self.meter) / len(examples)).backward()
            else:
                self.idle(whole)

    def idle(self, examples: Sequence[Example]) -> None:
        """Called where other processes compute with the model and this one has no share of the examples."""

    def agree(self) -> list[bool]:
        """Whether any process was asked to stop, and whether the first wants to write a line."""
        stop = self.stop.received is not None
        return self.processes.any_of(stop, self.processes.first and self.line_is_due())

    def comparison_is_due(self) -> bool:
        """Whether processes compare what they hold."""
        every = self.config.compare_every
        due = self.progress.finished or (every is not None and self.progress.step % every == 0)
        return self.processes.count > 1 and due

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

    def loss(self, part: Sequence[Example], meter: Meter) -> Tensor:
        """The sum over the part's examples; what the log shows joins the meter."""
        batch = self.objective.batch(part)
        losses, sums = self.objective.losses(batch)
        meter.add(sums, examples=len(losses), tokens=batch.n_tokens)
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
        meter = self.held_out_meter().summed(self.processes)
        metrics = self.objective.metrics(meter, "eval")
        self.write(metrics)
        shown = ", ".join(f"{key} {metrics[key]:.4f}" for key in self.objective.headline)
        logger.info("held-out after %d examples: %s", self.progress.examples, shown)
        if self.config.sample_during_eval:
            examples = self.data.held_out[: self.config.n_eval_model_samples]
            self.log.samples(self.progress.examples, self.completions(examples))
        self.model.train()
        self.progress.evaluation_owed = False

    def held_out_meter(self) -> Meter:
        """Of this process's share of the held-out examples, batch by batch."""
        meter, size = Meter(), self.config.eval_batch_size
        held_out = self.data.held_out
        parts = [held_out[start : start + size] for start in range(0, len(held_out), size)]
        own = self.processes.share(parts)
        for at in range(-(-len(parts) // self.processes.count)):  # all processes check as often
            if at < len(own):
                self.loss(own[at], meter)
            else:
                self.idle(parts[0])
            if not self.progress.finished:  # the last evaluation is part of a finished run
                self.stop.check()
        return meter

    def completions(self, examples: Sequence[Example]) -> list[dict[str, str]]:
        """Of the examples' prompts, in their order; each process makes its share."""
        part = self.processes.share(examples)
        return self.processes.unshare(self.objective.complete(part, self.data.stop) if part else [])

    def line_is_due(self) -> bool:
        """Whether to write a line: for the first and the last step, and when enough time has passed."""
        passed = self.meter.seconds >= self.config.minimum_log_interval_secs
        return passed or self.progress.step == 1 or self.progress.finished

    def log_step(self, batch: ScheduledBatch, due: bool) -> None:
        """Move the bar; write a line if one is due."""
        self.log.advance(len(batch.rows))
        if not due:
            return
        meter = self.meter.summed(self.processes)
        metrics = self.objective.metrics(meter, "train")
        self.write(metrics | {"grad_norm": self.optimizer.grad_norm, "lr": self.lr} | meter.rates())
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
        line["trained_entries"] = self.n_trained
        line["peak_memory_bytes"] = max(self.processes.gather(peak_memory_bytes(self.device)))
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
        self.stop.saving = True
        self.write_checkpoint(folder, self.processes.gather(checkpoint.random_state()))
        self.processes.barrier()  # nobody goes on, or ends, before it is whole
        self.stop.saving = False
        self.saved = (self.progress.step, folder)
        return folder

    def write_checkpoint(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        """The first process writes; the others wait."""
        if not self.processes.first:
            return

        def write_more(temporary: Path) -> None:
            lora.save(self.lora, temporary)
            if self.config.save_delta:
                checkpoint.save_delta(self.config, self.data.mask, temporary, folder)

        self.log.flush()  # a checkpoint never outlives the lines before it
        checkpoint.save(
            folder,
            write_state=self.write_state,
            progress=self.progress,
            seen=self.data.seen,
            random_states=random_states,
            write_more=write_more,
        )
        self.folder.keep()

    def write_state(self, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        """Write what a checkpoint holds of the model; returns known checksums, and the optimizer's state."""
        return self.write_weights(folder), self.optimizer.state_dict()

    def write_weights(self, folder: Path) -> dict[str, str]:
        """Write policy.pt or the files of a Hugging Face folder; returns checksums that are known then.

        Processes that hold a part of the model call it with the first one, and write nothing.
        """
        saved, writes = self.saved_model(), self.processes.first
        if self.config.save_format == "folder":
            like, skeleton = folder_like(self.config), self.data.skeleton
            if writes:
                saved.write_folder(folder, like, skeleton, self.config.model.tokenizer_name_or_path)
            else:
                saved.contribute(folder_order(like, skeleton))
            return {}
        if writes:
            path = folder / checkpoint.POLICY
            return {checkpoint.POLICY: saved.write_policy(path, self.progress.step, self.metrics)}
        saved.contribute(saved.parameters())
        return {}
