"""Tables, figure and page of the study of merging (scripts/merge_study.py)."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lota.evaluate.estimates import mean_and_stderr
from lota.plots import PALETTE, figure_at
from lota.report.page import Section
from lota.share.merge.rules import METHODS
from scripts.cells import LABELS, Record, read_cells, shown
from scripts.merge_grid import DENSITIES, FACTORS, FOLDER, KINDS, RULES, group_key, members_of
from scripts.study import RATE_SEED
from scripts.study_report import Table, about_sections, study_sections, write_report
from scripts.terms import METRICS, TASKS
from scripts.workloads import BASES, GROUPS, sizes_key
from tasks import get_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN = "own text, nats per byte"
NOT_MERGED = "(not merged)"
TITLE = "Three tasks merged into one model"
ASKED = """Three tasks were learnt apart, each from the same base. Can the three models be merged into one \
that does all three tasks? Do the task vectors of LoTA, of which nine entries in ten are zero, merge better \
than those of full fine-tuning? Does it help if no two of them change the same entry?"""
MEASURED = f"""\
Every task was learnt alone in four ways: by full fine-tuning; by full fine-tuning of attention and MLP, \
the matrices that masks choose from; by LoTA at a sparsity of 0.9, its mask read off that full \
fine-tuning; and by LoTA with disjoint masks, of which each leaves out the entries that the masks of earlier \
tasks keep. The first task's mask is the same in both.

The rules are those of merge_models.py: {", ".join(METHODS)}. Each was tuned alike, for each kind of task \
vectors: of the factors {", ".join(map(str, FACTORS))}, which the merged vector is multiplied with, and, \
where a rule thins the vectors out, of the densities {", ".join(map(str, DENSITIES))} (the share of entries \
that stay), those numbers were taken that gave the least loss on validation rows, in nats per token, mean of \
the three tasks. The rule sum has no numbers. Besides, a weight per task: beginning with the best factor of \
task_arithmetic, one weight after the other was moved to the best of the same factors, until no move of one \
made the loss less. The models that chose were learnt with seed {RATE_SEED}, which is not reported.

A merged model has the weights that merge_models.py writes: in the base's number format. So have the models \
of single tasks that it is compared with."""


def write(out: Path) -> str:
    """Write tables, figure and page of what is there; returns the tables in Markdown."""
    found = {name: records for name, records in read_cells(out / FOLDER).items() if of(records, "merged")}
    if not found:
        sys.exit(f"{out / FOLDER} has no merged model: run the study first")
    results = []
    for name, records in found.items():
        results += [
            Section(name, items=list(facts(name, records))),
            Section("", figure=draw({name: records})),
        ]
        tables = (merged_table, task_table, alone_table, common_table)
        results += study_sections([table(records) for table in tables])
    return write_report(out, "merging", TITLE, about_sections(ASKED, MEASURED), results, draw(found))


def of(records: Sequence[Record], part: str, **cell: object) -> list[Record]:
    """The records of a part of the study whose cells say so."""
    return [r for r in records if (cell | {"part": part}).items() <= r["cell"].items()]


def facts(name: str, records: Sequence[Record]) -> Iterator[str]:
    """What the numbers of a group are of."""
    (base,) = of(records, "base")
    weights = f"{base['weights']:,} weights, SHA-256 of the weights {base['base']}"
    members = members_of(name) if name == "smoke" or name in GROUPS else {}
    known = group_key([sizes_key(workload, base["base"]) for workload in members.values()])
    if members and known == base["cell"]["sizes"]:
        first = next(iter(members.values()))
        yield f"Base: {first.base}, {BASES[first.base].about}; {weights}."
        for workload in members.values():
            task = get_task(workload.task)
            metric = METRICS.get(str(task.metric), task.metric) if workload.n_scored else "none"
            yield (
                f"Task: {workload.task}, {TASKS.get(workload.task, 'see its name')}; score: {metric}; "
                f"{workload.steps} steps of {workload.batch_size} rows, of at most {workload.max_length} "
                f"tokens; at most {workload.n_validation} validation rows and {workload.n_test} test rows, "
                f"{workload.n_scored} of these for the score."
            )
    else:
        yield f"Base: {weights}. Sizes: of another version of this study, not known here."
    seeds = sorted({record["cell"]["seed"] for record in of(records, "merged")})
    yield f"Seeds of what is reported: {', '.join(map(str, seeds))}."
    yield f"Merges measured to choose: {len(of(records, 'tuning')):,}."


def merges(records: Sequence[Record], kind: str) -> Iterator[tuple[str, list[Record]]]:
    """(rule, its merges of all seeds) of a kind of vectors."""
    for rule in RULES:
        if found := of(records, "merged", vectors=kind, rule=rule):
            yield rule, found


def mean_nats(record: Record) -> float:
    """Of all tasks that a model was measured on."""
    return fmean(record["nats"].values())


def together(records: Sequence[Record], kind: str) -> list[Record]:
    """Seed by seed: what the tasks' own models have, each on its task, as if it were one model's."""
    seeds: dict[int, list[Record]] = {}
    for record in of(records, "alone", vectors=kind):
        seeds.setdefault(record["cell"]["seed"], []).append(record)
    return [
        {
            "nats": {task: nats for record in own for task, nats in record["nats"].items()},
            "scores": {task: score for record in own for task, score in record["scores"].items()},
            "own": fmean(record["own"] for record in own),
        }
        for own in seeds.values()
    ]


