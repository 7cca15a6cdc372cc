"""Forgetting against learning, as curves: loss on a new task against loss on the base's own text.

    OMP_NUM_THREADS=1 python -m scripts.forgetting_study --workloads toy_sort "sql on study-llama"

Each method is trained at several sparsities and at learning rates from a fifth to twice the best one (by
validation loss), with several seeds. The frontier of a method are those of its settings that no other of its
settings beats in both losses: on validation rows of the task, and on the own text that is reported as well.
Own text is held-out text like that the base was trained on, in nats per byte (PEFT's MetaMathQA comparison
measures forgetting on Wikipedia, in nats per token). Shares results with scripts/sparsity_study.py. Writes
forgetting.md, .png and .html.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lota.plots import PALETTE
from scripts.cells import COLUMNS, LABELS, Record, results
from scripts.methods import DENSE, SCOPE, Method
from scripts.study import Study
from scripts.study_command import study_parser
from scripts.study_report import Report, Table, study_main

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AROUND = range(-2, 2)  # places of the grid of rates around the best one: a fifth to twice
BUDGETS = (0.1, 0.3, 1.0, 3.0)  # allowed increase of the loss on the base's own text, as a share
SPARSITIES = (0.5, 0.9, 0.99)
ADAMW = {"optimizer": "AdamW"}
METHODS = [
    DENSE,
    SCOPE,
    *(Method("LoTA", sparsity, "task_vector", start=1e-2) for sparsity in SPARSITIES),
    *(Method("random mask", sparsity, "random", start=1e-2) for sparsity in SPARSITIES),
    *(Method("gradient mask", sparsity, "gradient", start=1e-2) for sparsity in SPARSITIES),
    *(Method("LoRA, AdamW", s, settings=ADAMW, lora=True, start=5e-3) for s in SPARSITIES),
]


@dataclass(frozen=True)
class Point:
    """A setting of a method: its runs with several seeds, none of which diverged."""

    method: str
    sparsity: float | None
    lr: float
    runs: Sequence[Record]

    def mean(self, key: str) -> float:
        return fmean(run[key] for run in self.runs)

    @property
    def losses(self) -> tuple[float, float]:
        """What decides: on validation rows of the task, and on the base's own text."""
        return self.mean("validation"), self.mean("own")


def points(records: Iterable[Record]) -> dict[str, list[Point]]:
    """Method -> its settings."""
    runs: dict[tuple[str, float | None, float], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        if cell["part"] == "curve":
            runs.setdefault((cell["method"], cell["sparsity"], cell["lr"]), []).append(record)
    found: dict[str, list[Point]] = {}
    for (method, sparsity, lr), own in runs.items():
        if all(run["validation"] is not None for run in own):
            found.setdefault(method, []).append(Point(method, sparsity, lr, own))
    return found


def frontier(settings: Sequence[Point]) -> list[Point]:
    """Those with the most seeds that no other of them equals or beats in both losses, from little forgetting
    to much.
    """
    most = max((len(point.runs) for point in settings), default=0)
    full = (point for point in settings if len(point.runs) == most)
    ordered = sorted(full, key=lambda point: (point.losses[1], point.losses[0]))
    found: list[Point] = []
    for point in ordered:
        if not found or point.losses[0] < found[-1].losses[0]:
            found.append(point)
    return found


def run(study: Study, args: argparse.Namespace) -> None:
    """All methods of one workload."""
    for method in METHODS:
        if args.smoke and method not in (METHODS[0], METHODS[3]):
            continue
        best = study.rates.index(study.rate(method))
        for place in AROUND:
            if 0 <= best + place < len(study.rates):
                for seed in args.seeds:
                    study.measured(method, seed, study.rates[best + place], "curve", test=True)


def base_of(records: Iterable[Record]) -> Record:
    return next(record for record in records if record["cell"]["part"] == "base")


def tables(records: Sequence[Record]) -> list[Table]:
    return [budget_table(records), frontier_table(records)]


def frontier_table(records: Sequence[Record]) -> Table:
    """Every setting on its method's frontier, the base first."""
    lines = [["method", "sparsity", "lr", *(name for name, *_ in COLUMNS.values()), "seeds"]]
    lines.append(["base", "-", "-", *results([base_of(records)]), "-"])
    for method, settings in points(records).items():
        for point in frontier(settings):
            numbers = [*results(point.runs), str(len(point.runs))]
            lines.append([method, str(point.sparsity or "-"), f"{point.lr:g}", *numbers])
    return Table("Frontier of each method", lines, "From little forgetting to much.")


def budget_table(records: Sequence[Record]) -> Table:
    """Test loss of the setting that is best on validation rows within each budget of forgetting."""
    base = base_of(records)["own"]
    lines = [["method", *(f"at most {budget:.0%}" for budget in BUDGETS), "any"]]
    for method, settings in points(records).items():
        cells = []
        for budget in (*BUDGETS, float("inf")):
            allowed = [point for point in frontier(settings) if point.losses[1] <= base * (1 + budget)]
            best = min(allowed, key=lambda point: point.losses[0], default=None)
            cells.append("-" if best is None else results(best.runs)[list(COLUMNS).index("nats")])
        lines.append([method, *cells])
    text = """Test loss in nats per token of each method's best setting, if the loss on own text may grow \
by at most so much over the base's. "-": no setting of the method forgets so little."""
    return Table("What is learnt within a limit of forgetting", lines, text)


def panel(axes: Axes, records: Sequence[Record], key: str) -> None:
    """Test loss or score against the loss on own text: all settings; the frontier as a line."""
    base = base_of(records)
    for color, (method, settings) in zip(PALETTE, points(records).items(), strict=False):
        known = [point for point in settings if all(run.get(key) is not None for run in point.runs)]
        best: list[Any] = [(point.mean("own"), point.mean(key)) for point in frontier(known)]
        every: list[Any] = [(point.mean("own"), point.mean(key)) for point in known]
        if known:
            axes.plot(*zip(*every, strict=True), color=color, marker=".", linestyle="", alpha=0.35)
            axes.plot(*zip(*best, strict=True), color=color, marker="o", markersize=4, label=method)
    if axes.has_data():  # a panel of a task without scores is left out
        axes.axvline(base["own"], color="black", linestyle=":", label="base, own text")
    axes.set(xlabel="loss on the base's own text, nats per byte", ylabel=LABELS[key])


REPORT = Report(
    name="forgetting",
    title="Forgetting against learning",
    asked="""A model that learns a new task forgets some of what it knew. Which method learns most for the \
same forgetting? Learning is the test loss on the new task, forgetting the growth of the loss on the base's \
own text.""",
    measured="""Each method is trained at several sparsities and at learning rates from a fifth of its best \
one to about twice that. Which of its settings are on the frontier is decided by the loss on validation rows \
and the loss on own text, of which there is no second sample; losses on the task are of test rows. \
In the figures faint dots are all settings, lines are frontiers; the better corner is at the left.""",
    part="curve",
    tables=tables,
    panels=("nats", "score"),
    panel=panel,
)


def main(arguments: list[str] | None = None) -> None:
    study_main(study_parser(__doc__).parse_args(arguments), run, REPORT, SPARSITIES)


if __name__ == "__main__":
    main()
