"""The study of granularities: its stages on a few rows, and what the report makes of their results."""

from __future__ import annotations

import json

import pytest
import torch

from lota.masks import Mask
from lota.models.loading import load_model
from lota.report.page import markdown
from scripts import granularity_report as report
from scripts import granularity_study as study
from scripts.cells import Cells
from scripts.granularity_report import Found
from scripts.granularity_study import KINDS, USUAL, WORKLOADS, GranularityStudy
from scripts.methods import DENSE
from scripts.study import Study
from scripts.workloads import BASES, SMOKE


@pytest.mark.slow
def test_stages(tmp_path, monkeypatch):
    """A calibration, masks, adaptations; nothing is run twice, and a later process goes on."""
    study.main(["--smoke", "--seeds", "0", "--out", str(tmp_path), "--parts", "train"])
    lines = (tmp_path / "smoke.jsonl").read_text().splitlines()
    main = [cell for cell in map(json.loads, lines) if cell["cell"]["part"] == "main"]
    dense, usual, largest = main
    assert usual["trained"] < dense["trained"] and usual["nats"] != dense["nats"]
    assert usual["cell"]["lr"] == largest["cell"]["lr"]  # the rate of the usual choice
    assert usual["mask"]["shared"] == 1.0 > largest["mask"]["shared"]
    assert usual["mask"]["energy"] >= largest["mask"]["energy"] > 0
    made = GranularityStudy(tmp_path, "smoke", SMOKE, sparsities=study.SPARSITIES)
    method = study.mask_of("block 64", 0.99, "sum of squares, per tensor")
    assert Mask.load(made.mask(method, 0)).n_kept == 0  # 1 % of a matrix is no block
    made.adapt("block 64", 0.99, "sum of squares, per tensor", 0)
    assert len((tmp_path / "smoke.jsonl").read_text().splitlines()) == len(lines)
    # what lies in the kept entries, from the models as transformers loads them
    folder = BASES["tiny-llama"].source
    before = load_model(folder).state_dict()
    after = load_model(folder, archive=made.calibration(0)).state_dict()
    mask = Mask.load(made.mask(study.mask_of("block 16", 0.9), 0))
    change = {name: (after[name].double() - before[name].double()).square() for name in mask.names}
    kept = sum(float(change[name][mask.dense(name)].sum()) for name in mask.names)
    total = sum(float(c.sum()) for c in change.values())
    assert usual["mask"]["energy"] == pytest.approx(kept / total, rel=1e-9)
    monkeypatch.setattr(Study, "_trained", None)
    study.main(["--smoke", "--seeds", "0", "--out", str(tmp_path), "--parts", "train"])


def test_rates_of_kinds(tmp_path, monkeypatch):
    """A kind that is like another takes its rate; each search begins at the rate of the sparsity before."""
    asked = []

    def rate(self, method, start=None):
        asked.append((method.name, method.sparsity, start))
        return 1e-3 * len(asked)

    monkeypatch.setattr(Study, "rate", rate)
    made = GranularityStudy(tmp_path, "toy", SMOKE, sparsities=study.SPARSITIES)
    made.rate_of("column", 0.9)
    assert asked == [("column", 0.9, None)]
    asked.clear()
    made.workload = WORKLOADS["sql"]
    assert made.rate_of("column", 0.95) == 2e-3
    assert asked == [("row", 0.9, None), ("row", 0.95, 1e-3)]


@pytest.mark.slow
def test_times_of_every_kind(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl")
    for _ in range(2):
        study.time_steps(cells, rounds=1, shape="tiny", sparsities=[0.5])
    (record,) = cells.found.values()
    assert record["seconds"].keys() == {DENSE.name, *KINDS} and min(record["seconds"].values()) > 0
    assert record["torch"] == torch.__version__


@pytest.fixture
def found() -> Found:
    records: dict[str, list[dict]] = {}
    for task in WORKLOADS:
        score = {"score": 0.0} if task == "toy_sort" else {}
        records[task] = [{"cell": {"part": "base"}, "nats": 5.0, **score}]
        for seed in (0, 1):
            for kind, sparsity, choice in [
                (DENSE.name, None, USUAL),
                ("element", 0.9, USUAL),
                ("row", 0.9, USUAL),
                ("row", 0.9, "max"),
            ]:
                cell = {"part": "main", "method": study.named(kind, choice), "sparsity": sparsity}
                nats = None if (kind, seed, task) == ("row", 1, "sql") else 0.5 + 0.2 * seed
                score = {"score": 0.25 + 0.5 * seed} if task == "toy_sort" else {}
                mask = {"mask": {"energy": 0.375, "shared": 0.5}} if sparsity else {}
                records[task].append(
                    {"cell": cell | {"seed": seed, "lr": 0.01}, "nats": nats, **score, **mask}
                )
        rate = {"part": "rate", "method": "element", "sparsity": 0.9, "seed": 100, "lr": 0.1}
        records[task].append({"cell": rate, "validation": 0.0})
    seconds = {DENSE.name: 2.0} | dict.fromkeys(KINDS, 1.5)
    time = {"cell": {"part": "time", "shape": "124m", "sparsity": 0.9}, "seconds": seconds}
    return Found(records | {"times": [time]})


def test_tables(found):
    lines = markdown(report.granularity_table(found).lines).splitlines()
    element = next(line for line in lines if line.startswith("| element | 0.9 "))
    loss = "0.600 ± 0.100"
    expected = f"0.75 | 50.0 ± 25.0 | {loss} | {loss} | - | {loss} | 38, 38, 38 | 0.01, 0.01, 0.01 |"
    assert element.endswith(expected)
    assert "| row | 0.9 | 0.75 | 50.0 ± 25.0 | 0.600 ± 0.100 | inf |" in "\n".join(lines)
    assert "| row | 0.99 | - | - | - |" in "\n".join(lines)
    assert next(line for line in lines if line.startswith("| base")).count("5.000") == 3
    assert report.granularity_table(found).text.startswith("Seeds: toy_sort 2, sql 2, gsm8k 2.")
    (usual, largest) = markdown(report.choice_table(found).lines).splitlines()[2:]
    assert usual.startswith(f"| row | 0.9 | {USUAL} | 50.0 ± 25.0") and usual.endswith("| 38 | 50 |")
    assert largest.startswith("| row | 0.9 | max | ")
