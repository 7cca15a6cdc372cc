"""What a run tells: console, progress bar, metrics.jsonl, samples.jsonl, and Weights & Biases if asked."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lota.config import Config
from lota.system import versions
from lota.utils import write_json

logger = logging.getLogger(__name__)


def to_console(level: int = logging.INFO) -> None:
    """Send the project's log messages to standard error, one plain line each."""
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("lota", "tasks", "trainers", "__main__"):
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.setLevel(level)
        log.propagate = False


class _TqdmHandler(logging.Handler):
    """Prints above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class RunLog:
    """Metrics of one run: a line of JSON per call of `log`, a progress bar, and wandb where enabled.

    examples: examples seen when the run starts; lines of metrics.jsonl beyond it, written by a run that was
    killed after its last checkpoint, are dropped.
    """

    def __init__(
        self, run_dir: Path, *, total_examples: int, examples: int = 0, wandb: Any = None, name: str = ""
    ):
        self.path = run_dir / "metrics.jsonl"
        self.samples_path = run_dir / "samples.jsonl"
        _keep_lines_until(self.path, examples)
        _keep_lines_until(self.samples_path, examples)
        self.bar = tqdm(total=total_examples, initial=examples, unit="ex", desc=name, dynamic_ncols=True)
        self.wandb = None
        if wandb is not None:
            self.wandb = _start_wandb(wandb, run_dir, name)
        self.last: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line; values are Python numbers."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        self.last |= metrics
        if self.wandb is not None:
            self.wandb.log(metrics)
        shown = {
            "loss": f"{metrics['loss/train']:.3f}" if "loss/train" in metrics else None,
            "lr": f"{metrics['lr']:.1e}" if "lr" in metrics else None,
            "tok/s": f"{metrics['tokens_per_second']:.0f}" if "tokens_per_second" in metrics else None,
            "mem": f"{metrics['peak_memory_bytes'] / 2**30:.2f}G" if "peak_memory_bytes" in metrics else None,
        }
        if shown["loss"]:
            self.bar.set_postfix({key: value for key, value in shown.items() if value}, refresh=False)

    def advance(self, examples: int) -> None:
        """Move the progress bar."""
        self.bar.update(examples)

    def samples(self, examples: int, rows: list[dict[str, Any]]) -> None:
        """Append completions of held-out prompts."""
        with self.samples_path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"examples": examples, **row}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()


def open_log(config: Config, folder: Path, total_examples: int, examples: int) -> RunLog:
    """The log of a run in `folder` that has seen `examples` of its examples."""
    wandb = None
    if config.wandb.enabled and not config.debug:
        wandb = {**asdict(config.wandb), "config": asdict(config)}
    return RunLog(folder, total_examples=total_examples, examples=examples, wandb=wandb, name=config.exp_name)


def _start_wandb(settings: dict[str, Any], run_dir: Path, name: str) -> Any:
    import wandb as client  # optional, and slow to import

    try:
        return client.init(
            entity=settings["entity"],
            project=settings["project"],
            mode=settings["mode"],
            name=name,
            dir=str(run_dir),
            config=settings["config"],
        )
    except client.Error as error:
        raise ValueError(
            f"wandb.enabled=true: {error}. Log in with `wandb login`, or set wandb.mode=offline"
        ) from error


def _keep_lines_until(path: Path, examples: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
        if row["examples"] <= examples:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def write_versions(run_dir: Path, device: torch.device) -> None:
    write_json(run_dir / "versions.json", versions(device))


class Meter:
    """Averages between two lines of the log; sums stay on the device until they are read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started = time.perf_counter()
        self.sums: dict[str, torch.Tensor] = {}
        self.examples = 0
        self.tokens = 0

    def add(self, sums: dict[str, torch.Tensor], *, examples: int, tokens: int) -> None:
        """sums: each over these examples, detached; tokens: all tokens without padding."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.examples += examples
        self.tokens += tokens

    def total(self, name: str) -> float:
        """Sum of what was added under this name."""
        return float(self.sums[name])

    def mean(self, name: str) -> float:
        """The same per example."""
        return self.total(name) / self.examples

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (an evaluation, a checkpoint) does not count as training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def rates(self) -> dict[str, float]:
        return {
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "examples_per_second": self.examples / max(self.seconds, 1e-9),
        }
