"""Accuracy against sparsity: LoTA, other masks of the same size, LoRA of as many entries, full fine-tuning.

    OMP_NUM_THREADS=1 python -m scripts.sparsity_study --workloads toy_sort "sql on study-llama"

Every method at every sparsity has the best learning rate of a grid with factors of 2 to 2.5, by validation
loss, and is measured on test rows with several seeds. A seed repeats everything: data order, calibration,
masks. LoTA's calibration is a run of the same length; "twice the steps" is full fine-tuning that gets both.
Goes on where it was interrupted. Writes sparsity.md and sparsity.png beside the results (scripts/study.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lota.evaluate.estimates import mean_and_stderr
from lota.plots import PALETTE, figure_at
from scripts.cells import COLUMNS, Record, line, read_cells, results
from scripts.study import DENSE, Method, Study, run_study, study_parser

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
MASKS = {
    "LoTA": "task_vector",
    "random mask": "random",
    "magnitude mask": "magnitude",
    "gradient mask": "gradient",
    "SNIP mask": "snip",
}
LORA = {"LoRA, RMSprop": {"optimizer": "RMSprop"}, "LoRA, AdamW": {"optimizer": "AdamW"}}
LONGER = Method("full fine-tuning, twice the steps", passes=2)


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
    return {family[0].name: family for family in ([DENSE], [LONGER], *masks, *adapters)}


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
    return found


def table(records: Sequence[Record]) -> str:
    """Markdown: score, losses and rate of every method and sparsity, the base last."""
    header = ["method", "s", "trained entries", "lr", *(name for name, *_ in COLUMNS.values()), "seeds"]
    lines = [line(header), "|---" * len(header) + "|"]
    for (name, sparsity), runs in grouped(records).items():
        rates = ", ".join(f"{rate:g}" for rate in sorted({run["cell"]["lr"] for run in runs}))
        entries = [sparsity or "-", f"{runs[0]['trained']:,}", rates]
        lines.append(line([name, *entries, *results(runs), len(runs)]))
    base = [record for record in records if record["cell"]["part"] == "base"]
    return "\n".join([*lines, line(["base", "-", 0, "-", *results(base), "-"])])


def draw(found: dict[str, list[Record]], path: Path) -> None:
    """A column per workload: score and loss against the number of entries that train."""
    with figure_at(path, 4.2 * len(found), 6.4, "") as figure:
        panels = figure.subplots(2, len(found), squeeze=False)
        for column, (name, records) in enumerate(found.items()):
            groups = grouped(records)
            entries = [runs[0]["trained"] for (_, sparsity), runs in groups.items() if sparsity] or [1]
            for axes, key in zip(panels[:, column], ("score", "nats"), strict=True):
                _panel(axes, groups, key)
                axes.set(xlabel="entries that train", title=name)
                axes.set_xlim(min(entries) / 1.5, max(entries) * 1.5)
                axes.set_xscale("log")
        handles, labels = panels[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _panel(axes: Axes, groups: Mapping[tuple[str, float | None], list[Record]], key: str) -> None:
    names = dict.fromkeys(name for name, _ in groups)
    for number, name in enumerate(names):
        looks: dict[str, Any] = {"color": PALETTE[number % len(PALETTE)], "label": name}
        looks["linestyle"] = "-" if number < len(PALETTE) else "--"
        points, dense = [], False
        for (method, sparsity), runs in groups.items():
            values = [run[key] for run in runs if run.get(key) is not None]
            if method == name and len(values) == len(runs):
                mean, error = mean_and_stderr(values)
                points.append((runs[0]["trained"], mean, error or 0))
                dense = sparsity is None
        if points and dense:
            axes.axhline(points[0][1], **looks)
        elif points:
            entries, means, errors = zip(*points, strict=True)
            axes.errorbar(entries, means, errors, capsize=2, **looks)
    axes.set_ylabel("score" if key == "score" else "test loss, nats per token")
    axes.grid(alpha=0.3)
    axes.set_visible(axes.has_data())  # a task without a score has an empty place


def report(out: Path) -> str:
    """Write and return the tables of all workloads; draw the figure."""
    found = read_cells(out)
    text = "\n\n".join(f"### {name}\n\n{table(records)}" for name, records in found.items()) + "\n"
    (out / "sparsity.md").write_text(text, encoding="utf-8")
    draw(found, out / "sparsity.png")
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--report", action="store_true", help="table and figure of what is there, no run")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--methods", nargs="+", choices=families([0.9]), default=list(families([0.9])))
    args = parser.parse_args(arguments)
    if not args.report:
        run_study(args, run, [0.9] if args.smoke else args.sparsities)
    print(report(args.out))


if __name__ == "__main__":
    main()
