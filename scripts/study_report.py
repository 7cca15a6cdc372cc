"""What a study shows: Markdown, a figure, and a page that is read without the project, all from one source.

A study says what its report is, and its command runs the workloads and reports, or only reports:

    def tables(records) -> list[Table]: ...        # of one workload; `Table` is title, lines of cells, text
    def panel(axes, records, key): ...             # draws one panel of one workload, with labels

    REPORT = Report(
        name="sparsity",                           # <out>/sparsity.md, .png and .html
        title="Accuracy against sparsity",
        asked="What does it cost to train few entries? ...",   # plain words; paragraphs parted by empty lines
        measured="Every method has the best rate ...",         # what is special of this study
        part="main",                               # `part` of the results that it reports
        tables=tables,
        panels=("score", "nats"),                  # keys that `panel` is called with
        panel=panel,
    )

    def main(arguments=None):
        args = study_parser(__doc__).parse_args(arguments)     # has --report
        study_main(args, run, REPORT, sparsities)

`records` are what `read_cells` gives of a workload. What all studies share is said by `Report` itself: the
base and its hash, the task, sizes of runs and rows, seeds, rates. Words that the page uses are explained at
its end: add new ones to scripts/terms.py. A report needs the .jsonl files of its folder alone. A study that
is not made of workloads calls `write_report` with sections of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lota.plots import figure_at, png
from lota.report.page import Lines, Section, markdown, write_page
from lota.storage import atomic_path
from scripts.cells import Record, read_cells
from scripts.study import RATE_SEED, TESTED, VALIDATION, Study
from scripts.study_command import S, run_study
from scripts.terms import METRICS, TASKS, terms_in
from scripts.workloads import BASES, SMOKE, WORKLOADS, Workload, sizes_key
from tasks import get_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Axes, Sequence[Record], str], None]

SIZE = (4.8, 3.4)  # of a panel, inches
TRAINING = """Runs train with the optimizer RMSprop, unless a method's name says otherwise; the learning \
rate grows for a tenth of the steps and then falls to zero."""
SHARED = f"""Every run starts from the same base. {TRAINING}

Learning rates are chosen by the loss on validation rows, which are {VALIDATION:.0%} of the training rows, \
chosen by a hash of their content and left out of training, with a seed ({RATE_SEED}) that is not reported. \
The grid of rates has factors of 2 to 2.5, and the best rate has a worse one on either side, unless the grid \
ends there. Test rows choose nothing: scores and losses on tasks are of test rows."""


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    lines: Lines
    text: str = ""  # how to read it


def about_sections(asked: str, measured: str, shared: str = SHARED) -> list[Section]:
    """What a page begins with. shared: how all studies on workloads are measured."""
    return [Section("What was asked", asked), Section("How it was measured", _joined(measured, shared))]


def study_sections(tables: Sequence[Table], level: int = 3) -> list[Section]:
    """A section per table that has lines below its header."""
    full = (table for table in tables if len(table.lines) > 1)
    return [Section(table.title, table.text, table=table.lines, level=level) for table in full]


@dataclass(frozen=True)
class Report:
    """What a study on workloads reports; see the module's text."""

    name: str
    title: str
    asked: str
    measured: str
    part: str
    tables: Callable[[Sequence[Record]], list[Table]]
    panel: Draw
    panels: Sequence[str] = ("score", "nats")
    workloads: Mapping[str, Workload] = field(default_factory=lambda: WORKLOADS)

    def write(self, out: Path) -> str:
        """Write what is there of all workloads, return the Markdown."""
        every = read_cells(out).items()
        found = {
            name: records
            for name, records in every
            if any(record["cell"]["part"] == self.part for record in records)
        }
        if not found:
            sys.exit(f"{out} has no result of this study: run it first")
        about = about_sections(self.asked, self.measured)
        results = [section for name, records in found.items() for section in self.sections(name, records)]
        return write_report(out, self.name, self.title, about, results, self.draw(found, self.panels))

    def sections(self, name: str, records: Sequence[Record]) -> Iterator[Section]:
        """Heading and facts of a workload, its figures, its tables."""
        yield Section(name, items=list(facts(name, records, self.part, self.workloads)))
        for key in self.panels:
            figure = self.draw({name: records}, [key])
            for axes in figure.axes:
                alt = f"{name}: {axes.get_ylabel()} against {axes.get_xlabel()}"
                yield Section("", figure=figure, alt=alt)
        yield from study_sections(self.tables(records))

    def draw(self, found: Mapping[str, Sequence[Record]], keys: Sequence[str]) -> Figure:
        """A line of panels per workload, one for each key; those that stay empty are left out."""
        with figure_at(None, SIZE[0] * len(keys), SIZE[1] * len(found) + 0.6, "") as figure:
            labels: dict[str, Any] = {}
            grid = figure.subplots(len(found), len(keys), squeeze=False)
            for line, (name, records) in zip(grid, found.items(), strict=True):
                for axes, key in zip(line, keys, strict=True):
                    self.panel(axes, records, key)
                    axes.set_title(name)
                    axes.grid(alpha=0.3)
                    labels |= {
                        label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
                    }
                    if not axes.has_data():
                        axes.remove()
            names = [textwrap.fill(label, 30) for label in labels]
            figure.legend(
                list(labels.values()),
                names,
                loc="outside lower center",
                ncols=1 + len(keys),
                fontsize="small",
            )
        return figure


