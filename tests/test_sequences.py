"""Methods compared over seeds: means and standard errors worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from lota.report import sequence_table as sequences


def write_run(folder, method, seed, matrix, tasks=("a", "b"), kind="score", **other):
    folder.mkdir()
    settings = {"method": method, "seed": seed, "sparsity": 0.9, "exp_name": folder.name, **other}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    part = {"matrix": matrix, "average": {"value": sum(matrix[-1]) / 2, "stderr": 0.1}}
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


def test_means_over_seeds(runs):
    lotto, fft = sequences.read_groups(runs, "score")
    assert (lotto.method, fft.method) == ("lotto, s = 0.9", "fft")
    deviation = math.sqrt(2 * 0.05**2) / math.sqrt(2)
    assert lotto.at(-1, 0) == pytest.approx((0.55, deviation))
    assert lotto.kept()[0] == pytest.approx((0.75 + 1.0) / 2)
    assert lotto.summary("forgetting")[0] == pytest.approx(0.1)
    assert fft.kept() is None and fft.at(0, 1) == (0.1, None)


def test_the_command_writes_table_numbers_and_pictures(runs, tmp_path, capsys):
    sequences.main([*map(str, runs), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "comparison.txt").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    lines = text.splitlines()
    assert lines[2].split()[:4] == ["lotto,", "s", "=", "0.9"] and "0.550 +- 0.050" in lines[2]
    assert lines[3].split()[:3] == ["fft", "1", "0.200"]
    assert "0.650 +- 0.150" in lines[7]
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
    groups = sequences.read_groups(runs, "score")
    assert [(g.method, len(g.parts)) for g in groups] == [
        ("lotto, s = 0.9, lr = 0.01", 2),
        ("lotto, s = 0.9, lr = 0.003", 1),
    ]


def test_no_share_of_a_loss_is_called_kept(tmp_path):
    run = write_run(tmp_path / "1", "fft", 0, [[1.0, 4.0], [2.0, 1.0]], kind="loss")
    text = sequences.table(sequences.read_groups([run], "loss"), "loss")
    assert "kept" not in text and text.splitlines()[2].split()[:4] == ["fft", "1", "2.000", "1.000"]


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty is no finished sequence"):
        sequences.main([*map(str, runs), str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    other = write_run(tmp_path / "4", "fft", 2, [[0.0, 0.0], [0.0, 0.0]], tasks=("b", "a"))
    with pytest.raises(ValueError, match="other tasks"):
        sequences.read_groups([*runs, other], "score")
    with pytest.raises(ValueError, match="no finished sequence of tasks with a loss"):
        sequences.read_groups(runs, "loss")
