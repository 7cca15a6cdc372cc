"""Parts of the report on scores: each metric of each task against sparsity, with error bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lota.evaluate.estimates import mean_and_stderr
from lota.plots import against_sparsity, bars
from lota.report.groups import Group
from lota.report.page import Section, file_name
from lota.report.reading import Run, Score
from lota.report.run_sections import last, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


HELD_OUT = "held-out loss"
IN_PER_CENT = (
    "match",
    "accuracy",
    "rate",
    "acc",
    "acc_norm",
)  # endings of metrics that are shares of the examples
BASE = "base model"
TEXT = "Error bars and bands: one standard error, over seeds where there are several, else over examples."
Found = tuple[float, float | None, int]  # mean, standard error, runs


def score_sections(groups: Sequence[Group], base: Sequence[Score] = ()) -> Iterable[Section]:
    """A figure and a table per task and metric. base: scores of the model that the runs started from."""
    pairs = dict.fromkeys(
        (score.task, score.metric) for group in groups for run in group.runs for score in scores_of(run)
    )
    for task, metric in pairs:
        found: dict[Group | str, Found] = {}
        for score in base:
            if (score.task, score.metric) == (task, metric):
                found[BASE] = (score.value, score.stderr, 1)
        found |= {group: mean for group in groups if (mean := _mean(group, task, metric)) is not None}
        title = f"{metric.replace('_', ' ').capitalize()} on {task}"
        yield Section(title, TEXT, _draw(found, task, metric), file_name(metric, task), _table(found, metric))


def scores_of(run: Run) -> list[Score]:
    """Those of the evaluation, and the last held-out loss of the log."""
    loss = last(run, "nats_per_token/eval")
    own = [] if loss is None else [Score(", ".join(run.settings["datasets"]), HELD_OUT, loss, None, 0)]
    return [*run.scores, *own]


def _mean(group: Group, task: str, metric: str) -> Found | None:
    found = [s for run in group.runs for s in scores_of(run) if (s.task, s.metric) == (task, metric)]
    if len(found) == 1:
        return found[0].value, found[0].stderr, 1
    return (*mean_and_stderr([score.value for score in found]), len(found)) if found else None


def _draw(found: Mapping[Group | str, Found], task: str, metric: str) -> Figure:
    """Over sparsity; bars where no run has one."""
    scale = 100 if metric.endswith(IN_PER_CENT) else 1
    label = f"{metric.replace('_', ' ')} on {task}" + (" (%)" if scale == 100 else "")
    label = f"{HELD_OUT} on {task} (nats per response token)" if metric == HELD_OUT else label
    curves, levels = {}, {}
    for group, (mean, error, _) in found.items():
        drawn = (scale * mean, None if error is None else scale * error)
        if isinstance(group, Group) and group.sparsity is not None:
            curves.setdefault(group.method, []).append((group.sparsity, *drawn))
        else:
            levels[group if isinstance(group, str) else group.name] = drawn
    if curves:
        drawn = [(mean - (error or 0), mean + (error or 0)) for mean, error in levels.values()]
        drawn += [(m - (e or 0), m + (e or 0)) for points in curves.values() for _, m, e in points]
        limits = _percent_limits(drawn) if scale == 100 else None
        return against_sparsity(curves, label=label, levels=levels, limits=limits)
    return bars({label: list(levels.values())}, list(levels))


def _percent_limits(drawn: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Ends of an axis of per cents: a little more than what is drawn, never below 0 or above 100."""
    low, high = min(low for low, _ in drawn), max(high for _, high in drawn)
    room = max(5.0, 0.1 * (high - low))
    return max(0.0, low - room), min(100.0, high + room)


def _table(found: Mapping[Group | str, Found], metric: str) -> list[list[str]]:
    table = [["method", "sparsity", metric.replace("_", " "), "standard error", "runs"]]
    for group, (mean, error, runs) in found.items():
        name = group if isinstance(group, str) else group.method
        sparsity = None if isinstance(group, str) else group.sparsity
        table.append([name, number(sparsity, "g"), f"{mean:.4f}", number(error, ".4f"), str(runs)])
    return table
