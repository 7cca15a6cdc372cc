"""The study of merging: its stages on a few rows, and what it makes of their results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lota.masks import Mask
from scripts import merge_study
from scripts.merge_study import METHODS, TASKS, Study


@pytest.mark.slow
def test_stages(tmp_path):
    """Two tasks learnt under masks that share nothing, merged and scored; nothing is run twice."""
    study = Study(tmp_path, data_fraction=0.01, n_examples=4)
    kind, few = "LoTA, disjoint", TASKS[:2]
    folders = [study.learn(kind, task, seed=0) for task in few]
    masks = [Mask.load(study.mask(kind, task, seed=0)) for task in few]
    assert masks[0].overlap(masks[1]) == 0 < masks[0].n_kept == masks[1].n_kept
    out = tmp_path / "merged"
    inputs = " ".join(map(str, folders))
    line = f"merge_models.py --base {merge_study.BASE} --deltas {inputs} {METHODS['sum']} --out {out}"
    study.run(line, out / "merge.json")
    assert json.loads((out / "merge.json").read_text())["exact"]
    scores = study.score(out, few)
    assert scores.keys() == set(few) and all(0 < score["nats"] < 10 for score in scores.values())
    alone = study.score(folders[0], few[:1])[few[0]]
    assert alone["nats"] < study.score(folders[1], few[:1])[few[0]]["nats"]  # it has learnt its own task
    written = out.stat().st_mtime_ns
    study.run(line, out / "merge.json")
    assert out.stat().st_mtime_ns == written
    assert study.score(out, few) == scores
    with pytest.raises(SystemExit, match=r"exit code 1, see .*log\.txt"):
        study.run(f"merge_models.py --base nowhere --deltas x --method sum --out {out}", tmp_path / "never")
    assert "nowhere" in (tmp_path / "log.txt").read_text()


@pytest.fixture
def records() -> list[dict]:
    def scores(accuracy: float) -> dict:
        return {task: {"accuracy": accuracy, "nats": 1 - accuracy} for task in TASKS}

    pair = {"overlap_share": 0.25, "sign_conflict_share": 0.5, "cosine": 0.125}
    none = {"overlap_share": 0.0, "sign_conflict_share": None, "cosine": 0.0}
    found = []
    for kind in merge_study.LR:
        for seed, accuracy in enumerate((0.5, 0.7)):
            found.append({"kind": kind, "method": "alone", "seed": seed, "scores": scores(0.9)})
            pairs = [none if "disjoint" in kind else pair] * 3
            found.append(
                {"kind": kind, "method": "sum", "seed": seed, "scores": scores(accuracy), "pairs": pairs}
            )
    return found


def test_tables(records):
    rows = merge_study.summarize(records)
    lines = merge_study.table(rows).splitlines()
    assert lines[2] == "| FFT | (not merged) | " + "90.0 ± 0.0 | " * 4 + "0.100 ± 0.000 |"
    assert lines[3] == "| FFT | `--method sum` | " + "60.0 ± 10.0 | " * 4 + "0.400 ± 0.100 |"
    overlaps = merge_study.overlaps(records).splitlines()
    assert overlaps[2] == "| FFT | 25.0 ± 0.0 % | 50.0 ± 0.0 % | 0.125 ± 0.000 |"
    assert overlaps[-1] == "| LoTA, disjoint | 0.0 ± 0.0 % | - | 0.000 ± 0.000 |"


def test_plot(records, tmp_path: Path):
    merge_study.plot(merge_study.summarize(records), tmp_path / "merging.png")
    assert (tmp_path / "merging.png").read_bytes().startswith(b"\x89PNG")
