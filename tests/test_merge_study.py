"""The study of merging: its stages on a few rows, and what it makes of their results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lota.masks import Mask
from scripts import merge_study
from scripts.merge_study import METHODS, TASKS, Study


@pytest.mark.slow
def test_stages(tmp_path, monkeypatch):
    """Two tasks learnt under masks that share nothing, merged and scored; nothing is run twice."""
    monkeypatch.setattr(Study, "rate", lambda self, kind: 1e-2)
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


def test_rates_are_those_of_the_least_validation_loss(tmp_path, monkeypatch):
    """Over the three tasks together; what is run says that validation rows are left out."""
    nats = {3e-3: (1.0, 1.0, 1.0), 1e-2: (0.1, 0.2, 2.6), 3e-2: (2.0, 0.0, 1.1)}
    said = []

    def learn(self, kind, task, seed, lr):
        said.append((kind, task, seed, lr))
        folder = tmp_path / task / f"{lr:g}"
        (folder / "epoch-1").mkdir(parents=True)
        lines = [
            {"nats_per_token/eval": 9.0},
            {"nats_per_token/eval": nats[lr][TASKS.index(task)]},
            {"step": 3},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder / "epoch-1"

    study = Study(tmp_path, 0.01, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Study, "learn", learn)
        assert study.rate("LoTA") == 1e-2
        assert {(kind, seed) for kind, _, seed, _ in said} == {("LoTA", 100)} and len(said) == 9
        assert study.rate("LoTA, lr 3e-3") == 3e-3 and len(said) == 9
    asked = []
    monkeypatch.setattr(Study, "run", lambda self, line, result: asked.append(line))
    study.learn("FFT", "toy_sort", 100, 1e-3)
    assert "validation_fraction=0.1" in asked[0] and "lr=0.001" in asked[0]


@pytest.fixture
def records() -> list[dict]:
    def scores(accuracy: float) -> dict:
        return {task: {"accuracy": accuracy, "nats": 1 - accuracy} for task in TASKS}

    pair = {"overlap_share": 0.25, "sign_conflict_share": 0.5, "cosine": 0.125}
    none = {"overlap_share": 0.0, "sign_conflict_share": None, "cosine": 0.0}
    found = []
    for kind in merge_study.RATES:
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
