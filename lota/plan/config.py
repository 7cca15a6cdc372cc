"""Settings of a plan: those of the run, and what it is planned for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lota.config import Config
from lota.config_checks import dense_problem, problems_of, process_problems, started_processes
from lota.models.hub import is_hub_reference
from lota.settings import neutral

_plan = partial(neutral, None)


@dataclass
class PlanConfig(Config):
    """The keys of a training run, and those of the plan."""

    gpu_memory: float | None = _plan(
        "memory of the GPU in GiB; a run that needs more is told what to change, each change traced; null = "
        "nothing is asked",
        above=0,
    )
    processes: int = neutral(
        1,
        "that share the run: whole models with trainer=BasicTrainer, shards with FSDPTrainer",
        "processes",
        at_least=1,
    )
    sparsity: float | None = _plan(
        "frozen share of the scope of a mask that is not there yet; null = that of the mask file or of snip, "
        "else 0.9 where masks are compared",
        at_least=0,
        below=1,
    )
    tokens: int | None = _plan(
        "of each example; null = max_length, the most that it can have", "tokens", at_least=1
    )
    device: str | None = _plan(
        "what the run is on; null = cuda if gpu_memory is given or there is a GPU, else cpu",
        choices=(None, "cpu", "cuda"),
    )
    compare: bool = neutral(True, "also plan the other ways to train: calibrate, adapt, DPO, LoRA")
    all_blocks: bool = neutral(False, "trace every block, where two and three stand for all")
    json: str | None = _plan("file for the numbers, in bytes; null = only the table is printed")


def plan_problems(c: PlanConfig) -> Iterator[str]:
    """A line per problem of the run's settings or of the plan's."""
    yield from problems_of(c)
    if started_processes() > 1:
        yield "WORLD_SIZE is set: one process plans for all, processes=N of them; start it without torchrun"
    if c.gpu_memory is not None and c.device == "cpu":
        yield f"gpu_memory={c.gpu_memory:g} with device=cpu: it is the memory of a GPU; drop one of them"
    if c.tokens is not None and c.tokens > c.max_length:
        yield f"tokens={c.tokens}: an example is cut to max_length={c.max_length}; make it smaller"
    if c.json is not None and not Path(c.json).expanduser().absolute().parent.is_dir():
        yield f"json={c.json}: there is no folder {Path(c.json).parent}"
    yield from _sparsity_problems(c)
    masked = c if c.sparsity is None else replace(c, mask_path="not there yet")
    yield from process_problems(masked, c.processes)
    no_mask = masked.mask_path is None and not (c.snip or c.protect_masks) and c.freeze_layers is None
    if no_mask and c.processes > 1 and c.adapter.name == "none" and c.trainer.name == "BasicTrainer":
        yield dense_problem(f"mask_path={c.mask_path or 'null'}", c.processes)


def _sparsity_problems(c: PlanConfig) -> Iterator[str]:
    if c.sparsity is None:
        return
    if c.adapter.name == "lora":
        yield f"sparsity={c.sparsity} with adapter=lora: LoRA has no mask; drop one of them"
    if c.snip:
        yield f"sparsity={c.sparsity} with snip=true: the mask of snip has snip_sparsity={c.snip_sparsity}"
    if c.mask_path is not None and (is_hub_reference(c.mask_path) or Path(c.mask_path).expanduser().exists()):
        yield (f"sparsity={c.sparsity} with mask_path={c.mask_path}: the file says what it keeps; drop one")
