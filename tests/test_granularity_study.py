"""The study of granularities: its stages on a few rows, and what the report makes of their results."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from lota.masks import Mask
from lota.models.loading import load_model
from scripts import granularity_report as report
from scripts import granularity_study as study
from scripts.granularity_report import Found
from scripts.granularity_study import DENSE, KINDS, RATES, USUAL, WORKLOADS, Cells, Study, carved
from tasks import get_task

TINY = replace(WORKLOADS["toy_sort"], n_examples=32, n_test=12, n_scored=4)


@pytest.mark.slow
def test_stages(tmp_path, monkeypatch):
    """A calibration, a mask, an adaptation; nothing is run twice, and a later process goes on."""
    made = Study(tmp_path, {"toy_sort": TINY})
    monkeypatch.setattr(Study, "rate", lambda self, name, kind, sparsity: 1e-3)
    made.base("toy_sort")
    made.adapt("toy_sort", 0, "block 16", 0.9)
    made.adapt("toy_sort", 0, "block 16", 0.9, "max")
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    base, dense, usual, largest = cells
    assert usual["kept"] < dense["kept"] and usual["nats"] != dense["nats"] != base["nats"]
    assert usual["shared"] == 1.0 > largest["shared"] and usual["energy"] >= largest["energy"] > 0
    assert all(set(cell["scores"]) == {"exact_match"} for cell in cells)
    made.adapt("toy_sort", 0, "block 64", 0.99, "sum of squares, per tensor")  # 1 % of a matrix is no block
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 4
    # what lies in the kept entries, from the models as transformers loads them
    before = load_model(TINY.base).state_dict()
    after = load_model(TINY.base, archive=dense["folder"]).state_dict()
    mask = Mask.load(made.mask("toy_sort", 0, "block 16", 0.9))
    change = {name: (after[name].double() - before[name].double()).square() for name in mask.names}
    kept = sum(float(change[name][mask.dense(name)].sum()) for name in mask.names)
    assert usual["energy"] == pytest.approx(kept / sum(float(c.sum()) for c in change.values()), rel=1e-9)

    def never(*_):
        raise AssertionError("run again")

    monkeypatch.setattr(Study, "run", never)
    again = Study(tmp_path, {"toy_sort": TINY})
    again.base("toy_sort")
    again.adapt("toy_sort", 0, "block 16", 0.9, "max")
    with pytest.raises(AssertionError, match="run again"):
        again.adapt("toy_sort", 0, "block 16", 0.95)


def test_rows_that_choose_rates_are_no_others():
    seen = {}
    for held_out in ("validation", "test"):
        task = carved(TINY, held_out, "toy_sort")
        assert task.held_out == held_out
        seen = {
            split: [row["question"] for row in task.load(split, "")] for split in ("train", held_out)
        } | seen
    rows = {
        split: {row["question"] for row in get_task("toy_sort").load(split)} for split in ("train", "test")
    }
    assert set(seen["train"]) | set(seen["validation"]) == rows["train"]
    assert not set(seen["train"]) & set(seen["validation"])
    assert set(seen["test"]) < rows["test"] and len(set(seen["test"])) == 12
    short = carved(replace(TINY, max_length=20), "test", "toy_sort")
    assert 0 <= len(short.load("train", "")) < len(seen["train"])


@pytest.mark.parametrize("best", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("kind, sparsity", [("row", 0.9), ("column", 0.9), (DENSE, None)])
def test_a_rate_has_a_worse_one_on_either_side(best, kind, sparsity, tmp_path, monkeypatch):
    tried = []

    def nats(self, name, kind, sparsity, lr):
        tried.append((kind, lr))
        return math.inf if lr > 20 * best else abs(math.log(lr / best))

    monkeypatch.setattr(Study, "_validation_nats", nats)
    assert Study(tmp_path).rate("sql", kind, sparsity) == best
    at = RATES.index(best)
    assert {RATES[i] for i in (at - 1, at + 1) if 0 <= i < len(RATES)} <= {lr for _, lr in tried}
    assert len(tried) == len(set(tried)) and {kind for kind, _ in tried} == {kind.replace("column", "row")}


def test_between_two_rates_only_theirs_are_tried(tmp_path, monkeypatch):
    wanted, tried = {0.9: 1e-3, 0.95: 3e-3, 0.99: 1e-2}, []

    def nats(self, name, kind, sparsity, lr):
        tried.append((sparsity, lr))
        return abs(math.log(lr / wanted[sparsity]))

    monkeypatch.setattr(Study, "_validation_nats", nats)
    assert Study(tmp_path).rate("toy_sort", "row", 0.95) == 3e-3
    assert sorted(lr for s, lr in tried if s == 0.95) == [1e-3, 3e-3, 1e-2]
    wanted[0.99], tried[:] = 1e-3, []
    assert Study(tmp_path).rate("toy_sort", "row", 0.95) == 1e-3
    assert not [lr for s, lr in tried if s == 0.95]


def test_half_a_line_is_cut(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl")
    cells.add({"nats": 1.5}, part="main", seed=0)
    with cells.path.open("a") as file:
        file.write('{"cell": {"part"')
    again = Cells(cells.path)
    assert again.get(seed=0, part="main") == {"cell": {"part": "main", "seed": 0}, "nats": 1.5}
    again.add({"nats": None}, part="main", seed=1)
    assert len(Cells(cells.path).found) == 2


@pytest.mark.slow
def test_times_of_every_kind(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl")
    for _ in range(2):
        study.time_steps(cells, rounds=1, shape="tiny", sparsities=[0.5])
    (record,) = cells.found.values()
    assert record["seconds"].keys() == {DENSE, *KINDS} and min(record["seconds"].values()) > 0
    assert record["torch"] == torch.__version__


@pytest.fixture
def found() -> Found:
    records = []
    for task in WORKLOADS:
        records.append({"cell": {"part": "main", "task": task, "kind": "base"}, "nats": 5.0, "lr": 0.0})
        for seed in (0, 1, study.RATE_SEED):
            for kind, sparsity, choice in [
                (DENSE, None, None),
                ("element", 0.9, USUAL),
                ("row", 0.9, USUAL),
                ("row", 0.9, "max"),
            ]:
                cell = {"part": "main", "task": task, "seed": seed, "kind": kind, "sparsity": sparsity}
                nats = None if (kind, seed, task) == ("row", 1, "sql") else 0.5 + 0.2 * seed
                scores = {"exact_match": 0.25 + 0.5 * seed} if task == "toy_sort" else {}
                record = {"cell": cell | {"choice": choice}, "nats": nats, "lr": 0.01, "scores": scores}
                records.append(record | ({"energy": 0.375, "shared": 0.5} if sparsity else {}))
    seconds = {DENSE: 2.0} | dict.fromkeys(KINDS, 1.5)
    records.append({"cell": {"part": "time", "shape": "124m", "sparsity": 0.9}, "seconds": seconds})
    return Found(records)


def test_tables(found):
    lines = report.granularity_table(found).splitlines()
    element = next(line for line in lines if line.startswith("| element | 0.9 "))
    loss = "0.600 ± 0.100"
    expected = f"0.75 | 50.0 ± 25.0 | {loss} | {loss} | - | {loss} | 38, 38, 38 | 0.01, 0.01, 0.01 |"
    assert element.endswith(expected)
    assert "| row | 0.9 | 0.75 | 50.0 ± 25.0 | 0.600 ± 0.100 | inf |" in "\n".join(lines)
    assert "| row | 0.99 | - | - | - |" in "\n".join(lines)
    assert next(line for line in lines if line.startswith("| base")).count("5.000") == 3
    assert lines[-1].startswith("Seeds: toy_sort 2, sql 2, gsm8k 2.")
    (usual, largest) = report.choice_table(found).splitlines()[2:]
    assert usual.startswith(f"| row | 0.9 | {USUAL} | 50.0 ± 25.0") and usual.endswith("| 38 | 50 |")
    assert largest.startswith("| row | 0.9 | max | ")


def test_figure(found, tmp_path):
    report.draw(found, tmp_path / "granularity.png")
    assert (tmp_path / "granularity.png").read_bytes().startswith(b"\x89PNG")
