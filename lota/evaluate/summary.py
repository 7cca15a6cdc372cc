"""The table over tasks at the end of an evaluation, and <folder>/metrics/summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lota.evaluate.compare import Comparison
from lota.evaluate.estimates import mean_of
from lota.evaluate.results import Result
from lota.utils import aligned, write_json


def summary(
    results: Sequence[Result],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    compared_with: str | None = None,
    comparisons: Mapping[str, Comparison] | None = None,
) -> dict[str, Any]:
    """Plain values: one entry per task, with every metric, the number of prompts cut, and the differences.

    groups: names of tasks whose mean is wanted -> those tasks; a task counts the same whatever its size.
    comparisons: by task, with the model compared_with.
    """
    tasks = []
    for result in results:
        entry = {"task": result.task, "version": result.version, "scoring": result.scoring}
        entry |= {"metric": result.metric, "score": result.score, "stderr": result.stderr, "n": result.n}
        entry |= {"seed": result.seed, "runs": list(result.runs)}
        entry |= {"runs_stderr": result.runs_stderr, "n_cut": result.n_cut}
        entry["metrics"] = {name: found.to_dict() for name, found in result.estimates.items()}
        if comparisons:
            found = comparisons[result.task]
            entry["difference"] = {name: value.to_dict() for name, value in found.differences.items()}
            entry["differing_settings"] = found.differing
        tasks.append(entry)
    content: dict[str, Any] = {"model": results[0].model, "date": results[-1].date, "tasks": tasks}
    content["means"] = _means(results, groups or {})
    if compared_with is not None:
        content["compared_with"] = compared_with
    return content


def _means(results: Sequence[Result], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    found = []
    for group, names in groups.items():
        members = [result for result in results if result.task in names]
        for metric in dict.fromkeys(metric for result in members for metric in result.estimates):
            estimates = [result.estimates.get(metric) for result in members]
            if len(estimates) > 1 and None not in estimates:
                score, stderr = mean_of(estimates)
                entry = {"group": group, "metric": metric, "score": score, "stderr": stderr}
                found.append({**entry, "n_tasks": len(members)})
    return found


def write_summary(folder: Path, content: Mapping[str, Any]) -> Path:
    path = folder / "metrics" / "summary.json"
    write_json(path, content)
    return path


def table(content: Mapping[str, Any]) -> str:
    """The summary as text, a line per task and metric; scores in their own unit, +- one standard error."""
    compared = "compared_with" in content
    lines = [["task", "metric", "score", "+-", "n", "cut", *(["difference", "+-"] if compared else [])]]
    for entry in content["tasks"]:
        for at, (metric, found) in enumerate(entry["metrics"].items()):
            first = [entry["task"] if at == 0 else "", metric]
            line = [*first, *_numbers(found), str(found["n"]), str(entry["n_cut"]) if at == 0 else ""]
            if compared:
                line += _numbers(entry["difference"].get(metric), sign="+")
            lines.append(line)
    for entry in content["means"]:
        name = f"{entry['group']} (mean of {entry['n_tasks']})"
        lines.append([name, entry["metric"], *_numbers(entry), "", "", *([""] * 2 if compared else [])])
    shown = aligned(lines, left=2)
    shown.insert(1, "-" * max(map(len, shown)))
    shown += [
        f"{entry['task']}: {len(entry['runs'])} runs, {', '.join(f'{run:.4f}' for run in entry['runs'])}; "
        f"standard error over runs {entry['runs_stderr']:.4f}"
        for entry in content["tasks"]
        if len(entry["runs"]) > 1
    ]
    if compared:
        shown.append(f"difference: paired, over the examples shared with {content['compared_with']}")
        shown += [
            f"{entry['task']}: not the same {', '.join(entry['differing_settings'])} there"
            for entry in content["tasks"]
            if entry["differing_settings"]
        ]
    return "\n".join(shown)


def _numbers(found: Mapping[str, Any] | None, sign: str = "") -> list[str]:
    """Score and standard error, with four digits after the point (one for large numbers)."""
    if found is None:
        return ["", ""]
    digits = 4 if abs(found["score"]) < 100 else 1
    error = "" if found["stderr"] is None else f"{found['stderr']:.{digits}f}"
    return [f"{found['score']:{sign}.{digits}f}", error]
