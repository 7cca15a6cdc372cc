"""Single entries against rows, columns and blocks: what a mask of each costs in accuracy and saves in time.

    OMP_NUM_THREADS=1 python -m scripts.granularity_study --out study/granularity

Per task and seed one dense calibration, from which all masks are taken; per mask one adaptation. Rates are
chosen, results stored and runs resumed as in all studies (scripts/study.py). A second part compares ways to
choose units, such as what makes one saliency of those of their entries, at the rates of the sum of squares; a
third times steps. Writes granularity.md, .png and .html beside the results.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import step
from lota.masks import Mask
from lota.models.pair import open_pair
from scripts.cells import Cells, Record
from scripts.methods import DENSE, Method
from scripts.study import Study
from scripts.study_command import run_study, study_parser
from scripts.workloads import ROOT, Workload

SPARSITIES = (0.9, 0.95, 0.99)
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
    "by lot": {},  # the saliency `random`
}
CHOSEN_KINDS = ("row", "column", "block 64")  # of the comparison of choices
CHOSEN_SPARSITIES = (0.9, 0.99)
WORKLOADS = {
    "toy_sort": Workload("toy_sort", "tiny-llama", 800, 8, 128, n_scored=200, data_dir=None),
    "sql": Workload("sql", "stories260K", 160, 4, 160, n_test=100, n_scored=40, new_tokens=96),
    "gsm8k": Workload("gsm8k", "stories260K", 160, 4, 192, n_test=100, n_scored=0),
}
LIKE = {"column": "row", "block 64": "block 16"}  # on stories260K: kinds that take the rates of another
TIMES = "times.jsonl"


def mask_of(kind: str, sparsity: float, choice: str = USUAL) -> Method:
    """Training under a mask of that kind."""
    granularity, block = KINDS[kind]
    saliency = "random" if choice == "by lot" else "task_vector"
    return Method(
        named(kind, choice),
        sparsity,
        saliency,
        start=1e-2,
        granularity=granularity,
        block=block,
        rule=CHOICES[choice],
    )


def named(kind: str, choice: str) -> str:
    """A method's name in the results."""
    return kind if choice == USUAL else f"{kind}, {choice}"


class GranularityStudy(Study):
    """Masks know what share of the calibration's change they keep, and of the usual choice's entries."""

    def about(self, method: Method, seed: int, mask: Mask) -> Record:
        assert method.sparsity is not None
        kind = method.name.partition(",")[0]
        usual = mask
        if method.name != kind:
            usual = Mask.load(self.mask(mask_of(kind, method.sparsity), seed))
        pair = open_pair(self.folder, self.calibration(seed))
        return {
            "energy": kept_energy(mask, pair.sources),
            "shared": mask.overlap(usual) / usual.n_kept if usual.n_kept else None,
        }

    def rate_of(self, kind: str, sparsity: float) -> float:
        """The best rate of a kind's usual choice; the search begins at that of the sparsity before."""
        like = kind if self.workload.base == "tiny-llama" else LIKE.get(kind, kind)
        start = None
        for s in self.sparsities[: self.sparsities.index(sparsity) + 1]:
            start = self.rate(mask_of(like, s), start)
        assert start is not None
        return start

    def adapt(self, kind: str, sparsity: float, choice: str, seed: int) -> None:
        """Train under a mask, unless no unit fits into it."""
        method = mask_of(kind, sparsity, choice)
        if Mask.load(self.mask(method, seed)).n_kept:
            self.measured(method, seed, self.rate_of(kind, sparsity), "main", test=True)


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
    contestants: step.Contestants = {DENSE.name: partial(step.dense_masked, scope_only=True)}
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


def cases(task: str) -> Iterator[tuple[str, float, str]]:
    """(kind, sparsity, choice) of what is adapted."""
    for kind in KINDS:
        for sparsity in SPARSITIES:
            yield kind, sparsity, USUAL
    if task == "gsm8k":
        return
    for choice in list(CHOICES)[1:]:
        for kind in CHOSEN_KINDS:
            same = (choice, kind) == ("mean of squares", "block 64")  # blocks are of one size
            none = (task, kind, choice) == ("sql", "block 64", "sum of squares, per tensor")  # none fits
            for sparsity in () if same or none else CHOSEN_SPARSITIES:
                yield kind, sparsity, choice


def run(study: GranularityStudy, args: argparse.Namespace) -> None:
    """All masks of one workload, a seed at a time."""
    wanted = [("block 16", 0.9, USUAL), ("block 16", 0.9, "max")] if args.smoke else cases(study.name)
    chosen = list(wanted)
    for seed in args.seeds:
        study.measured(DENSE, seed, study.rate(DENSE), "main", test=True)
        for kind, sparsity, choice in chosen:
            study.adapt(kind, sparsity, choice, seed)
            gc.collect()


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser(__doc__, WORKLOADS, list(WORKLOADS))
    parser.add_argument("--parts", nargs="+", choices=["train", "time"], default=["train", "time"])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind of mask")
    parser.add_argument("--shape", choices=step.SHAPES, default="124m", help="of the model that is timed")
    parser.set_defaults(out=ROOT / "study" / "granularity")
    args = parser.parse_args(arguments)
    parts = [] if args.report else args.parts
    if "train" in parts:
        run_study(args, run, SPARSITIES, WORKLOADS, GranularityStudy)
    if "time" in parts:
        time_steps(Cells(args.out / TIMES), args.rounds, args.shape)
    from scripts.granularity_report import write  # it reads what is above

    print(write(args.out))


if __name__ == "__main__":
    main()
