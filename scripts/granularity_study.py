"""Single entries against rows, columns and blocks: what a mask of each costs in accuracy and saves in time.

    OMP_NUM_THREADS=1 python -m scripts.granularity_study --out study/granularity

Per task and seed one dense calibration, from which all masks are taken; per mask one adaptation, scored on
test rows. The learning rate of each granularity and sparsity is the best of a grid by factors of about 3, on
training rows that no run trains on, with a seed that is not reported; at s = 0.95 the grid spans the rates of
0.9 and 0.99. A second part compares ways to choose units, such as what makes one saliency of those of their
entries; a third times steps. Each result is a line of cells.jsonl, written when it is known: the same command
after an interruption goes on. `python -m scripts.granularity_report` makes tables and a figure of it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import step
from lota.config import Config
from lota.data.batches import encode, seeded_sample
from lota.data.prompts import Prompter
from lota.data.task import FindTask, Row, Task
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import TransformersEngine
from lota.evaluate.scorers import TaskRequest
from lota.masks import Mask
from lota.masks.extract.select import Quota, Rule, select
from lota.models.loading import load_tokenizer
from lota.models.pair import open_pair
from lota.storage import cut, whole_lines
from lota.train.trainer import Trainer
from tasks import get_task

Record = dict[str, Any]  # plain values, as in cells.jsonl

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.9, 0.95, 0.99)
SEEDS = (0, 1, 2)
RATE_SEED = 100  # of the runs that choose learning rates
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DENSE = "dense"
# name of a kind of mask -> its granularity and side of a block
KINDS = {
    "element": ("element", 64),
    "row": ("row", 64),
    "column": ("column", 64),
    "block 16": ("block", 16),
    "block 64": ("block", 64),
}
# How units are chosen: name -> what differs from `Rule`'s own way, the sum of squares under one threshold
USUAL = "sum of squares"
CHOICES: dict[str, dict[str, Any]] = {
    USUAL: {},
    "mean of squares": {"aggregate": "mean_squares"},
    "sum": {"aggregate": "sum"},
    "max": {"aggregate": "max"},
    "sum of squares, per tensor": {"per": "tensor"},
    "by lot": {"saliency": "random"},
}
CHOSEN_KINDS = ("row", "column", "block 64")  # of the comparison of choices
CHOSEN_SPARSITIES = (0.9, 0.99)


@dataclass(frozen=True)
class Workload:
    """A task on a base, with sizes that a CPU takes seconds for."""

    task: str
    base: Path
    n_examples: int  # of a run
    batch_size: int
    max_length: int  # tokens; longer rows are left out, in training and test
    n_test: int  # rows for the loss, a seeded sample
    n_scored: int  # the first of them, for the score; 0: none
    start: dict[str, float] = field(default_factory=lambda: {DENSE: 1e-3, "0.9": 1e-2, "0.99": 3e-2})
    like: dict[str, str] = field(default_factory=dict)  # kinds that take the learning rates of another
    data_dir: str | None = None
    new_tokens: int | None = None  # of a completion; None: the task's own


STORIES = ROOT.parent / "shared" / "models" / "stories260K"
DATA = str(ROOT.parent / "shared" / "data")
SHARED_RATES = {"column": "row", "block 64": "block 16"}
WORKLOADS = {
    "toy_sort": Workload("toy_sort", ROOT / "assets" / "tiny-llama", 800, 8, 128, 200, 200),
    "sql": Workload("sql", STORIES, 160, 4, 160, 100, 40, like=SHARED_RATES, data_dir=DATA, new_tokens=96),
    "gsm8k": Workload("gsm8k", STORIES, 160, 4, 192, 100, 0, like=SHARED_RATES, data_dir=DATA),
}
N_VALIDATION = 100  # training rows of every task that choose rates


class Cells:
    """Results by what they are results of, in a file of one line each."""

    def __init__(self, path: Path):
        self.path, self.found = path, dict[str, Record]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lines = list(whole_lines(path))
        cut(path, lines[-1][0] if lines else 0)  # what an interrupted process left of a line
        for _, line in lines:
            record = json.loads(line)
            self.found[self._name(record["cell"])] = record

    @staticmethod
    def _name(cell: Record) -> str:
        return json.dumps(cell, sort_keys=True)

    def get(self, **cell: Any) -> Record | None:
        return self.found.get(self._name(cell))

    def add(self, result: Record, **cell: Any) -> Record:
        record = {"cell": cell, **result}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.found[self._name(cell)] = record
        return record


def carved(workload: Workload, held_out: str, name: str) -> Task:
    """The task without rows that are too long, and with `N_VALIDATION` of its training rows set apart.

    held_out: the split that it is evaluated on, `validation` or `test`.
    """
    task = copy.copy(get_task(name))
    load, tokenizer = task.load, load_tokenizer(workload.base)
    prompter = Prompter(tokenizer)

    def fits(row: Row) -> bool:
        long = {"max_length": 10**6, "max_prompt_length": 10**6}
        return len(encode(tokenizer, prompter.example(task, row), **long)) <= workload.max_length

    def rows_of(split: str, data_dir: str | os.PathLike[str] = "") -> list[Row]:
        rows = [row for row in load("test" if split == "test" else "train", data_dir) if fits(row)]
        if split == "test":
            return seeded_sample(rows, workload.n_test, 0)
        apart = set(seeded_sample(range(len(rows)), N_VALIDATION, 0))
        return [row for i, row in enumerate(rows) if (i in apart) == (split == "validation")]

    found = {split: rows_of(split, workload.data_dir or "") for split in ("train", "validation", "test")}
    task.held_out = held_out
    task.load = lambda split, data_dir="": found[split].copy()  # type: ignore
    return task


class Study:
    """All runs of one folder."""

    def __init__(self, out: Path, workloads: dict[str, Workload] = WORKLOADS):
        self.out, self.workloads, self.cells = out, workloads, Cells(out / "cells.jsonl")
        self._tasks: dict[tuple[str, str], Task] = {}

    def find_task(self, name: str, held_out: str) -> Task:
        key = (name, held_out)
        if key not in self._tasks:
            self._tasks[key] = carved(self.workloads[name], held_out, name)
        return self._tasks[key]

    def config(self, name: str, seed: int, lr: float, **more: Any) -> Config:
        workload = self.workloads[name]
        config = Config(
            exp_name="run", datasets=[workload.task], data_dir=workload.data_dir, seed=seed, lr=lr,
            n_examples=workload.n_examples, batch_size=workload.batch_size, lr_scheduler="linear",
            warmup_steps=workload.n_examples // workload.batch_size // 10, max_length=workload.max_length,
            max_prompt_length=workload.max_length - 1, do_first_eval=False, eval_every=workload.n_examples,
            n_eval_examples=10**6, eval_batch_size=100, local_dirs=[str(self.out / "runs" / name)],
            minimum_log_interval_secs=1e9, debug=True,
        )  # fmt: skip
        config.model.name_or_path = str(workload.base)
        return replace(config, **more)

    def run(self, name: str, held_out: str, config: Config) -> tuple[Record, Trainer]:
        """A training run: nats per response token on the held-out rows, None if it diverged, and seconds."""
        start, cpu = time.perf_counter(), time.process_time()
        find: FindTask = partial(self.find_task, held_out=held_out)
        trainer = Trainer(config, find)
        try:
            trainer.train()
            nats = trainer.metrics["nats_per_token/eval"]
        except ValueError as error:
            if "lower lr" not in str(error):
                raise
            nats = None
        used = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        return {"lr": config.lr, "nats": nats, **used}, trainer

    # Learning rates

    def rate(self, name: str, kind: str, sparsity: float | None) -> float:
        """The best rate on the validation rows, with the seed that is not reported."""
        kind = self.workloads[name].like.get(kind, kind)
        if sparsity in SPARSITIES[1:-1]:  # fewer entries want larger rates: it lies between its neighbours'
            ends = [self.rate(name, kind, s) for s in (SPARSITIES[0], SPARSITIES[-1])]
            grid = [rate for rate in RATES if min(ends) <= rate <= max(ends)]
            return min(
                grid, key=lambda lr: self._validation_nats(name, kind, sparsity, lr) if grid[1:] else 0
            )
        start = self.workloads[name].start[DENSE if sparsity is None else str(sparsity)]
        tried: dict[int, float] = {}
        at = RATES.index(start)
        wanted = {at - 1, at, at + 1}
        while wanted - tried.keys():  # until the best has a worse one on either side
            for i in sorted(wanted - tried.keys()):
                tried[i] = self._validation_nats(name, kind, sparsity, RATES[i])
            best = min(tried, key=lambda i: tried[i])
            wanted = {i for i in (best - 1, best, best + 1) if 0 <= i < len(RATES)}
        return RATES[best]

    def _validation_nats(self, name: str, kind: str, sparsity: float | None, lr: float) -> float:
        cell = {"part": "rate", "task": name, "kind": kind, "sparsity": sparsity, "lr": lr}
        found = self.cells.get(**cell)
        if found is None:
            mask = None if sparsity is None else str(self.mask(name, RATE_SEED, kind, sparsity))
            config = self.config(name, RATE_SEED, lr, mask_path=mask)
            found = self.cells.add(self.run(name, "validation", config)[0], **cell)
        return float("inf") if found["nats"] is None else float(found["nats"])

    # Calibration and masks

    def calibration(self, name: str, seed: int) -> Path:
        """A dense run at its best rate: the folder of its checkpoint."""
        lr = self.rate(name, DENSE, None)
        config = self.config(name, seed, lr, exp_name=f"dense-{seed}", debug=False)
        done = {"part": "main", "task": name, "seed": seed, "kind": DENSE, "sparsity": None}
        found = self.cells.get(**done, choice=None)
        if found is None:
            result, trainer = self.run(name, "test", replace(config, overwrite=True))
            assert trainer.saved is not None, "a dense run at the best rate diverged"
            result |= {"folder": str(trainer.saved[1]), "kept": trainer.optimizer.n_trained}
            found = self.cells.add(result | self.score(name, trainer), **done, choice=None)
        return Path(found["folder"])

    def mask(self, name: str, seed: int, kind: str, sparsity: float, choice: str = USUAL) -> Path:
        """A mask of the seed's calibration; those of all sparsities are made together."""
        folder = self.out / "masks" / name / str(seed) / f"{kind} {choice}".replace(" ", "_").replace(",", "")
        if not (folder / f"{sparsity}_mask.pt").is_file():
            granularity, block = KINDS[kind]
            pair = open_pair(self.workloads[name].base, self.calibration(name, seed))
            rule = replace(Rule(granularity=granularity, block=block, seed=seed), **CHOICES[choice])
            for s, mask in select(Quota(pair, SPARSITIES, rule)).items():
                mask.meta |= {"choice": choice, "energy": kept_energy(mask, pair.sources)}
                mask.save(folder / f"{s}_mask.pt")
        return folder / f"{sparsity}_mask.pt"

    # Adaptation

    def adapt(self, name: str, seed: int, kind: str, sparsity: float, choice: str = USUAL) -> None:
        """Train under a mask from the base, and score on test rows."""
        cell = {"part": "main", "task": name, "seed": seed, "kind": kind, "sparsity": sparsity}
        if self.cells.get(**cell, choice=choice) is not None:
            return
        lr = self.rate(name, kind, sparsity)  # that of the usual choice for every one
        path = self.mask(name, seed, kind, sparsity, choice)
        mask = Mask.load(path)
        if not mask.n_kept:  # no block fits into a matrix's own share
            return
        usual = Mask.load(self.mask(name, seed, kind, sparsity))
        result, trainer = self.run(name, "test", self.config(name, seed, lr, mask_path=str(path)))
        result |= {"kept": mask.n_kept, "energy": mask.meta["energy"]}
        result |= {"shared": mask.overlap(usual) / usual.n_kept}
        self.cells.add(result | self.score(name, trainer), **cell, choice=choice)

    def score(self, name: str, trainer: Trainer) -> Record:
        """The task's metrics over completions of the first test rows."""
        n, new_tokens = self.workloads[name].n_scored, self.workloads[name].new_tokens
        if not n or "nats_per_token/eval" not in trainer.metrics:
            return {}
        task = self.find_task(name, "test")
        rows = task.load("test", "")[:n]
        request = TaskRequest(task, rows, Decoding(new_tokens or task.max_new_tokens, stop=task.stop))
        tokenizer = trainer.data.tokenizer
        engine = TransformersEngine(trainer.model, tokenizer, batch_size=200)
        scorer = request.scorer(engine, Prompter(tokenizer), request)
        scorer.prepare()
        found: dict[int, Row] = {}
        scorer.run(list(request.numbers), 0, found.__setitem__)
        return {"scores": {k: v.value for k, v in scorer.estimates(task, [found]).items()}}

    def base(self, name: str) -> None:
        """The base itself: a run whose rate is 0."""
        cell = {"part": "main", "task": name, "kind": "base"}
        if self.cells.get(**cell) is None:
            few = {"n_examples": 1, "batch_size": 1, "eval_every": 1, "warmup_steps": 0}
            result, trainer = self.run(name, "test", self.config(name, 0, 0.0, **few))
            self.cells.add(result | self.score(name, trainer), **cell)


