"""How much of earlier tasks is left: the matrix of results on task j after stage i, and its summaries.

Average and backward transfer as in Lopez-Paz and Ranzato (arXiv 1706.08840), forgetting as in Chaudhry et al.
(arXiv 1801.10112). With T tasks and a[i][j] the result on task j after stage i, both counted from 1:

    average            sum over j of a[T][j], over T
    backward transfer  sum over j < T of a[T][j] - a[j][j], over T - 1
    forgetting         sum over j < T of (max over i < T of a[i][j]) - a[T][j], over T - 1

For losses, where less is better, the last two are taken of -a, so that more transfer is better and more
forgetting worse in either case. Standard errors are over held-out examples: differences are paired, tasks
are independent, and the choice of the best stage counts as given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.evaluate.estimates import Estimate, mean_of
from lota.lotto.held_out import Measured
from lota.plots import heatmap
from lota.storage import atomic_path, write_json
from lota.utils import aligned

NAME = "forgetting"  # .json, .txt, .png, _loss.png
SUMMARIES = ("average", "backward_transfer", "forgetting")
LOSS = "held-out loss (nats per token)"
Number = tuple[float, float | None]  # value and its standard error


@dataclass(frozen=True)
class Matrix:
    """Results of tasks after each stage."""

    tasks: Sequence[str]  # in the order in which they were learnt
    rows: Sequence[Mapping[str, Estimate]]  # task -> result, after the stage that learnt tasks[0] and so on
    smaller_is_better: bool = False  # for losses

    def average(self) -> Number:
        """Over all tasks, after the last stage."""
        return mean_of([self.rows[-1][task] for task in self.tasks])

    def backward_transfer(self) -> Number | None:
        """How much later stages changed what a task had right after its own; None for a single task."""
        return self._over_earlier(lambda at, task: self._gain(self.rows[-1][task], self.rows[at][task]))

    def forgetting(self) -> Number | None:
        """How far each earlier task fell below the best that it ever had; None for a single task."""
        sign = -1 if self.smaller_is_better else 1

        def lost(at: int, task: str) -> Estimate:
            best = max((row[task] for row in self.rows[:-1]), key=lambda found: sign * found.value)
            return self._gain(best, self.rows[-1][task])

        return self._over_earlier(lost)

    def _gain(self, new: Estimate, old: Estimate) -> Estimate:
        return old.minus(new) if self.smaller_is_better else new.minus(old)

    def _over_earlier(self, difference: Callable[[int, str], Estimate]) -> Number | None:
        found = [difference(at, task) for at, task in enumerate(self.tasks[:-1])]
        return mean_of(found) if found else None

    def to_dict(self, base: Mapping[str, Estimate]) -> dict[str, Any]:
        """Returns plain values: matrix and results of the base with standard errors, summaries."""
        content: dict[str, Any] = {
            "matrix": [[row[task].value for task in self.tasks] for row in self.rows],
            "stderr": [[row[task].stderr for task in self.tasks] for row in self.rows],
            "base": [base[task].value for task in self.tasks],
            "base_stderr": [base[task].stderr for task in self.tasks],
        }
        for name in SUMMARIES:
            found = getattr(self, name)()
            content[name] = None if found is None else {"value": found[0], "stderr": found[1]}
        return content


def write_results(
    folder: Path, tasks: Sequence[str], stages: Sequence[Mapping[str, Measured]], base: Mapping[str, Measured]
) -> dict[str, Any]:
    """Write forgetting.json, .txt and the heat maps of a sequence; returns what is in the JSON file.

    stages: results on every task after each stage. The scores' part is left out if a task has none, or a
    perplexity, of which less is better.
    """
    metrics = [base[task].metric for task in tasks]
    content: dict[str, Any] = {"tasks": list(tasks), "metrics": dict(zip(tasks, metrics, strict=True))}
    scored = not any(metric is None or metric.endswith("perplexity") for metric in metrics)
    for kind in ("loss", "score") if scored else ("loss",):
        first, *rows = [{task: getattr(results[task], kind) for task in tasks} for results in (base, *stages)]
        content[kind] = Matrix(tasks, rows, smaller_is_better=kind == "loss").to_dict(first)
        draw(content, kind, folder / (f"{NAME}.png" if kind == "score" else f"{NAME}_loss.png"))
    write_json(folder / f"{NAME}.json", content)
    with atomic_path(folder / f"{NAME}.txt") as temporary:
        temporary.write_text(table(content) + "\n", encoding="utf-8")
    return content


def stage_names(tasks: Sequence[str]) -> list[str]:
    """Of the rows of a drawn or printed matrix, the base model's first."""
    return ["base", *(f"after {task}" for task in tasks)]


def draw(content: Mapping[str, Any], kind: str, path: Path) -> None:
    """The matrix as a heat map. kind: `score` or `loss`."""
    part, tasks = content[kind], content["tasks"]
    heatmap(
        [part["base"], *part["matrix"]],
        stage_names(tasks),
        tasks,
        path,
        title="Held-out loss" if kind == "loss" else "Score on each task after each stage",
        label=LOSS if kind == "loss" else ", ".join(dict.fromkeys(content["metrics"].values())),
        column_label="evaluated on",
        errors=[part["base_stderr"], *part["stderr"]],
    )


def table(content: Mapping[str, Any]) -> str:
    """Both matrices as text, +- one standard error over examples, and their summaries."""
    blocks = []
    for kind in ("score", "loss"):
        if kind not in content:
            continue
        part, tasks = content[kind], content["tasks"]
        lines = [[LOSS if kind == "loss" else kind, *tasks]]
        rows = [part["base"], *part["matrix"]], [part["base_stderr"], *part["stderr"]]
        for name, values, stderrs in zip(stage_names(tasks), *rows, strict=True):
            lines.append([name, *map(number, zip(values, stderrs, strict=True))])
        shown = aligned(lines, left=len(lines[0]))
        for name in SUMMARIES:
            if part[name] is not None:
                value = number((part[name]["value"], part[name]["stderr"]))
                shown.append(f"{name.replace('_', ' ')}: {value}")
        blocks.append("\n".join(shown))
    return "\n\n".join(blocks)


def number(found: Number) -> str:
    """0.950 +- 0.015; without the error if there is none."""
    return f"{found[0]:.3f}" + ("" if found[1] is None else f" +- {found[1]:.3f}")
