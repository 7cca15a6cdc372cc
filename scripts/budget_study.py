"""Masks against the calibration's length: how much calibration is enough, and do gradients alone do?

    OMP_NUM_THREADS=1 python -m scripts.budget_study --workloads toy_sort "sql on study-llama"

Masks of one sparsity come from calibrations of 1, 4, 16, ... steps and of a whole run, and from the gradients
of as many batches at the base's weights. Of each: the overlap with the whole calibration's mask of the same
seed and with the masks of the same budget of other seeds (intersection over union), and what training under
it gives. All adapt at the rate that validation rows choose for the whole calibration's mask, so that the
masks alone differ. Goes on where it was interrupted; shares results with scripts/sparsity_study.py. Writes
budget.md, .png and .html.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lota.evaluate.estimates import mean_and_stderr
from lota.masks import Mask
from lota.plots import PALETTE
from scripts.calibration_study import iou
from scripts.cells import COLUMNS, LABELS, Record, results, shown
from scripts.methods import Method
from scripts.study import Study
from scripts.study_command import study_parser
from scripts.study_report import Report, Table, study_main

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPARSITY = 0.9
CHANCE = (1 - SPARSITY) / (1 + SPARSITY)  # expected overlap of two masks of that size, drawn by lot
BUDGETS = (1, 4, 16, 64, 256)
KINDS = {"LoTA": "task_vector", "gradient mask": "gradient"}
WHOLE = Method("LoTA", SPARSITY, "task_vector", start=1e-2)


def methods(steps: int, budgets: Sequence[int] = BUDGETS) -> list[Method]:
    """Every kind of mask from every budget, and from a whole run."""
    found = []
    for kind, saliency in KINDS.items():
        for budget in [*(b for b in budgets if b != steps), None]:
            name = kind if budget is None else f"{kind}, {budget} steps"
            found.append(Method(name, SPARSITY, saliency, budget=budget, start=1e-2))
    return found


def run(study: Study, args: argparse.Namespace) -> None:
    """All masks of one workload."""
    lr = study.rate(WHOLE)
    for method in methods(study.workload.steps, BUDGETS[:2] if args.smoke else BUDGETS):
        for seed in args.seeds:
            study.measured(method, seed, lr, "budget", test=True)
            overlap(study, method, seed, WHOLE, seed)
        for one, other in combinations(args.seeds, 2):
            overlap(study, method, one, method, other)


def overlap(study: Study, method: Method, seed: int, other: Method, other_seed: int) -> None:
    """Store the intersection over union of two masks."""
    cell = {"part": "overlap", **method.key, "seed": seed, "with": [other.name, other_seed]}
    cell["sizes"] = study.sizes
    if study.cells.get(**cell) is None:
        masks = [Mask.load(study.mask(*which)) for which in ((method, seed), (other, other_seed))]
        study.cells.add({"iou": iou(*masks)}, **cell)


def overlaps(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    """Of a method's masks: with the whole calibration's of the same seed, and with those of other seeds."""
    same: list[float] = []
    others: list[float] = []
    for record in records:
        cell = record["cell"]
        if cell["part"] == "overlap" and cell["method"] == name:
            (same if cell["with"][1] == cell["seed"] else others).append(record["iou"])
    return same, others


def trained(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Method -> its runs."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["cell"]["part"] == "budget":
            found.setdefault(record["cell"]["method"], []).append(record)
    return found


def tables(records: Sequence[Record]) -> list[Table]:
    """A line per kind of mask and budget."""
    header = ["mask", "IoU with the whole calibration's", "IoU with other seeds'"]
    lines = [[*header, *(name for name, *_ in COLUMNS.values()), "seeds"]]
    for name, runs in trained(records).items():
        lines.append([name, *map(shown, overlaps(records, name)), *results(runs), str(len(runs))])
    note = f"Two masks of this size drawn by lot: an IoU of {CHANCE:.3f}."
    return [Table("Masks and what training under them gives", lines, note)]


def points(records: Sequence[Record], kind: str, key: str) -> list[tuple[int, float, float]]:
    """(steps, mean, standard error) of a kind's masks. key: `iou`, or of a result."""
    found = []
    for name, runs in trained(records).items():
        own, _, rest = name.partition(", ")
        values = overlaps(records, name)[0] if key == "iou" else [run.get(key) for run in runs]
        known = [value for value in values if value is not None]
        if own == kind and known and len(known) == len(values):
            mean, error = mean_and_stderr(known)
            found.append((int(rest.split()[0]) if rest else runs[0]["steps"], mean, error or 0.0))
    return sorted(found)


def panel(axes: Axes, records: Sequence[Record], key: str) -> None:
    """Overlap or test loss against the calibration's steps."""
    for color, kind in zip(PALETTE, KINDS, strict=False):
        looks: dict[str, Any] = {"color": color, "label": kind, "marker": "o", "capsize": 2}
        if own := points(records, kind, key):
            steps, means, errors = zip(*own, strict=True)
            axes.errorbar(steps, means, errors, **looks)
    if key == "iou":
        axes.axhline(CHANCE, color="black", linestyle=":", label="by lot")
    label = "IoU with the whole calibration's mask" if key == "iou" else LABELS[key]
    axes.set(xlabel="calibration, steps", ylabel=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")


REPORT = Report(
    name="budget",
    title="Masks against the length of the calibration",
    asked="""LoTA first fine-tunes all weights, to see which of them change most. How long must this \
calibration be for a good mask? And is it needed at all, or do the base's gradients say as much?""",
    measured=f"""All masks are of sparsity {SPARSITY}. They come from calibrations shorter and longer than \
a run, and of one as long (the whole calibration), and (gradient mask) from the gradients of as many \
batches at the base's weights. All adapt at the learning rate that was chosen for the mask of the whole \
calibration, so that they differ in the mask alone. Masks are also compared with each other, by IoU: with \
the whole calibration's of the same seed, and with those of the same kind and length of other seeds.""",
    part="budget",
    tables=tables,
    panels=("iou", "nats"),
    panel=panel,
)


def main(arguments: list[str] | None = None) -> None:
    study_main(study_parser(__doc__).parse_args(arguments), run, REPORT, [SPARSITY])


if __name__ == "__main__":
    main()
