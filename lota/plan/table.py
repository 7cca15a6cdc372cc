"""A plan as text and as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lota.plan.predict import PHASES, Prediction, Setup, rows_per_pass
from lota.plan.tracker import KINDS
from lota.plan.ways import Advice, Way
from lota.utils import aligned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB, MIB = 2**30, 2**20
_PARTS = (*KINDS[:3], "gathered", *KINDS[3:])
Planned = Sequence[tuple[Way, Prediction]]


class Unit:
    """What sizes are shown in: GiB, or MiB if nothing is as large."""

    def __init__(self, sizes: Sequence[float]):
        self.name, self.bytes = ("GiB", GIB) if max(sizes) >= GIB else ("MiB", MIB)

    def __call__(self, size: float) -> str:
        return f"{size / self.bytes:.2f}" if size >= 0.005 * self.bytes or not size else "<0.01"


def headline(run: Way, model: PreTrainedModel, first: Prediction) -> list[str]:
    """What is planned, and what the numbers leave out."""
    c, setup = run.config, run.setup
    rows = rows_per_pass(c, setup)
    device = {"cuda": "a GPU", "cpu": "the CPU"}[setup.device]
    entries = sum(p.numel() for p in model.parameters())
    who = "one process" if setup.processes == 1 else f"each of {setup.processes} processes"
    lines = [
        f"{type(model).__name__}, {entries:,} parameters; traced: {first.blocks}",
        f"live tensors on {device}, of {who}; {rows} x {setup.length or c.max_length} tokens in a pass, "
        f"{c.gradient_accumulation_steps} to a step",
    ]
    if setup.processes > 1 and c.trainer.name == "FSDPTrainer":
        lines.append("shares, gathered weights and bytes sent are arithmetic, not traced")
    left_out = [
        ("compile", c.compile, "what the compiler saves"),
        ("sample_during_eval", c.sample_during_eval, "caches of samples"),
    ]
    lines += [f"not counted: {what} ({key}=true)" for key, is_set, what in left_out if is_set]
    return lines


def table(planned: Planned, setup: Setup) -> list[str]:
    """One column for each way to train."""
    found = [prediction for _, prediction in planned]
    shown = Unit([prediction.peak.peak for prediction in found])
    rows = [[shown.name, *(way.name for way, _ in planned)]]

    def row(label: str, value: Callable[[Prediction], str]) -> None:
        rows.append([label, *map(value, found)])

    row("trained entries", lambda p: f"{p.trained:,}")
    for kind in _PARTS:
        if any(p.peak.parts.get(kind) for p in found):
            row(f"  {kind}", lambda p, kind=kind: shown(p.peak.parts.get(kind, 0)))  # type: ignore[misc]
    row("peak", lambda p: shown(p.peak.peak))
    row("  in phase", lambda p: p.peak_phase)
    for phase in PHASES:
        row(f"  {phase}", lambda p, phase=phase: shown(p.phases[phase].peak))  # type: ignore[misc]
    if setup.device == "cuda":
        row("main memory: save", lambda p: shown(p.host))
    for name in _keys(p.disk for p in found):
        row(f"disk: {name}", lambda p, name=name: shown(p.disk[name]) if name in p.disk else "-")  # type: ignore[misc]
    for name in _keys(p.sent for p in found):
        row(f"sent: {name}", lambda p, name=name: shown(p.sent[name]) if name in p.sent else "-")  # type: ignore[misc]
    return aligned(rows)


def _keys(dicts: Any) -> list[str]:
    return list(dict.fromkeys(key for one in dicts for key in one))


def advice_lines(run: Prediction, advice: Advice | None, limit: int) -> list[str]:
    """Whether the run fits into `limit` bytes, and what makes it fit."""
    shown = Unit([limit])
    room = f"{shown(limit)} {shown.name}"
    if advice is None:
        return [
            f"it fits into {room}: {shown(limit - run.peak.peak)} are left, also for the context and gaps of "
            "the allocator"
        ]
    lines = [f"it does not fit into {room}: {shown(run.peak.peak)}, in the {run.peak_phase} phase"]
    rows = [
        [f"  {' '.join(way.changes)}", shown(peak), "fits" if peak <= limit else ""]
        for way, peak in advice.tried
    ]
    lines += ["each change alone:", *aligned(rows)]
    if advice.fitting is None:
        lines.append("all that helps together does not make it fit: take a smaller model or a larger GPU")
    else:
        way, peak = advice.fitting
        lines.append(f"it fits with {shown(peak)} {shown.name}: {' '.join(way.changes)}")
    return lines


def numbers(planned: Planned, advice: Advice | None) -> dict[str, Any]:
    """All of it in bytes, for a file."""
    made: dict[str, Any] = {"ways": {way.name: _numbers(prediction) for way, prediction in planned}}
    if advice is not None:
        made["tried"] = {" ".join(way.changes): peak for way, peak in advice.tried}
        fitting = advice.fitting
        made["fits"] = None if fitting is None else " ".join(fitting[0].changes)
    return made


def _numbers(prediction: Prediction) -> Mapping[str, Any]:
    phases = {phase: {"peak": m.peak, **m.parts} for phase, m in prediction.phases.items()}
    return {
        "peak": prediction.peak.peak, "phase": prediction.peak_phase, "phases": phases,
        "main_memory": prediction.host, "trained_entries": prediction.trained, "traced": prediction.blocks,
        "disk": prediction.disk, "sent": prediction.sent,
    }  # fmt: skip
