"""What a run writes as it trains: progress bar, metrics.jsonl, samples.jsonl, wandb if it is enabled."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from lota.config import Config
from lota.distributed.processes import Processes
from lota.places import fsync
from lota.storage import cut, naming, whole_lines

logger = logging.getLogger(__name__)
T = TypeVar("T", torch.Tensor, float, torch.Tensor | float)


class RunLog:
    """Metrics of one run: a line of JSON per call of `log`, a progress bar, and wandb if it is enabled.

    examples: examples seen when the run starts; lines beyond it, written by a run that was killed after its
    last checkpoint, are cut off. Otherwise lines are only ever appended.
    """

    def __init__(self, config: Config, folder: Path, total_examples: int, examples: int):
        self.path, self.samples_path = folder / "metrics.jsonl", folder / "samples.jsonl"
        _drop_lines_after(self.path, examples)
        _drop_lines_after(self.samples_path, examples)
        name = config.exp_name
        self.bar = tqdm(total=total_examples, initial=examples, unit="ex", desc=name, dynamic_ncols=True)
        self.wandb = _start_wandb(config, folder) if config.wandb.enabled and not config.debug else None

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line; values are Python numbers."""
        self._append(self.path, [metrics])
        if self.wandb is not None:
            self.wandb.log(metrics)
        if "loss/train" in metrics:
            self.bar.set_postfix(
                {
                    "loss": f"{metrics['loss/train']:.3f}",
                    "lr": f"{metrics['lr']:.1e}",
                    "tok/s": f"{metrics['tokens_per_second']:.0f}",
                    "mem": f"{metrics['peak_memory_bytes'] / 2**30:.2f}G",
                },
                refresh=False,
            )

    def samples(self, examples: int, rows: list[dict[str, Any]]) -> None:
        """Append completions of held-out prompts."""
        self._append(self.samples_path, [{"examples": examples, **row} for row in rows])

    def _append(self, path: Path, lines: Iterable[dict[str, Any]]) -> None:
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def advance(self, examples: int) -> None:
        """Move the bar."""
        self.bar.update(examples)

    def flush(self) -> None:
        """Let what was written so far outlive a power cut."""
        for path in (self.path, self.samples_path):
            if path.is_file():
                fsync(path)
        fsync(self.path.parent)

    def close(self) -> None:
        self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()


class NoLog:
    """The log of a process that writes none."""

    def log(self, metrics: dict[str, Any]) -> None: ...
    def samples(self, examples: int, rows: list[dict[str, Any]]) -> None: ...
    def advance(self, examples: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def _start_wandb(config: Config, folder: Path) -> Any:
    import wandb  # optional, and slow to import

    try:
        return wandb.init(
            entity=config.wandb.entity,
            project=config.wandb.project,
            mode=config.wandb.mode,  # type: ignore[arg-type]  # one of its choices, by the settings' check
            name=config.exp_name,
            dir=str(folder),
            config=asdict(config),
        )
    except wandb.Error as error:
        raise ValueError(
            f"wandb.enabled=true: {error}. Log in with `wandb login`, or set wandb.mode=offline"
        ) from error


def _drop_lines_after(path: Path, examples: int) -> None:
    """Cut off the lines of later steps, and the line that was being written when the run was killed.

    What stands before the first line of a later step stays, also lines that are no lines of a log.
    """
    if not path.is_file():
        return
    kept = 0
    for end, line in whole_lines(path) if examples else ():  # a run that starts anew has no line
        if _examples(line) > examples:
            break
        kept = end
    cut(path, kept)


def _examples(line: bytes) -> float:
    """The examples seen at a line of the log; 0 for what is no such line."""
    try:
        found = json.loads(line)["examples"]
        return found if isinstance(found, int) else 0
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0


class Meter:
    """Averages between two lines of the log; sums stay on the device until they are read."""

    sums: Mapping[str, torch.Tensor | float]

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started = time.perf_counter()
        self.sums = {}
        self.examples = 0
        self.tokens = 0

    def add(self, sums: dict[str, torch.Tensor], *, examples: int, tokens: int) -> None:
        """sums: each over these examples, detached; tokens: all tokens without padding."""
        self.sums = _added(self.sums, sums)
        self.examples += examples
        self.tokens += tokens

    def summed(self, processes: Processes) -> Meter:
        """What all processes have added together; the time is the first one's."""
        own = {name: float(value) for name, value in self.sums.items()}
        found = processes.gather((own, self.examples, self.tokens, self.seconds))
        together = Meter()
        for sums, examples, tokens, _ in found:
            together.sums = _added(together.sums, sums)
            together.examples += examples
            together.tokens += tokens
        together.started = time.perf_counter() - found[0][3]
        return together

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


def _added(a: Mapping[str, T], b: Mapping[str, T]) -> dict[str, T]:
    """Sums by name; a name may be missing on either side."""
    return {**a, **{name: a[name] + value if name in a else value for name, value in b.items()}}
