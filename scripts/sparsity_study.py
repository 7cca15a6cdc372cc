"""Accuracy against sparsity: LoTA, other masks of the same size, LoRA of as many entries, full fine-tuning.

    OMP_NUM_THREADS=1 python -m scripts.sparsity_study --workloads toy_sort "sql on study-llama"

Every method at every sparsity has the best learning rate of a grid with factors of 2 to 2.5, by validation
loss, and is measured on test rows with several seeds. A seed repeats everything: data order, calibration,
masks. LoTA's calibration is a run of the same length; "twice the steps" are methods that get both.
Goes on where it was interrupted. Writes sparsity.md, .png and .html beside the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lota.evaluate.estimates import mean_and_stderr
from lota.plots import PALETTE
from scripts.cells import COLUMNS, LABELS, Record, results, shown
from scripts.methods import DENSE, SCOPE, Method
from scripts.study import Study
from scripts.study_command import study_parser
from scripts.study_report import Report, Table, study_main

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPARSITIES = (0.5, 0.9, 0.99, 0.999)
PAIRED = 0.9  # sparsity of the masks that dense methods are compared with
MASKS = {
    "LoTA": "task_vector",
    "random mask": "random",
    "magnitude mask": "magnitude",
    "gradient mask": "gradient",
    "SNIP mask": "snip",
}
LORA = {"LoRA, RMSprop": {"optimizer": "RMSprop"}, "LoRA, AdamW": {"optimizer": "AdamW"}}
_TWICE = "twice the steps"
LONGER = [  # as many steps as a calibration and a run together
    Method(f"{DENSE.name}, {_TWICE}", passes=2),
    replace(SCOPE, name=f"{SCOPE.name}, {_TWICE}", passes=2),
    Method(f"random mask, {_TWICE}", 0.9, "random", passes=2, start=5e-3),
    Method(f"LoRA, RMSprop, {_TWICE}", 0.9, None, LORA["LoRA, RMSprop"], lora=True, passes=2, start=5e-3),
]


def families(sparsities: Sequence[float]) -> dict[str, list[Method]]:
    """Name -> a method at each sparsity; the search for a rate begins with that of the sparsity before."""
    masks = [
        [Method(name, sparsity, saliency, start=1e-2) for sparsity in sparsities]
        for name, saliency in MASKS.items()
    ]
    adapters = [
        [Method(name, sparsity, settings=settings, lora=True, start=5e-3) for sparsity in sparsities]
        for name, settings in LORA.items()
    ]
    return {
        family[0].name: family for family in ([DENSE], [SCOPE], *masks, *adapters, *([one] for one in LONGER))
    }


def run(study: Study, args: argparse.Namespace) -> None:
    """The chosen methods of one workload."""
    ranks = set[tuple[str, int]]()
    for name, family in families(study.sparsities).items():
        start = None
        for method in family if name in args.methods else ():
            if method.lora and study.rank_for(method.sparsity or 0) == 1 and (method.name, 1) in ranks:
                continue  # fewer entries than rank 1 has, which is there already
            ranks |= {(method.name, study.rank_for(method.sparsity or 0))} if method.lora else set()
            start = study.rate(method, start)
            for seed in args.seeds:
                study.measured(method, seed, start, "main", test=True)


def grouped(records: Sequence[Record]) -> dict[tuple[str, float | None], list[Record]]:
    """(method, sparsity) -> its runs that are reported."""
    found: dict[tuple[str, float | None], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        if cell["part"] == "main":
            found.setdefault((cell["method"], cell["sparsity"]), []).append(record)
    order = list(families(SPARSITIES))
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1] or 0.0)))


def tables(records: Sequence[Record]) -> list[Table]:
    """Score, losses and rate of every method and sparsity, the base last."""
    header = [
        "method",
        "sparsity",
        "trained entries",
        "lr",
        *(name for name, *_ in COLUMNS.values()),
        "loss minus LoTA's",
        "seeds",
    ]
    lines, groups = [header], grouped(records)
    for (name, sparsity), runs in groups.items():
        rates = ", ".join(f"{rate:g}" for rate in sorted({run["cell"]["lr"] for run in runs}))
        entries = [str(sparsity or "-"), f"{runs[0]['trained']:,}", rates]
        lota = groups.get(("LoTA", sparsity or PAIRED), [])
        lines.append([name, *entries, *results(runs), differences(runs, lota), str(len(runs))])
    base = [record for record in records if record["cell"]["part"] == "base"]
    text = f"""The last column but one: nats per token, minus those of LoTA at the same sparsity (of methods \
without one: at {PAIRED}), seed by seed."""
    return [Table("All methods", [*lines, ["base", "-", "0", "-", *results(base), "-", "-"]], text)]


def differences(runs: Sequence[Record], others: Sequence[Record]) -> str:
    """Test loss minus that of the others, of the seeds that both have: mean ± standard error."""
    by_seed = {run["cell"]["seed"]: run["nats"] for run in others}
    pairs = [(run["nats"], by_seed.get(run["cell"]["seed"])) for run in runs]
    if runs is others or any(one is None or other is None for one, other in pairs):
        return "-"
    return shown([one - other for one, other in pairs])


def panel(axes: Axes, records: Sequence[Record], key: str) -> None:
    """Score or loss against the number of entries that train; full fine-tuning is a level."""
    groups = grouped(records)
    for number, name in enumerate(families(SPARSITIES)):  # colours are the same in every panel
        looks: dict[str, Any] = {"color": PALETTE[number % len(PALETTE)], "label": name}
        looks["linestyle"] = "-" if number < len(PALETTE) else "--"
        points, dense = [], False
        for (method, sparsity), runs in groups.items():
            values = [run[key] for run in runs if run.get(key) is not None]
            if method == name and len(values) == len(runs):
                mean, error = mean_and_stderr(values)
                points.append((runs[0]["trained"], mean, error or 0))
                dense = not sparsity
        if points and dense:
            axes.axhline(points[0][1], **looks)
        elif points:
            entries, means, errors = zip(*sorted(points), strict=True)
            axes.errorbar(entries, means, errors, capsize=2, **looks)
    counts = [runs[0]["trained"] for (_, sparsity), runs in groups.items() if sparsity] or [1]
    axes.set(xlabel="entries that train", ylabel=LABELS[key], xscale="log")
    axes.set_xlim(min(counts) / 1.5, max(counts) * 1.5)


REPORT = Report(
    name="sparsity",
    title="Accuracy against sparsity",
    asked="""A model that is adapted to a task usually has all its weights changed. How few of them are \
enough, and does it matter which? LoTA lets only those entries train that a first full fine-tuning changed \
most. It is compared with masks of the same size that are chosen otherwise, with LoRA of about as many \
entries, and with full fine-tuning, also of twice the steps, since LoTA's calibration costs as many steps \
as its training.""",
    measured="""Every method has, at every sparsity, a learning rate of its own. A seed repeats everything: \
the order of the rows, the calibration, the masks, the training.""",
    part="main",
    tables=tables,
    panel=panel,
)


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--methods", nargs="+", choices=families([0.9]), default=list(families([0.9])))
    args = parser.parse_args(arguments)
    study_main(args, run, REPORT, [0.9] if args.smoke else args.sparsities)


if __name__ == "__main__":
    main()
