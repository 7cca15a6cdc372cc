"""Parts of the report on sequences of tasks: forgetting matrices and the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lota import plots
from lota.lotto.ledger import Entry
from lota.report.page import Section, file_name
from lota.report.reading import Run

# key of the ledger -> key of forgetting.json, title, what the values are
KINDS = {
    "scores": ("score", "Scores", "score"),
    "losses": ("loss", "Held-out losses", "held-out loss (nats per response token)"),
}
SUMMARIES = ("average", "backward_transfer", "forgetting")
COMPARED_TEXT = (
    "Average over all tasks after the last stage; backward transfer: how much later stages changed what a "
    "task had after its own; forgetting: how far it fell below its best. With standard errors over examples."
)
HASH_DIGITS = 12  # shown
LEDGER_TEXT = (
    "What each stage kept; for each earlier task, the entries that both masks keep, and the hash of the "
    "values that the earlier one keeps, before and after the stage."
)
Pair = tuple[float | None, float | None]  # value and its standard error


def sequence_sections(run: Run) -> Iterable[Section]:
    """Results of a sequence on each task after each stage, then what each stage kept and left alone."""
    for kind, (part, title, label) in KINDS.items():
        tasks, rows = _matrix(run, kind, part)
        values = [[mean for mean, _ in line] for line in rows.values()]
        errors = [[error for _, error in line] for line in rows.values()]
        if not any(value is not None for line in values for value in line):
            run.notes.append(f"its ledger holds no {kind}: no forgetting matrix of them")
            continue
        metrics = ", ".join(dict.fromkeys(map(str, run.forgetting.get("metrics", {}).values())))
        figure = plots.heatmap(
            values,
            list(rows),
            tasks,
            title="",
            label=metrics.replace("_", " ") if kind == "scores" and metrics else label,
            column_label="evaluated on",
            errors=errors,
        )
        table = [["", *tasks], *([row, *(_cell(*pair) for pair in line)] for row, line in rows.items())]
        text = "With standard errors over examples." if any(map(any, errors)) else ""
        yield Section(f"{title} of {run.name}", text, figure, file_name("forgetting", part, run.name), table)
    yield Section(f"Ledger of {run.name}", LEDGER_TEXT, table=_ledger(run.stages))


def _matrix(run: Run, kind: str, part: str) -> tuple[list[str], dict[str, list[Pair]]]:
    """(tasks, row -> (value, standard error) of each): after each stage, from the ledger.

    What forgetting.json has besides: standard errors, and a first row for the model that it all started from.
    """
    learnt = [stage.name for stage in run.stages]
    tasks = list(dict.fromkeys([*learnt, *(task for stage in run.stages for task in getattr(stage, kind))]))
    more, order = run.forgetting.get(part, {}), run.forgetting.get("tasks", [])
    rows: dict[str, list[Pair]] = {}
    if "base" in more:
        rows["base model"] = _pairs(
            tasks, _by_task(order, more["base"]), _by_task(order, more["base_stderr"])
        )
    for at, stage in enumerate(run.stages):
        errors = more.get("stderr", [])[at : at + 1]
        rows[f"after {stage.name}"] = _pairs(
            tasks, getattr(stage, kind), _by_task(order, *errors) if errors else {}
        )
    return tasks, rows


def _by_task(tasks: Sequence[str], values: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(tasks, values, strict=True))


def _pairs(tasks: Sequence[str], values: Mapping[str, Any], errors: Mapping[str, Any]) -> list[Pair]:
    return [(values.get(task), errors.get(task)) for task in tasks]


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _ledger(stages: Sequence[Entry]) -> list[list[str]]:
    table = [["task", "kept", "free after it", "mask", "earlier task", "shared", "hash before", "hash after"]]
    for stage in stages:
        first = [stage.name, f"{stage.kept:,}", f"{stage.free_after:,}", str(stage.mask or "-")]
        earlier = []
        for task, shared in stage.overlap.items():
            hashes = (found.get(task, "-")[:HASH_DIGITS] for found in (stage.hash_before, stage.hash_after))
            earlier.append([task, f"{shared:,}", *hashes])
        for at, line in enumerate(earlier or [["-"] * 4]):
            table.append([*(first if at == 0 else [""] * 4), *line])
    return table


def compared(runs: Sequence[Run]) -> Iterable[Section]:
    """What several sequences came to: their summaries in forgetting.json side by side."""
    for part, title in (("score", "scores"), ("loss", "held-out losses")):
        rows = []
        for run in runs:
            found = run.forgetting.get(part, {})
            if found.get("average"):
                settings = [
                    str(run.settings.get(key, "-")) for key in ("method", "sparsity", "order", "seed")
                ]
                rows.append([run.name, *settings, *(_summary(found.get(key)) for key in SUMMARIES)])
        if len(rows) > 1:
            header = [
                "run",
                "method",
                "sparsity",
                "order",
                "seed",
                *(key.replace("_", " ") for key in SUMMARIES),
            ]
            yield Section(f"Sequences compared by {title}", COMPARED_TEXT, table=[header, *rows])


def _summary(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else _cell(found["value"], found["stderr"])
