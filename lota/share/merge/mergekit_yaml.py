"""The same merge as a configuration for `mergekit-yaml` (mergekit 0.1.5).

Written out in full, so that nothing rests on mergekit's defaults: arithmetic in float32, `normalize`, and
`rescale: false` with DARE's 1/density in the weights (mergekit's own restores each tensor's L1 norm instead).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from lota.share.merge.folder import Merge
from lota.share.merge.inputs import DeltaVector
from lota.share.merge.rules import METHODS, Rule
from lota.utils import atomic_path

NAMES = {
    "sum": "task_arithmetic",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare": "dare_linear",
    "dare_ties": "dare_ties",
    "magnitude_prune": "breadcrumbs",  # with gamma 0: no outlier is removed
}


def equivalent(merge: Merge) -> dict[str, Any]:
    """The configuration. Raises one ValueError for inputs that mergekit cannot read, or a rule it lacks."""
    paths = [_readable(vector) for vector in merge.vectors]
    problems = [problem for _, problem in paths if problem]
    if len({path for path, _ in paths}) < len(paths):
        problems.append("mergekit takes each model once")
    weights, scale, problem = _weights(merge.rule)
    problems += [problem] if problem else []
    if problems:
        raise ValueError("\n".join(f"--export-mergekit: {problem}" for problem in problems))
    models = []
    for (path, _), weight, density in zip(paths, weights, merge.rule.densities, strict=True):
        parameters = {"weight": weight} | ({"density": density} if METHODS[merge.rule.method].thin else {})
        models.append({"model": path, "parameters": parameters})
    return {
        "merge_method": NAMES[merge.rule.method],
        "base_model": _absolute(merge.base),
        "models": models,
        "parameters": _shared(merge.rule, scale),
        "dtype": "float32",
        "out_dtype": str(_usual_dtype(merge)).removeprefix("torch."),
    }


def write_yaml(config: dict[str, Any], path: Path) -> None:
    """Write the configuration atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _weights(rule: Rule) -> tuple[list[float], float, str | None]:
    """(weight per model, lambda, why it cannot be said): 1/density goes wherever no division cancels it."""
    if METHODS[rule.method].thin != "random":
        return list(rule.weights), rule.scale, None
    if not METHODS[rule.method].consensus:
        total = sum(rule.weights) if rule.normalize else 1.0
        return [w / d / total for w, d in zip(rule.weights, rule.densities, strict=True)], rule.scale, None
    if not rule.normalize:
        return [w / d for w, d in zip(rule.weights, rule.densities, strict=True)], rule.scale, None
    if len(set(rule.densities)) > 1:
        return (
            [],
            rule.scale,
            "mergekit has no dare_ties with a mean over several densities: give one --density",
        )
    return list(rule.weights), rule.scale / rule.densities[0], None


def _shared(rule: Rule, scale: float) -> dict[str, Any]:
    method = METHODS[rule.method]
    shared: dict[str, Any] = {"normalize": rule.normalize and (method.thin != "random" or method.consensus)}
    if method.thin == "random":
        shared["rescale"] = False
    if rule.method == "magnitude_prune":
        shared["gamma"] = 0.0
    if scale != 1:
        shared["lambda"] = scale
    return shared


def _readable(vector: Any) -> tuple[str, str | None]:
    """(path for the configuration, why mergekit cannot read it)."""
    path = _absolute(vector.id)
    if isinstance(vector, DeltaVector):
        return (
            path,
            f"{vector.id} is a delta file, which mergekit does not read: `python -m lota.delta apply` first",
        )
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        return path, f"{vector.id} is no Hugging Face folder: convert_policy_to_hf_resize.py first"
    return path, f"mergekit takes what follows @ in {path} for a revision" if "@" in path else None


def _absolute(path: str) -> str:
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def _usual_dtype(merge: Merge) -> torch.dtype:
    """The dtype of most of the base's entries; mergekit writes everything in one."""
    counts: Counter[torch.dtype] = Counter()
    for name in merge.source.names():
        counts[merge.source.dtype(name)] += merge.source.numel(name)
    return counts.most_common(1)[0][0]
