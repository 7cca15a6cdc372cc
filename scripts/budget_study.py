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
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean
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
PER_TENSOR = Method("gradient mask, per tensor", SPARSITY, "gradient", start=1e-2, rule={"per": "tensor"})
BORROWED = "LoTA, another seed's mask"


def methods(steps: int, batches: int, budgets: Sequence[int] = BUDGETS) -> list[Method]:
    """Every kind of mask from every budget, and from a whole run.

    steps: of a whole run; batches: of the training rows, which gradients are read off once.
    """
    found = []
    for kind, saliency in KINDS.items():
        most = batches if saliency == "gradient" else max(budgets)
        for budget in [*sorted({min(b, most) for b in budgets} - {steps}), None]:
            name = kind if budget is None else f"{kind}, {budget} steps"
            found.append(Method(name, SPARSITY, saliency, budget=budget, start=1e-2))
    return [*found, PER_TENSOR]


def run(study: Study, args: argparse.Namespace) -> None:
    """All masks of one workload; a kind's masks adapt at the rate of that from as many steps as a run has."""
    batches = len(study.whole_split("train")) // study.workload.batch_size
    for method in methods(study.workload.steps, batches, BUDGETS[:2] if args.smoke else BUDGETS):
        lr = study.rate(method if method == PER_TENSOR else whole(method))
        for seed in args.seeds:
            study.measured(method, seed, lr, "budget", test=True)
            if method != WHOLE:
                overlap(study, method, seed, WHOLE, seed)
        for one, other in combinations(args.seeds, 2):
            overlap(study, method, one, method, other)
    borrowed(study, args.seeds)


def whole(method: Method) -> Method:
    """The same kind of mask from as many steps as a run has."""
    return replace(method, name=method.name.partition(", ")[0], budget=None)


def borrowed(study: Study, seeds: Sequence[int]) -> None:
    """Every seed's run under the mask of another seed's calibration."""
    for seed, other in zip(seeds, [*seeds[1:], *seeds[:1]], strict=True):
        if other != seed:
            settings = {"mask_path": str(study.mask(WHOLE, other))}
            method = Method(BORROWED, SPARSITY, settings=settings)
            study.measured(method, seed, study.rate(WHOLE), "budget", test=True)


def overlap(study: Study, method: Method, seed: int, other: Method, other_seed: int) -> None:
    """Store the intersection over union of two masks."""
    cell = {"part": "overlap", **method.key, "seed": seed, "with": [other.name, other_seed]}
    cell["sizes"] = study.sizes
    if study.cells.get(**cell) is None:
        masks = [Mask.load(study.mask(*which)) for which in ((method, seed), (other, other_seed))]
        study.cells.add({"iou": iou(*masks)}, **cell)


Pairs = dict[frozenset[int], float]


def overlaps(records: Sequence[Record], name: str) -> tuple[list[float], Pairs]:
    """Of a method's masks: with the whole calibration's of the same seed; of two seeds with each other."""
    same: list[float] = []
    others: Pairs = {}
    for record in records:
        cell = record["cell"]
        if cell["part"] == "overlap" and cell["method"] == name:
            if cell["with"][1] == cell["seed"]:
                same += [record["iou"]] if name != WHOLE.name else []  # of a mask with itself says nothing
            else:
                others[frozenset([cell["seed"], cell["with"][1]])] = record["iou"]
    return same, others


def jackknife(pairs: Pairs) -> str:
    """Mean over pairs of seeds ± its standard error: pairs that share a seed are not independent, so that
    the error comes from leaving out one seed after the other (Efron and Stein 1981).
    """
    seeds = set[int]().union(*pairs)
    if len(seeds) < 3:
        return shown(list(pairs.values()))
    mean = fmean(pairs.values())
    others = [[value for pair, value in pairs.items() if seed not in pair] for seed in seeds]
    if not all(others):  # a study that is not yet done
        return f"{mean:.3f}"
    n, without = len(seeds), [fmean(values) for values in others]
    error = math.sqrt((n - 1) / n * sum((one - fmean(without)) ** 2 for one in without))
    return f"{mean:.3f} ± {error:.3f}"


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
        same, others = overlaps(records, name)
        lines.append([name, shown(same), jackknife(others), *results(runs), str(len(runs))])
    note = f"Two masks of this size drawn by lot: an IoU of {CHANCE:.3f}."
    return [Table("Masks and what training under them gives", lines, note)]


def points(records: Sequence[Record], kind: str, key: str) -> list[tuple[int, float, float]]:
    """(steps, mean, standard error) of a kind's masks. key: `iou`, or of a result."""
    found = []
    for name, runs in trained(records).items():
        own, _, rest = name.partition(", ")
        values = overlaps(records, name)[0] if key == "iou" else [run.get(key) for run in runs]
        known = [value for value in values if value is not None]
        if own == kind and (not rest or rest.endswith(" steps")) and known and len(known) == len(values):
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
    measured=f"""\
All masks are of sparsity {SPARSITY}. They come from calibrations shorter and longer than a run, and of \
one as long (the whole calibration), and (gradient mask) from the gradients of as many batches at the \
base's weights. They adapt at the learning rate that is best for the whole calibration's mask, gradient \
masks at the one that is best for the mask of a run's batches. Longer calibrations also see more of the \
training rows. "Another seed's mask" is the whole calibration's of the next seed; "per tensor" keeps the \
same share of every matrix. Masks are also compared with each other, by IoU: with the whole \
calibration's of the same seed, and with those of the same kind and length of other seeds.""",
    part="budget",
    tables=tables,
    panels=("iou", "nats"),
    panel=panel,
)


def main(arguments: list[str] | None = None) -> None:
    study_main(study_parser(__doc__).parse_args(arguments), run, REPORT, [SPARSITY])


if __name__ == "__main__":
    main()
