"""Sequences compared over seeds: means and standard errors worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from lota.report import sequence_table
from lota.report.replicates import find_replicates


def write_run(folder, method, seed, matrix, tasks=("a", "b"), kind="score", **other):
    folder.mkdir()
    settings = {"method": method, "seed": seed, "sparsity": 0.9, "exp_name": folder.name, "tasks": [*tasks]}
    settings |= {"model": {"name_or_path": "m"}, **other}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    part = {"matrix": matrix, "stderr": [[0.1, 0.1]] * 2}
    part |= {"average": {"value": sum(matrix[-1]) / 2, "stderr": 0.1}}
    part |= {"backward_transfer": {"value": matrix[1][0] - matrix[0][0], "stderr": 0.1}}
    part |= {"forgetting": {"value": matrix[0][0] - matrix[1][0], "stderr": 0.1}}
    (folder / "forgetting.json").write_text(json.dumps({"tasks": tasks, kind: part}))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "1", "lotto", 0, [[0.8, 0.0], [0.6, 1.0]]),
        write_run(tmp_path / "2", "fft", 0, [[0.0, 0.1], [0.2, 0.9]]),
        write_run(tmp_path / "3", "lotto", 1, [[0.5, 0.1], [0.5, 0.8]]),
    ]


def lines(runs, kind="score"):
    return find_replicates(sequence_table.read_sequences(runs, kind))


def test_means_over_seeds(runs):
    lotto, fft = lines(runs)
    assert (lotto.name, fft.name) == ("lotto, s = 0.9", "fft")
    deviation = math.sqrt(2 * 0.05**2) / math.sqrt(2)
    assert sequence_table.result(lotto, "score", -1, 0) == pytest.approx((0.55, deviation))
    assert sequence_table.kept_share(lotto)[0] == pytest.approx((0.75 + 1.0) / 2)
    assert sequence_table.summary(lotto, "score", "forgetting")[0] == pytest.approx(0.1)
    assert sequence_table.kept_share(fft) is None
    assert sequence_table.result(fft, "score", 0, 1) == (0.1, None)


def test_the_command_writes_table_numbers_and_pictures(runs, tmp_path, capsys):
    sequence_table.main([*map(str, runs), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "comparison.txt").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    shown = text.splitlines()
    assert shown[2].split()[:4] == ["lotto,", "s", "=", "0.9"] and "0.550 +- 0.050" in shown[2]
    assert shown[3].split()[:3] == ["fft", "1", "0.200"]
    assert "0.650 +- 0.150" in shown[7]
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["fft"]["runs"][0]["matrix"] == [[0.0, 0.1], [0.2, 0.9]]
    for name in ("final.png", "first.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_in_more_than_the_seed_are_lines_of_their_own(tmp_path):
    matrix, rates = [[0.5, 0.1], [0.5, 0.8]], (1e-2, 1e-2, 3e-3)
    runs = [
        write_run(tmp_path / str(seed), "lotto", seed, matrix, lr=lr, calibrate={"lr": None, "n_steps": 5})
        for seed, lr in enumerate(rates)
    ]
    found = [(line.name, len(line.runs)) for line in lines(runs)]
    assert found == [("lotto, lr=0.01, s = 0.9", 2), ("lotto, lr=0.003, s = 0.9", 1)]


def test_no_share_of_a_loss_is_called_kept(tmp_path):
    run = write_run(tmp_path / "1", "fft", 0, [[1.0, 4.0], [2.0, 1.0]], kind="loss")
    text = sequence_table.comparison_text(lines([run], "loss"), ["a", "b"], "loss")
    assert "kept" not in text and text.splitlines()[2].split()[:4] == ["fft", "1", "2.000", "1.000"]


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty is not a run folder"):
        sequence_table.main([*map(str, runs), str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    (runs[0] / "forgetting.json").unlink()
    with pytest.raises(ValueError, match=r"1 is no finished sequence .* with a score: .*no forgetting\.json"):
        lines(runs)
    other = write_run(tmp_path / "4", "fft", 2, [[0.0, 0.0], [0.0, 0.0]], tasks=("b", "a"))
    with pytest.raises(ValueError, match="other tasks"):
        lines([*runs[1:], other])
    with pytest.raises(ValueError, match="no finished sequence of tasks with a loss"):
        lines(runs[1:], "loss")
