"""Parts of the page on sequences of tasks: forgetting matrices and the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lota.lotto.forgetting import SUMMARIES
from lota.lotto.ledger import SHOWN_DIGITS, Entry
from lota.plots import heatmap
from lota.report.page import Section, cell, file_name
from lota.report.reading import RunRecord

# key of the ledger -> key of forgetting.json, title, what the values are
KINDS = {
    "scores": ("score", "Scores", "score"),
    "losses": ("loss", "Held-out losses", "held-out loss (nats per response token)"),
}
SETTINGS = ("method", "sparsity", "order", "seed")
NOTHING = {"value": None, "stderr": None}  # the summary of a single task
COMPARISON_TEXT = (
    "Average over all tasks after the last stage; backward transfer: how much later stages changed what a "
    "task had after its own; forgetting: how far it fell below its best. With standard errors over examples."
)
LEDGER_TEXT = (
    "What each stage kept; for each earlier task, the entries that both masks keep, and the hash of the "
    "values that the earlier one keeps, before and after the stage."
)
Measured = tuple[float | None, float | None]  # a value and its standard error


def sequence_sections(run: RunRecord) -> Iterable[Section]:
    """Results of a sequence on each task after each stage, then what each stage kept and left alone."""
    for kind, (part, title, label) in KINDS.items():
        tasks, rows = _results(run, kind, part)
        errors = [[error for _, error in line] for line in rows.values()]
        if not any(value is not None for line in rows.values() for value, _ in line):
            run.notes.append(f"its ledger holds no {kind}: no forgetting matrix of them")
            continue
        metrics = ", ".join(dict.fromkeys(map(str, run.forgetting.get("metrics", {}).values())))
        figure = heatmap(
            [[value for value, _ in line] for line in rows.values()],
            list(rows),
            tasks,
            title="",
            label=metrics.replace("_", " ") if kind == "scores" and metrics else label,
            column_label="evaluated on",
            errors=errors,
        )
        table = [
            ["", *tasks],
            *([row, *(cell(value, ".4f", error) for value, error in line)] for row, line in rows.items()),
        ]
        text = "With standard errors over examples." if any(map(any, errors)) else ""
        yield Section(f"{title} of {run.name}", text, figure, file_name("forgetting", part, run.name), table)
    yield Section(f"Ledger of {run.name}", LEDGER_TEXT, table=_ledger_table(run.stages))


def _results(run: RunRecord, kind: str, part: str) -> tuple[list[str], dict[str, list[Measured]]]:
    """(tasks, row -> result on each task): after each stage, from the ledger.

    From forgetting.json: standard errors, and a first row for the model that the sequence started from.
    """
    learnt = [stage.name for stage in run.stages]
    tasks = list(dict.fromkeys([*learnt, *(task for stage in run.stages for task in getattr(stage, kind))]))
    matrix, order = run.forgetting.get(part, {}), run.forgetting.get("tasks", [])

    def line(values: Mapping[str, float], stderrs: Sequence[float | None]) -> list[Measured]:
        by_task = dict(zip(order, stderrs, strict=False))
        return [(values.get(task), by_task.get(task)) for task in tasks]

    rows = {}
    if "base" in matrix:
        rows["base model"] = line(dict(zip(order, matrix["base"], strict=True)), matrix["base_stderr"])
    stderrs = dict(enumerate(matrix.get("stderr", [])))
    for at, stage in enumerate(run.stages):
        rows[f"after {stage.name}"] = line(getattr(stage, kind), stderrs.get(at, []))
    return tasks, rows


def _ledger_table(stages: Sequence[Entry]) -> list[list[str]]:
    table = [["task", "kept", "free after it", "mask", "earlier task", "shared", "hash before", "hash after"]]
    for stage in stages:
        first = [stage.name, f"{stage.kept:,}", f"{stage.free_after:,}", str(stage.mask or "-")]
        for task, shared in stage.overlap.items():
            hashes = (found.get(task, "-")[:SHOWN_DIGITS] for found in (stage.hash_before, stage.hash_after))
            table.append([*first, task, f"{shared:,}", *hashes])
            first = [""] * 4
        if not stage.overlap:
            table.append([*first, *["-"] * 4])
    return table


def sequence_comparison(runs: Sequence[RunRecord]) -> Iterable[Section]:
    """The summaries of several sequences side by side."""
    for part, title in (("score", "scores"), ("loss", "held-out losses")):
        compared = [run for run in runs if run.forgetting.get(part, {}).get("average")]
        if len(compared) > 1:
            table = [["run", *SETTINGS, *(key.replace("_", " ") for key in SUMMARIES)]]
            for run in compared:
                settings = [str(run.settings.get(key, "-")) for key in SETTINGS]
                found = [run.forgetting[part].get(key) or NOTHING for key in SUMMARIES]
                summaries = [cell(summary["value"], ".4f", summary["stderr"]) for summary in found]
                table.append([run.name, *settings, *summaries])
            yield Section(f"Sequences compared by {title}", COMPARISON_TEXT, table=table)
