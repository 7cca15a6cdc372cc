"""The table of benchmarks/processes.py: medians, ratios, bytes against what compact gradients must take."""

from __future__ import annotations

from benchmarks.processes import table


def turns(*speeds: float, sent: float = 0) -> list[dict[str, float]]:
    return [{"speed": v, "sent": sent, "counted": 7, "kept": 1000, "peak": 3 * 2**20} for v in speeds]


def test_the_table_shows_medians_and_ratios():
    found = {"replicated, 1": turns(90, 100, 500), "replicated, 4": turns(180, 380, 190, sent=6300)}
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in table(found, "replicated, 1").splitlines()
    ]
    assert rows[2] == ["replicated, 1", "100", "1.00", "7", "0.000", "3 MiB"]
    # 4 processes: 4 bytes x 1000 entries x 2 x 3/4 = 6000
    assert rows[3] == ["replicated, 4", "190", "1.90", "6,300", "1.050", "3 MiB"]