def facts(
    name: str, records: Sequence[Record], part: str, workloads: Mapping[str, Workload]
) -> Iterator[str]:
    """What the results of a workload are of: a reader of the page may not have the project."""
    base = next(record for record in records if record["cell"]["part"] == "base")
    workload = {**workloads, "smoke": SMOKE}.get(name)
    if workload and sizes_key(workload, base["base"]) == base["cell"].get("sizes"):
        yield from _sizes(workload, base)
    else:
        yield f"Base: {_weights(base)}."
        yield "Sizes: of another version of this study, not known here."
    seeds = sorted({r["cell"]["seed"] for r in records if r["cell"]["part"] == part})
    rates = sorted({r["cell"]["lr"] for r in records if r["cell"]["part"] == "rate"})
    yield f"Seeds of what is reported: {', '.join(map(str, seeds))}."
    if rates:
        yield f"Learning rates that were tried: {', '.join(f'{rate:g}' for rate in rates)}."
    seconds = seconds_of_runs(records)
    sums = f"{len(seconds):,} runs, {sum(seconds) / 3600:.2g} hours of one processor core"
    yield f"All studies of this workload together: {sums}."


def seconds_of_runs(records: Sequence[Record]) -> list[float]:
    """Processor time of every run; one that several studies report counts once."""
    found = {}
    for record in records:
        if "trained" in record:
            cell = record["cell"]
            shared = {**cell, "part": TESTED} if cell["part"] in TESTED else cell
            found[json.dumps(shared, sort_keys=True)] = record.get("cpu_seconds", 0.0)
    return list(found.values())


def _sizes(workload: Workload, base: Record) -> Iterator[str]:
    """Base, task, runs and rows."""
    task, about = get_task(workload.task), BASES[workload.base].about
    yield f"Base: {workload.base}, {about}; {_weights(base)}."
    metric = METRICS.get(str(task.metric), task.metric) if workload.n_scored else None
    yield f"Task: {workload.task}, {TASKS.get(workload.task, 'see its name')}; score: {metric or 'none'}."
    yield (
        f"Training: {workload.steps} steps of {workload.batch_size} rows; trained weights and "
        f"optimizer's state in fp32, products in {BASES[workload.base].products}. Rows of more than "
        f"{workload.max_length} tokens are left out everywhere."
    )
    rows, text = base["rows"], base["own_text"]
    scored = min(workload.n_scored, rows["test"])
    first = f", the first {scored} of them also for the score" if scored else ""
    yield (
        f"Rows: {rows['train']:,} training rows to draw from, {rows['validation']} validation rows to choose "
        f"by, {rows['test']} test rows{first}; own text: {text['documents']} documents, {text['bytes']:,} "
        "bytes. They are the same for every run."
    )


def _weights(base: Record) -> str:
    return f"{base['trained']:,} weights, SHA-256 of the weights {base['base']}"


def write_report(
    out: Path, name: str, title: str, about: Sequence[Section], results: Sequence[Section], figure: Figure
) -> str:
    """Write <out>/<name>.md (the results), .png and .html (all, and the words used); returns the Markdown."""
    text = markdown_of(results)
    terms = terms_in([title, *map(_text, about), text])
    sections = [*about, *results, Section("What the words mean", items=terms)]
    write_page(out, title, sections, name=f"{name}.html")
    for path, content in ((f"{name}.md", text.encode()), (f"{name}.png", png(figure))):
        with atomic_path(out / path) as temporary:
            temporary.write_bytes(content)
    return text


def markdown_of(sections: Sequence[Section]) -> str:
    """Titles, texts, tables and lists; the highest heading has three marks, for a document's section."""
    return "\n\n".join(filter(None, map(_text, sections))) + "\n"


def _text(section: Section) -> str:
    title = f"{'#' * (section.level + 1)} {section.title}" if section.title else ""
    items = "\n".join(f"- {item}" for item in section.items)
    return _joined(title, section.text, markdown(section.table) if section.table else "", items)


def _joined(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def study_main(
    args: argparse.Namespace,
    run: Callable[[S, argparse.Namespace], None],
    report: Report,
    sparsities: Sequence[float] = (0.9,),
    kind: type[S] = Study,  # type: ignore[assignment]
) -> None:
    """Run the chosen workloads, unless a report alone is wanted, and report what is there."""
    if not args.report:
        run_study(args, run, sparsities, report.workloads, kind)
    print(report.write(args.out))
