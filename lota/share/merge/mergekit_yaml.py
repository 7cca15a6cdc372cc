"""The same merge as a configuration for `mergekit-yaml` (mergekit 0.1.5).

Written out in full, so that nothing rests on mergekit's defaults: arithmetic in float32, `normalize`, and
`rescale: false` with DARE's 1/density in the weights (mergekit's own restores each tensor's L1 norm instead).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lota.share.merge.folder import PreparedMerge
from lota.share.merge.inputs import DeltaVector, TaskVector
from lota.share.merge.rules import METHODS, MergeRule
from lota.storage import atomic_path, refuse_foreign
from lota.utils import Problems

FIRST_LINE = "# written by merge_models.py --export-mergekit\n"
NAMES = {
    "sum": "task_arithmetic",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare": "dare_linear",
    "dare_ties": "dare_ties",
    "magnitude_prune": "breadcrumbs",  # with gamma 0: no outlier is removed
}


def mergekit_config(merge: PreparedMerge) -> dict[str, Any]:
    """The configuration. Raises one ValueError for inputs that mergekit cannot read, or a rule it lacks."""
    problems, rule = Problems(), merge.rule
    paths = [problems.attempt(_readable_path, vector) for vector in merge.vectors]
    known = [path for path in paths if path is not None]
    if len(set(known)) < len(known):
        problems.found.append("mergekit takes each model once")
    factors = problems.attempt(_weights_and_scale, rule)
    problems.refuse()
    assert factors is not None
    weights, scale = factors
    models = []
    for path, weight, density in zip(paths, weights, rule.densities, strict=True):
        parameters = {"weight": weight} | ({"density": density} if METHODS[rule.method].thin else {})
        models.append({"model": path, "parameters": parameters})
    return {
        "merge_method": NAMES[rule.method],
        "base_model": _absolute(merge.base),
        "models": models,
        "parameters": _shared_parameters(rule, scale),
        "dtype": "float32",
        "out_dtype": str(merge.source.main_dtype).removeprefix("torch."),
    }


def check_target(path: Path) -> None:
    """Raise ValueError if anything lies at `path` that `write_yaml` did not write."""
    if path.is_dir():
        raise ValueError(f"export_mergekit={path} is a folder: name a file")
    refuse_foreign("export_mergekit", path, "configuration that merge_models.py wrote", _is_ours)


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(FIRST_LINE)) == FIRST_LINE.encode()


def write_yaml(config: dict[str, Any], path: Path) -> None:
    """Write the configuration atomically."""
    check_target(path)
    with atomic_path(path) as temporary:
        temporary.write_text(FIRST_LINE + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _weights_and_scale(rule: MergeRule) -> tuple[list[float], float]:
    """(weight per model, lambda), with DARE's 1/density wherever no division cancels it."""
    method = METHODS[rule.method]
    if method.thin != "random":
        return list(rule.weights), rule.scale
    if method.consensus and rule.normalize:  # the mean divides the weights out again
        if len(set(rule.densities)) > 1:
            shown = " ".join(f"{density:g}" for density in rule.densities)
            raise ValueError(f"density={shown}: mergekit has no dare_ties with a mean over several; give one")
        return list(rule.weights), rule.scale / rule.densities[0]
    total = sum(rule.weights) if rule.normalize else 1.0
    return [w / d / total for w, d in zip(rule.weights, rule.densities, strict=True)], rule.scale


def _shared_parameters(rule: MergeRule, scale: float) -> dict[str, Any]:
    method = METHODS[rule.method]
    shared: dict[str, Any] = {"normalize": rule.normalize and (method.thin != "random" or method.consensus)}
    if method.thin == "random":
        shared["rescale"] = False
    if rule.method == "magnitude_prune":
        shared["gamma"] = 0.0
    if scale != 1:
        shared["lambda"] = scale
    return shared


def _readable_path(vector: TaskVector) -> str:
    """The vector's path for the configuration. Raises ValueError if mergekit cannot read it."""
    path = _absolute(vector.id)
    if isinstance(vector, DeltaVector):
        raise ValueError(
            f"{vector.id} is a delta file, which mergekit does not read: `python -m lota.delta apply` first"
        )
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"{vector.id} is no Hugging Face folder, as mergekit needs: convert_policy_to_hf_resize.py first"
        )
    if "@" in path:
        raise ValueError(f"mergekit takes what follows @ in {path} for a revision")
    return path


def _absolute(path: str) -> str:
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path