def kept_energy(mask: Mask, sources: Any) -> float:
    """The share of the task vector's squared length that lies in the kept entries."""
    kept = total = 0.0
    for name in mask.names:
        n = mask.numel(name)
        base, tuned = (sources[role].read_flat(name, 0, n).double() for role in ("base", "tuned"))
        squares = (tuned - base).square()
        kept += float(squares[mask.dense(name).flatten()].sum())
        total += float(squares.sum())
    return kept / total


def time_steps(cells: Cells, rounds: int, shape: str, sparsities: Sequence[float] = SPARSITIES) -> None:
    """Median step times of each kind of mask, in turns with the dense baseline, a sparsity at a time."""
    contestants: step.Contestants = {DENSE: partial(step.dense_masked, scope_only=True)}
    for kind, (granularity, block) in KINDS.items():
        contestants[kind] = partial(step.ours, granularity=granularity, block=block)
    for sparsity in sparsities:
        cell = {"part": "time", "shape": shape, "sparsity": sparsity}
        if cells.get(**cell) is not None:
            continue
        args = argparse.Namespace(
            shape=shape, sparsity=sparsity, batch=4, length=128, dtype="float32", device="cpu",
            rounds=rounds, checkpointing=False, contestants=list(contestants),
        )  # fmt: skip
        seconds = step.times(args, contestants)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        cells.add({"seconds": medians, "rounds": rounds, "torch": torch.__version__}, **cell)
        gc.collect()


