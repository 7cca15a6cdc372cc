"""The table of benchmarks/step.py, and which of the wanted ratios it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LORA, FAIR_DENSE, SHIRA = "peft_lora_r64", "dense_masked_scope", "peft_shira_r64"
STRUCTURED = ("lota_rows", "lota_columns", "lota_blocks")


class Measured(NamedTuple):
    """One contestant."""

    name: str
    seconds: float  # median of its steps
    peak: int  # bytes


class Reach(NamedTuple):
    """A ratio that is wanted: contestant's / other's <= limit."""

    contestant: str
    other: str
    limit: float
    of: str  # a field of Measured


# by sparsity: of the shape 124m, 4 x 128 tokens, fp32, on a CPU
REACHES: dict[float, list[Reach]] = {
    0.9: [
        Reach("lota", LORA, 1.0, "seconds"),
        Reach("lota", FAIR_DENSE, 0.78, "seconds"),
        Reach("lota", SHIRA, 0.75, "seconds"),
        Reach("lota", LORA, 0.85, "peak"),
        *(Reach(name, LORA, 0.85, "seconds") for name in STRUCTURED),
        *(Reach(name, LORA, 0.80, "peak") for name in STRUCTURED),
    ],
    0.99: [Reach("lota", LORA, 0.90, "seconds"), Reach("lota", LORA, 0.80, "peak")],
}


def table(rows: Sequence[Measured], references: Sequence[str]) -> str:
    """Medians and peaks, and their ratios to those of each reference: below 1 is better than it."""
    by_name = {row.name: row for row in rows}
    others = [by_name[name] for name in references if name in by_name] or [rows[0]]
    heads = [f"/ {other.name.removeprefix('peft_')[:12]}" for other in others]
    lines = ["".join([f"{'contestant':21}{'median s':>9}", *(f"{head:>15}" for head in heads)])]
    lines[0] += "".join([f"{'peak MiB':>10}", *(f"{head:>15}" for head in heads)])
    for row in rows:
        line = f"{row.name:21}{row.seconds:9.3f}"
        line += "".join(f"{row.seconds / other.seconds:15.2f}" for other in others)
        line += f"{row.peak / 2**20:10.0f}"
        lines.append(line + "".join(f"{row.peak / other.peak:15.2f}" for other in others))
    return "\n".join(lines)


def reached(rows: Sequence[Measured], sparsity: float) -> list[str]:
    """A line for each reach whose contestants were measured."""
    by_name = {row.name: row for row in rows}
    lines = []
    for reach in REACHES.get(sparsity, []):
        if reach.contestant in by_name and reach.other in by_name:
            ours, others = (getattr(by_name[name], reach.of) for name in (reach.contestant, reach.other))
            verdict = "reached" if ours / others <= reach.limit else "missed"
            what = f"{reach.contestant}: {reach.of} / {reach.other}'s"
            lines.append(f"{what:48} {ours / others:.3f}, wanted <= {reach.limit:.2f}: {verdict}")
    return lines
