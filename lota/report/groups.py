"""Runs of one method that differ in the seed only: their names in figures, their means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.evaluate.estimates import mean_and_stderr
from lota.report.reading import Run, weight_settings

SCORE_NAMES = {  # what rated the entries of a mask -> method
    "task_vector": "LoTA",
    "random": "random mask",
    "magnitude": "magnitude mask",
    "gradient": "gradient mask",
    "fisher": "Fisher mask",
    "snip": "SNIP mask",
}
IDENTITY = ("model.name_or_path", "datasets", "loss.name")  # runs that differ in these are never one curve
FREE = ("seed", "mask_path", "save_snip_mask_path", *IDENTITY)  # may differ between the runs of one group
LONGEST = 48  # characters of the settings in a name


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one method and sparsity (None where there is no mask); their seeds differ."""

    method: str
    sparsity: float | None
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        return self.method if self.sparsity is None else f"{self.method}, s = {self.sparsity:g}"

    def mean(self, value: Callable[[Run], float | None]) -> tuple[float, float | None] | None:
        """(mean, standard error over the runs, None for one run) of those that have the value, else None."""
        found = [number for run in self.runs if (number := value(run)) is not None]
        return mean_and_stderr(found) if found else None


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs in groups, methods in the order given, sparsities ascending.

    A group's runs have the same settings but for the seed and the mask that belongs to it. Where several
    settings meet at one method and sparsity, such as a sweep of learning rates, they stand in the name.
    """
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run, method in zip(runs, _methods(runs), strict=True):
        by_method[method].append(run)
    found: dict[tuple[str, float | None], list[Run]] = defaultdict(list)
    order = {}
    for method, members in by_method.items():
        keys = _telling_keys(members)
        for run in sorted(members, key=lambda run: run.sparsity or 0.0):
            name = method + _told(run, keys)
            order.setdefault(name, len(order))
            found[name, run.sparsity].append(run)
    return [
        Group(*key, members) for key, members in sorted(found.items(), key=lambda item: order[item[0][0]])
    ]


def _methods(runs: Sequence[Run]) -> list[str]:
    """The method of each run, with its task, model and loss where these differ between the runs."""
    several = [key for key in IDENTITY if len({str(run.settings[key]) for run in runs}) > 1]
    shown = [[_short(run.settings[key]) for key in several] for run in runs]
    return [", ".join([method(run), *more]) for run, more in zip(runs, shown, strict=True)]


def method(run: Run) -> str:
    """What trains, in the field's words."""
    settings = run.settings
    if settings["adapter.name"] == "lora":
        return f"LoRA r = {settings['lora_rank']}"
    name = "full fine-tuning"
    if run.lost_mask:
        name = "mask (file lost)"
    elif run.mask is not None:
        name = _mask_name(run.mask.meta)
    flipped = (run.mask is not None and run.mask.meta.get("flipped", False)) != settings["flip_mask"]
    frozen = [f"{which} layers frozen" for which in ("odd", "even") if settings[f"freeze_{which}_layers"]]
    protected = ["others' entries frozen"] if settings["protect_masks"] else []
    return ", ".join([name, *(["flipped"] if flipped else []), *frozen, *protected])


def _mask_name(meta: dict[str, Any]) -> str:
    """The method of a mask, with what is unusual about its choice."""
    score = meta.get("score")
    words = [SCORE_NAMES.get(score, f"mask by {score}" if score else "mask")]
    words += ["smallest"] if meta.get("smallest") else []
    words += [f"{meta['granularity']}s"] if meta.get("granularity", "element") != "element" else []
    words += [f"per {meta['per']}"] if meta.get("per", "global") != "global" and score != "random" else []
    return ", ".join(words)


def _telling_keys(members: Sequence[Run]) -> list[str]:
    """Settings that differ between runs of one method and sparsity, seeds apart."""
    at_sparsity = defaultdict(list)
    for run in members:
        at_sparsity[run.sparsity].append(run)
    keys: list[str] = []
    for runs in at_sparsity.values():
        keys += _differing([{k: v for k, v in weight_settings(r).items() if k not in FREE} for r in runs])
    keys = list(dict.fromkeys(keys))
    for runs in at_sparsity.values():
        alike = defaultdict(set)
        for run in runs:
            alike[_told(run, keys), run.settings["seed"]].add(str(run.mask_path))
        if any(len(masks) > 1 for masks in alike.values()) or any(run.lost_mask for run in runs):
            return [*keys, "mask_path"]
    return keys


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    return [key for key in settings[0] if len({str(one.get(key)) for one in settings}) > 1]


def _told(run: Run, keys: Iterable[str]) -> str:
    """The settings of a run that tell it from others of its method, or its name where these are too many."""
    told = {**run.settings, "mask_path": run.mask_path}
    text = "".join(f", {key}={_short(told.get(key))}" for key in keys)
    return text if len(text) <= LONGEST else f", {run.name}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_short, value))
    return "/".join(Path(value).parts[-2:]) if isinstance(value, str) and "/" in value else str(value)
