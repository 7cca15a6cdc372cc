"""Forgetting against learning, as curves: loss on a new task against loss on the base's own text.

    OMP_NUM_THREADS=1 python -m scripts.forgetting_study --workloads toy_sort "sql on study-llama"

Each method is trained at several sparsities and at learning rates from a tenth to five times the best one (by
validation loss), with several seeds. The frontier of a method are those of its settings that no other of its
settings beats in both losses; which they are is decided on validation rows, their numbers are of test rows.
Own text is held-out text like that the base was trained on, in nats per byte (PEFT's MetaMathQA comparison
measures forgetting on Wikipedia, in nats per token). Shares results with scripts/sparsity_study.py. Writes
forgetting.md and forgetting.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lota.plots import PALETTE, figure_at
from scripts.cells import COLUMNS, Record, line, read_cells, results
from scripts.study import DENSE, Method, Study, run_study, study_parser

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AROUND = range(-3, 3)  # places of the grid of rates around the best one: a tenth to five times
BUDGETS = (0.01, 0.03, 0.1, 0.3)  # allowed increase of the loss on the base's own text, as a share
SPARSITIES = (0.5, 0.9, 0.99)
ADAMW = {"optimizer": "AdamW"}
METHODS = [
    DENSE,
    *(Method("LoTA", sparsity, "task_vector", start=1e-2) for sparsity in SPARSITIES),
    *(Method("random mask", sparsity, "random", start=1e-2) for sparsity in (0.9, 0.99)),
    *(Method("gradient mask", sparsity, "gradient", start=1e-2) for sparsity in (0.9, 0.99)),
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
    """Those that no other equals or beats in both losses, from little forgetting to much."""
    ordered = sorted(settings, key=lambda point: (point.losses[1], point.losses[0]))
    found: list[Point] = []
    for point in ordered:
        if not found or point.losses[0] < found[-1].losses[0]:
            found.append(point)
    return found


def run(study: Study, args: argparse.Namespace) -> None:
    """All methods of one workload."""
    for method in METHODS:
        if args.smoke and method not in METHODS[:3:2]:
            continue
        best = study.rates.index(study.rate(method))
        for place in AROUND:
            if 0 <= best + place < len(study.rates):
                for seed in args.seeds:
                    study.measured(method, seed, study.rates[best + place], "curve", test=True)


def base_of(records: Iterable[Record]) -> Record:
    return next(record for record in records if record["cell"]["part"] == "base")


def frontier_table(records: Sequence[Record]) -> str:
    """Markdown: every setting on its method's frontier, the base first."""
    header = ["method", "s", "lr", *(name for name, *_ in COLUMNS.values()), "seeds"]
    lines = [line(header), "|---" * len(header) + "|"]
    lines.append(line(["base", "-", "-", *results([base_of(records)]), "-"]))
    for method, settings in points(records).items():
        for point in frontier(settings):
            numbers = [*results(point.runs), len(point.runs)]
            lines.append(line([method, point.sparsity or "-", f"{point.lr:g}", *numbers]))
    return "\n".join(lines)


def budget_table(records: Sequence[Record]) -> str:
    """Markdown: test loss of the setting that is best on validation rows within each budget of forgetting."""
    base = base_of(records)["own"]
    header = ["own text gets worse by at most", *(f"{budget:.0%}" for budget in BUDGETS), "any"]
    lines = [line(header), "|---" * len(header) + "|"]
    for method, settings in points(records).items():
        cells = []
        for budget in (*BUDGETS, float("inf")):
            allowed = [point for point in settings if point.losses[1] <= base * (1 + budget)]
            best = min(allowed, key=lambda point: point.losses[0], default=None)
            cells.append("-" if best is None else results(best.runs)[list(COLUMNS).index("nats")])
        lines.append(line([method, *cells]))
    return "\n".join(lines)


def draw(found: Mapping[str, Sequence[Record]], path: Path) -> None:
    """A column per workload: test loss and score against the loss on the base's own text."""
    with figure_at(path, 4.4 * len(found), 6.4, "") as figure:
        panels = figure.subplots(2, len(found), squeeze=False)
        for column, (name, records) in enumerate(found.items()):
            for axes, key in zip(panels[:, column], ("nats", "score"), strict=True):
                _panel(axes, points(records), base_of(records), key)
                axes.set(title=name, xlabel="loss on the base's own text, nats per byte")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _panel(axes: Axes, found: Mapping[str, Sequence[Point]], base: Record, key: str) -> None:
    for color, (method, settings) in zip(PALETTE, found.items(), strict=False):
        known = [point for point in settings if all(run.get(key) is not None for run in point.runs)]
        best: list[Any] = [(point.mean("own"), point.mean(key)) for point in frontier(known)]
        every: list[Any] = [(point.mean("own"), point.mean(key)) for point in known]
        if known:
            axes.plot(*zip(*every, strict=True), color=color, marker=".", linestyle="", alpha=0.35)
            axes.plot(*zip(*best, strict=True), color=color, marker="o", markersize=4, label=method)
    if base.get(key) is not None:
        axes.plot(base["own"], base[key], color="black", marker="*", linestyle="", label="base")
    axes.set_ylabel("test loss, nats per token" if key == "nats" else "score")
    axes.grid(alpha=0.3)
    axes.set_visible(axes.has_data())  # a task without a score has an empty place


def report(out: Path) -> str:
    """Write and return the tables of all workloads; draw the figure."""
    found = {name: records for name, records in read_cells(out).items() if points(records)}
    parts = [
        f"### {name}\n\n{budget_table(records)}\n\n{frontier_table(records)}"
        for name, records in found.items()
    ]
    text = "\n\n".join(parts) + "\n"
    (out / "forgetting.md").write_text(text, encoding="utf-8")
    draw(found, out / "forgetting.png")
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--report", action="store_true", help="table and figure of what is there, no run")
    args = parser.parse_args(arguments)
    if not args.report:
        run_study(args, run, SPARSITIES)
    print(report(args.out))


if __name__ == "__main__":
    main()
