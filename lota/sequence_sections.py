"""Parts of the report on sequences of tasks: forgetting matrices and the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lota import plots
from lota.report import Section, file_name
from lota.run_reading import Run

# key of the ledger -> key of forgetting.json, title, what the values are
KINDS = {
    "scores": ("score", "Scores", "score"),
    "losses": ("loss", "Held-out losses", "held-out loss (nats per response token)"),
}
HASH_DIGITS = 12  # shown
LEDGER_TEXT = (
    "What each stage kept; for each earlier task, the entries that both masks keep, and the hash of the "
    "values that the earlier one keeps, before and after the stage."
)


def sequence_sections(run: Run) -> Iterable[Section]:
    """Results of a sequence on each task after each stage, then what each stage kept and left alone."""
    for kind, (part, title, label) in KINDS.items():
        learnt = [stage["name"] for stage in run.stages]
        tasks = list(dict.fromkeys([*learnt, *(task for stage in run.stages for task in stage[kind])]))
        values = [[stage[kind].get(task) for task in tasks] for stage in run.stages]
        if not any(value is not None for line in values for value in line):
            run.notes.append(f"its ledger holds no {kind}: no forgetting matrix of them")
            continue
        rows, errors = [f"after {name}" for name in learnt], _errors(run, part, tasks)
        metrics = ", ".join(dict.fromkeys(map(str, run.forgetting.get("metrics", {}).values())))
        figure = plots.heatmap(
            values,
            rows,
            tasks,
            title="",
            label=metrics.replace("_", " ") if kind == "scores" and metrics else label,
            column_label="evaluated on",
            errors=errors,
        )
        table = [["", *tasks]]
        for row, line, line_errors in zip(rows, values, errors, strict=True):
            table.append([row, *map(_cell, line, line_errors)])
        text = "With standard errors over examples." if any(map(any, errors)) else ""
        yield Section(f"{title} of {run.name}", text, figure, file_name("forgetting", part, run.name), table)
    yield Section(f"Ledger of {run.name}", LEDGER_TEXT, table=_ledger(run.stages))


def _errors(run: Run, part: str, tasks: Sequence[str]) -> list[list[float | None]]:
    """Standard errors from forgetting.json, None where it has none of the stage and task."""
    found = run.forgetting.get(part, {}).get("stderr", [])
    order = run.forgetting.get("tasks", [])
    lines = []
    for at in range(len(run.stages)):
        by_task = dict(zip(order, found[at], strict=True)) if at < len(found) else {}
        lines.append([by_task.get(task) for task in tasks])
    return lines


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _ledger(stages: Sequence[dict[str, Any]]) -> list[list[str]]:
    table = [["task", "kept", "free after it", "mask", "earlier task", "shared", "hash before", "hash after"]]
    for stage in stages:
        first = [stage["name"], f"{stage['kept']:,}", f"{stage['free_after']:,}", str(stage["mask"] or "-")]
        earlier = [
            [
                task,
                f"{shared:,}",
                *(str(stage[key].get(task, "-"))[:HASH_DIGITS] for key in ("hash_before", "hash_after")),
            ]
            for task, shared in stage["overlap"].items()
        ]
        for at, line in enumerate(earlier or [["-"] * 4]):
            table.append([*(first if at == 0 else [""] * 4), *line])
    return table
