"""Runs that differ in the seed only: the name that they share in figures and tables, and their means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.evaluate.estimates import mean_and_stderr
from lota.report.reading import RunRecord

SALIENCY_NAMES = {  # what rated the entries of a mask -> method
    "task_vector": "LoTA",
    "random": "random mask",
    "magnitude": "magnitude mask",
    "gradient": "gradient mask",
    "fisher": "Fisher mask",
    "snip": "SNIP mask",
}
IDENTITY = ("model.name_or_path", "datasets", "loss.name")  # runs that differ in these are never one curve
FREE = {
    "seed",
    "mask_path",
    "save_snip_mask_path",
    "tasks",
    "order",
    *IDENTITY,
}  # may differ, or are named apart
LONGEST = 48  # characters of the settings in a name


@dataclass(frozen=True, eq=False)
class Replicates:
    """Runs whose seeds differ, and the masks that belong to them, but no setting that matters otherwise."""

    method: str  # and the settings that tell it from other runs of the method
    sparsity: float | None  # None without a mask
    runs: Sequence[RunRecord]

    @property
    def name(self) -> str:
        return self.method if self.sparsity is None else f"{self.method}, s = {self.sparsity:g}"

    def mean(self, value: Callable[[RunRecord], float | None]) -> tuple[float, float | None] | None:
        """(mean, standard error, None for one run) over the runs that have the value; None if none has it."""
        found = [number for run in self.runs if (number := value(run)) is not None]
        return mean_and_stderr(found) if found else None


def find_replicates(runs: Sequence[RunRecord]) -> list[Replicates]:
    """The runs by method, in the order given, each by sparsity, ascending.

    If several settings meet at one method and sparsity, such as a sweep of learning rates, they are added to
    the method's name.
    """
    by_method: dict[str, list[RunRecord]] = defaultdict(list)
    for run, method in zip(runs, _methods_and_tasks(runs), strict=True):
        by_method[method].append(run)
    replicates = []
    for method, members in by_method.items():
        keys = _distinguishing_keys(members)
        by_label: dict[str, dict[float | None, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
        for run in sorted(members, key=lambda run: run.sparsity or 0.0):
            by_label[_label(run, keys)][run.sparsity].append(run)
        for label, by_sparsity in by_label.items():
            first = next(iter(by_sparsity.values()))[0]
            name = method + (label if len(label) <= LONGEST else f", {first.name}")
            replicates += [Replicates(name, sparsity, found) for sparsity, found in by_sparsity.items()]
    return replicates


def _methods_and_tasks(runs: Sequence[RunRecord]) -> list[str]:
    """The method of each run, with its model, tasks and loss if these differ between the runs."""
    differing = _differing_keys([{key: run.settings[key] for key in IDENTITY} for run in runs])
    return [", ".join([_method(run), *(_short(run.settings[key]) for key in differing)]) for run in runs]


def _method(run: RunRecord) -> str:
    """What trains, in the field's words."""
    settings = run.settings
    if "method" in settings:  # of a sequence of tasks
        return settings["method"]
    if settings["adapter.name"] == "lora":
        return f"LoRA r = {settings['lora_rank']}"
    words = ["mask (file lost)" if run.lost_mask else "full fine-tuning"]
    meta: Mapping[str, Any] = {}
    if run.mask is not None:
        meta = run.mask.meta
        words = _choice_of_entries(meta)
    words += ["flipped"] if bool(meta.get("flipped")) != settings["flip_mask"] else []
    words += [f"{which} layers frozen" for which in ("odd", "even") if settings[f"freeze_{which}_layers"]]
    words += ["others' entries frozen"] if settings["protect_masks"] else []
    return ", ".join(words)


def _choice_of_entries(meta: Mapping[str, Any]) -> list[str]:
    """The saliency that a mask was extracted by, and what is unusual about its choice."""
    saliency = meta.get("score")
    words = [SALIENCY_NAMES.get(saliency, f"mask by {saliency}") if saliency else "mask"]
    words += ["smallest"] if meta.get("smallest") else []
    words += [f"{meta['granularity']}s"] if meta.get("granularity", "element") != "element" else []
    words += [f"per {meta['per']}"] if meta.get("per", "global") != "global" and saliency != "random" else []
    return words


def _distinguishing_keys(members: Sequence[RunRecord]) -> list[str]:
    """Settings that differ between runs of one method and sparsity, seeds apart."""
    by_sparsity = defaultdict(list)
    for run in members:
        by_sparsity[run.sparsity].append(run)
    keys: list[str] = []
    for runs in by_sparsity.values():
        keys += _differing_keys([{k: v for k, v in r.weight_settings.items() if k not in FREE} for r in runs])
    keys = list(dict.fromkeys(keys))
    for runs in by_sparsity.values():
        masks = defaultdict(set)
        for run in runs:
            masks[_label(run, keys), run.settings["seed"]].add(str(run.mask_path))
        if any(len(paths) > 1 for paths in masks.values()) or any(run.lost_mask for run in runs):
            return [*keys, "mask_path"]
    return keys


def _differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    every = dict.fromkeys(key for one in settings for key in one)
    return [key for key in every if len({str(one.get(key)) for one in settings}) > 1]


def _label(run: RunRecord, keys: Iterable[str]) -> str:
    """The settings that tell a run from others of its method."""
    settings = {**run.settings, "mask_path": run.mask_path}
    return "".join(f", {key}={_short(settings.get(key))}" for key in keys)


def _short(value: Any) -> str:
    """A setting without the folders of a path."""
    if isinstance(value, list):
        return "+".join(map(_short, value))
    return "/".join(Path(value).parts[-2:]) if isinstance(value, str) and "/" in value else str(value)