def means(runs: Sequence[Record]) -> list[str]:
    """Cells: score and loss, means of the tasks, and own text."""
    scores = [fmean(run["scores"].values()) for run in runs if run["scores"]]
    nats = [mean_nats(run) for run in runs]
    return [shown(scores, 100, 1), shown(nats), shown([run["own"] for run in runs], 1, 4)]


def merged_table(records: Sequence[Record]) -> Table:
    """The base, the tasks' own models, and every kind of vectors under every rule."""
    lines = [["vectors", "rule", "factor", "density", "tried", "score (%)", "nats per token", OWN, "seeds"]]
    lines.append(["base", *"----", *means(of(records, "base")), "-"])
    for kind in KINDS:
        if own := together(records, kind):
            lines.append([kind, NOT_MERGED, *"---", *means(own), str(len(own))])
        for rule, runs in merges(records, kind):
            cell = runs[0]["cell"]
            weights = " ".join(f"{weight:g}" for weight in cell["weights"] or [cell["factor"]])
            density = "-" if cell["density"] is None else f"{cell['density']:g}"
            tried = len(of(records, "tuning", vectors=kind, rule=rule))
            lines.append([kind, rule, weights, density, str(tried), *means(runs), str(len(runs))])
    text = f"""Score and loss: means of the tasks. Factor (or a weight per task, in the order of the next \
table) and density: what validation rows chose, of as many settings as were tried. "{NOT_MERGED}": each \
task's own model on its task."""
    return Table("Merged models", lines, text)


def task_table(records: Sequence[Record]) -> Table:
    """The same, task by task."""
    (base,) = of(records, "base")
    tasks = list(base["nats"])
    heads = (f"{task}, {measure}" for task in tasks for measure in ("score (%)", "nats per token"))
    lines = [["vectors", "rule", *heads], ["base", "-", *by_task([base], tasks)]]
    for kind in KINDS:
        if own := together(records, kind):
            lines.append([kind, NOT_MERGED, *by_task(own, tasks)])
        lines += [[kind, rule, *by_task(runs, tasks)] for rule, runs in merges(records, kind)]
    return Table("Merged models, task by task", lines)


def by_task(runs: Sequence[Record], tasks: Sequence[str]) -> list[str]:
    """Cells: score and loss of each task."""
    cells = []
    for task in tasks:
        cells.append(shown([run["scores"][task] for run in runs if task in run["scores"]], 100, 1))
        cells.append(shown([run["nats"][task] for run in runs]))
    return cells


def alone_table(records: Sequence[Record]) -> Table:
    """Every task's own model on its task."""
    lines = [["vectors", "task", "lr", "score (%)", "nats per token", OWN, "seeds"]]
    (base,) = of(records, "base")
    for kind in KINDS:
        for task in base["nats"]:
            if runs := of(records, "alone", vectors=kind, task=task):
                rates = ", ".join(f"{rate:g}" for rate in sorted({run["lr"] for run in runs}))
                own = shown([run["own"] for run in runs], 1, 4)
                lines.append([kind, task, rates, *by_task(runs, [task]), own, str(len(runs))])
    return Table("Models of single tasks", lines)


def common_table(records: Sequence[Record]) -> Table:
    """What two tasks' vectors share, means over pairs and seeds."""
    lines = [["vectors", "length", "entries of the smaller in both (%)", "signs differ there (%)", "cosine"]]
    for kind in KINDS:
        if found := of(records, "common", vectors=kind):
            length = shown([fmean(record["norms"]) for record in found], 1, 1)
            pairs = [record["pairs"] for record in found]
            overlap = shown(_means(pairs, "overlap_share"), 100, 1)
            signs = shown(_means(pairs, "sign_conflict_share"), 100, 1)
            lines.append([kind, length, overlap, signs, shown(_means(pairs, "cosine"))])
    text = "Of two tasks each: means over the pairs, and over the seeds."
    return Table("What the task vectors share", lines, text)


def _means(seeds: Sequence[Sequence[Record]], key: str) -> list[float]:
    """A mean per seed, over its pairs of tasks that have the value."""
    known = ([pair[key] for pair in pairs if pair[key] is not None] for pairs in seeds)
    return [fmean(values) for values in known if values]


def draw(found: Mapping[str, Sequence[Record]]) -> Figure:
    """A panel per group: loss of the merged models, a point per kind of vectors and rule."""
    with figure_at(None, 7.5, 3.4 * len(found) + 0.9, "") as figure:
        panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
        for axes, (name, records) in zip(panels, found.items(), strict=True):
            _panel(axes, records)
            axes.set_title(name)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _panel(axes: Axes, records: Sequence[Record]) -> None:
    for number, (kind, color) in enumerate(zip(KINDS, PALETTE, strict=False)):
        points = [
            (RULES.index(rule) + 0.18 * (number - 1.5), *mean_and_stderr([mean_nats(run) for run in runs]))
            for rule, runs in merges(records, kind)
        ]
        if points:
            places, values, errors = zip(*points, strict=True)
            bars = [error or 0.0 for error in errors]
            axes.errorbar(places, values, bars, color=color, marker="o", linestyle="", capsize=3, label=kind)
        if own := together(records, kind):
            axes.axhline(fmean(mean_nats(run) for run in own), color=color, linestyle=":")
    (base,) = of(records, "base")
    axes.axhline(mean_nats(base), color="black", linestyle="--", label="base")
    axes.plot([], [], color="black", linestyle=":", label="each task's own model")
    axes.set_xticks(range(len(RULES)), [textwrap.fill(rule.replace("_", " "), 12) for rule in RULES])
    axes.set_ylabel(f"{LABELS['nats']}\n(mean of the tasks)")
    axes.grid(alpha=0.3)