def cases(study: Study, seeds: Sequence[int]) -> Iterator[tuple[str, int, str, float, str]]:
    """What is adapted, in an order that makes a study which is cut short worth reading."""
    toy, sql, gsm8k = study.workloads
    main = [(kind, s, USUAL) for kind in KINDS for s in SPARSITIES]
    others = [
        (kind, s, choice)
        for choice in CHOICES
        for kind in CHOSEN_KINDS
        for s in CHOSEN_SPARSITIES
        if choice != USUAL and (choice, kind) != ("mean of squares", "block 64")  # blocks are of one size
    ]
    first, *more = seeds
    order = [(toy, main, seeds), (toy, others, [first]), (sql, main, [first]), (gsm8k, main, [first])]
    order += [(toy, others, more), (sql, main, more), (gsm8k, main, more), (sql, others, seeds)]
    for name, part, chosen in order:
        for seed in chosen:
            for kind, sparsity, choice in part:
                if (name, kind, choice) != (sql, "block 64", "sum of squares, per tensor"):  # none fits
                    yield name, seed, kind, sparsity, choice


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "study" / "granularity", help="folder for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--parts", nargs="+", choices=["train", "time"], default=["train", "time"])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind of mask")
    parser.add_argument("--shape", choices=step.SHAPES, default="124m", help="of the model that is timed")
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    study = Study(args.out.resolve())
    if "train" in args.parts:
        for name in study.workloads:
            study.base(name)
        for name, seed, kind, sparsity, choice in cases(study, args.seeds):
            study.calibration(name, seed)
            study.adapt(name, seed, kind, sparsity, choice)
            gc.collect()
    if "time" in args.parts:
        time_steps(study.cells, args.rounds, args.shape)


if __name__ == "__main__":
    main()
