"""The study of merging: merges in memory, numbers that are chosen on validation rows, tables."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
import torch

import merge_models
from lota.evaluate.estimates import mean_and_stderr
from lota.models.loading import load_model
from lota.share.delta.format import as_integers
from lota.share.merge.aligned import align
from lota.share.merge.inputs import Entries
from lota.share.merge.rules import METHODS, make_rule
from scripts import merge_grid, merge_report, merge_study
from scripts.cells import Cells
from scripts.merge_grid import KINDS, RULES, WEIGHTED, Setting, coordinate_search, grid, members_of
from scripts.merge_study import Merging, Vectors
from scripts.study import RATE_SEED, Study
from scripts.workloads import BASES

BASE = BASES["tiny-llama"].source

pytestmark = pytest.mark.xdist_group("merge_study")  # in one process: its study is made once


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A base in bf16, and three models: one changed everywhere, two in every fifth entry of their blocks."""
    out, generator = tmp_path_factory.mktemp("tuned"), torch.Generator().manual_seed(0)
    load_model(BASE).bfloat16().save_pretrained(out / "base")
    for i in range(3):
        model = load_model(BASE)
        for name, p in model.named_parameters():
            kept = torch.rand(p.shape, generator=generator) < (0.2 if i else 1) * ("layers" in name or not i)
            p.data += 0.05 * torch.randn(p.shape, generator=generator) * kept
        model.bfloat16().save_pretrained(out / str(i))
    return [out / name for name in ("base", "0", "1", "2")]


@pytest.fixture
def model():
    return load_model(BASE)


@pytest.mark.parametrize("rule", RULES)
def test_merges_are_those_of_the_command(folders, model, tmp_path, rule):
    """Bit for bit, one after another in the same model; of vectors that list everything or a few entries."""
    base, *tuned = folders
    for inputs in (tuned, tuned[1:]):
        vectors, weights = Vectors(base, inputs, model), (0.3, 1.4, 0.5)[: len(inputs)]
        setting = Setting(rule, weights=weights) if rule == WEIGHTED else grid(rule)[-1]
        vectors.merge(make_rule("task_arithmetic", len(inputs), weights=[3.0] * len(inputs)))
        vectors.merge(setting.made(len(inputs), 7))
        words = ["--method", "task_arithmetic" if rule == WEIGHTED else rule]
        words += ["--lambda", "1.4"] if setting.factor != 1 else []
        words += ["--density", str(setting.density)] if setting.density else []
        words += ["--seed", "7"] if "dare" in rule else []
        words += ["--weights", *map(str, weights)] if rule == WEIGHTED else []
        out = tmp_path / str(len(inputs))
        ends = ["--out", str(out), "--deltas", *map(str, inputs)]
        merge_models.main(["--base", str(base), *words, *ends])
        merged, found = load_model(out).state_dict(), model.state_dict()
        assert all(torch.equal(merged[name], found[name]) for name in merged)


def test_a_weight_per_task(folders, model):
    Vectors(folders[0], folders[1:], model).merge(Setting(WEIGHTED, weights=(0.2, 1.4, 0.7)).made(3, 0))
    base, *others = (load_model(folder).state_dict() for folder in folders)
    for name, before in base.items():
        change = sum(w * (o[name].double() - before) for w, o in zip((0.2, 1.4, 0.7), others, strict=True))
        expected = (before + change).float()
        assert torch.allclose(model.state_dict()[name], expected, rtol=2**-8, atol=1e-6)  # bf16


def test_ties_by_hand():
    """Eight entries, of which the three largest of each vector stay; the sign of the larger mass wins."""
    base = torch.ones(8)
    changes = [[4.0, -3.0, 2.0, 1.0, 0, 0, 0, 0], [-5.0, -1.0, 3.0, 8.0, 0.5, 2.0, 0, 0]]
    #    stay   4    -3    2                       -5           3    8
    expected = [1.0 - 5, 1.0 - 3, 1 + (2.0 + 3) / 2, 1.0 + 8, 1, 1, 1, 1]
    parts = []
    for numbers in changes:
        values = torch.tensor(numbers)
        at = values.nonzero().flatten()
        parts.append(Entries(at, values[at], (base + values)[at], torch.ones(len(at), dtype=torch.bool)))
    rule = Setting("ties", 1.0, 3 / 8).made(2, 0)
    merged = base.clone()
    align(parts, 8).merge_(merged, rule, rule.generator())
    assert merged.tolist() == expected
    assert as_integers(merged)[4] == as_integers(base)[4]
    half = base.clone()
    align(parts, 8).merge_(half, Setting("ties", 0.5, 3 / 8).made(2, 0), rule.generator())
    assert half.tolist() == [1 + (value - 1) / 2 for value in expected]


def test_coordinate_search():
    """Ends where no single weight can be improved, also where weights depend on each other."""
    best, tried = (0.3, 1.4, 0.7), []

    def loss(setting: Setting) -> float:
        tried.append(setting.weights)
        a, b, c = (x - y for x, y in zip(setting.weights, best, strict=True))
        return a * a + b * b + c * c + 0.3 * (a * b + b * c)

    found = coordinate_search(Setting("task_arithmetic", 0.5), 3, loss)
    assert tried[0] != (0.5, 0.5, 0.5) and (0.5, 0.5, 0.5) in tried
    assert found.weights == best and found.factor == 1.0
    assert {weight for weights in tried for weight in weights} == set(merge_grid.FACTORS)


def test_grid():
    assert len(grid("sum")) == 1
    assert [setting.factor for setting in grid("task_arithmetic")] == list(merge_grid.FACTORS)
    for rule in METHODS.keys() - {"sum", "task_arithmetic"}:
        pairs = {(setting.factor, setting.density) for setting in grid(rule)}
        assert pairs == set(product(merge_grid.FACTORS, merge_grid.DENSITIES))


class Guard:
    """Counts results and interrupts at some; lets nothing see test rows while something is chosen."""

    def __init__(self, patch: pytest.MonkeyPatch, stops: set[int]):
        self.choosing, self.added = 0, 0
        add, rows, nats = Cells.add, Study.rows, Merging.nats

        def counted(cells, result, **cell):
            record = add(cells, result, **cell)
            self.added += 1
            if self.added in stops:
                raise KeyboardInterrupt
            return record

        def guarded(read):
            def wrapped(owner, *given):
                assert not (self.choosing and given[-1] == "test")
                return read(owner, *given)

            return wrapped

        patch.setattr(Cells, "add", counted)
        patch.setattr(Study, "rows", guarded(rows))
        patch.setattr(Merging, "nats", guarded(nats))
        self._watch(patch, Merging, "choose")
        self._watch(patch, merge_study, "learn")

    def _watch(self, patch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        choose = getattr(owner, name)

        def watched(*given):
            self.choosing += 1
            try:
                return choose(*given)
            finally:
                self.choosing -= 1

        patch.setattr(owner, name, watched)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study that was interrupted while it learnt, chose and measured, and its results."""
    out = tmp_path_factory.mktemp("study")
    command = ["--smoke", "--seeds", "0", "1", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_grid, "FACTORS", (0.3, 1.0))
        patch.setattr(merge_grid, "DENSITIES", (0.2, 0.5))
        Guard(patch, stops := {7, 45, 70, 110})
        for _ in stops:
            with pytest.raises(KeyboardInterrupt):
                merge_study.main(command)
        merge_study.main(command)
        files = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
        patch.setattr(Study, "_trained", None)  # nothing is made twice
        patch.setattr(merge_study, "Vectors", None)
        merge_study.main(command)
        assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == files
        lines = (out / "merging" / "smoke.jsonl").read_text().splitlines()
        yield out, [json.loads(line) for line in lines]


def of(records, part, **cell):
    return [r for r in records if (cell | {"part": part}).items() <= r["cell"].items()]


@pytest.mark.slow
def test_what_is_chosen_is_the_best_on_validation_rows(finished):
    _, records = finished
    assert len({json.dumps(record["cell"]) for record in records}) == len(records)
    for kind, rule in product(KINDS, RULES):
        losses = {json.dumps(r["cell"]): r["loss"] for r in of(records, "tuning", vectors=kind, rule=rule)}
        tried = {(r["cell"]["factor"], r["cell"]["density"]) for r in of(records, "tuning", rule=rule)}
        if rule != WEIGHTED:
            assert tried == {(setting.factor, setting.density) for setting in grid(rule)}
        chosen = {
            tuple(r["cell"][key] for key in ("factor", "density")) + tuple(r["cell"]["weights"] or ())
            for r in of(records, "merged", vectors=kind, rule=rule)
        }
        best = json.loads(min(losses, key=losses.get))
        assert chosen == {(best["factor"], best["density"], *(best["weights"] or ()))}
        assert [r["cell"]["seed"] for r in of(records, "merged", vectors=kind, rule=rule)] == [0, 1]


def members(out):
    return [Study(out, name, workload) for name, workload in members_of("smoke").items()]


def folder_of(study: Study, method: str, seed: int) -> Path:
    """Of a kept run, from the file of its task."""
    (record,) = [
        record
        for record in study.cells.found.values()
        if record["cell"]["part"] == "kept"
        and (record["cell"]["method"], record["cell"]["seed"]) == (method, seed)
    ]
    return study.out / record["folder"]


@pytest.mark.slow
def test_results_are_those_of_the_merged_folders(finished, tmp_path):
    """Validation loss of a choice and test results of a merge, by merge_models.py and the driver alone."""
    out, records = finished
    studies, words = members(out), ["--base", str(BASE), "--method", "ties"]
    for part, split, seed in (("tuning", "validation", RATE_SEED), ("merged", "test", 0)):
        record = of(records, part, vectors="LoTA", rule="ties")[0]
        inputs = [str(folder_of(study, "LoTA", seed)) for study in studies]
        numbers = ["--lambda", str(record["cell"]["factor"]), "--density", str(record["cell"]["density"])]
        merge_models.main([*words, *numbers, "--out", str(tmp_path / part), "--deltas", *inputs])
        model = load_model(tmp_path / part)
        nats = {s.name: s.nats(model, s.tokenizer, s.rows(split)) for s in studies}
        assert record["nats"] == pytest.approx(nats, rel=1e-6)
        if part == "tuning":
            assert record["loss"] == pytest.approx(fmean(nats.values()))
        else:
            assert record["scores"] == {s.name: s.score(model, s.tokenizer) for s in studies}
            assert record["own"] == pytest.approx(studies[0].own(model, studies[0].tokenizer), rel=1e-6)
    second = studies[1]
    model = load_model(BASE, archive=folder_of(second, "LoTA", 1))
    (alone,) = of(records, "alone", vectors="LoTA", task=second.name, seed=1)
    nats = second.nats(model, second.tokenizer, second.rows("test"))
    assert alone["nats"] == pytest.approx({second.name: nats}, rel=1e-6)
    tried = {
        r["cell"]["lr"]: r["validation"]
        for r in second.cells.found.values()
        if r["cell"]["part"] == "rate" and r["cell"]["method"] == "LoTA"
    }
    assert alone["lr"] == min(tried, key=tried.get) and len(tried) == 2


@pytest.mark.slow
def test_disjoint_masks_share_nothing(finished):
    _, records = finished
    overlaps = {
        kind: [pair["overlap"] for r in of(records, "common", vectors=kind) for pair in r["pairs"]]
        for kind in KINDS
    }
    assert overlaps[KINDS[3]] == [0] * 6 and min(overlaps["LoTA"]) > 0
    assert min(overlaps[KINDS[0]]) > max(overlaps["LoTA"])


@pytest.mark.slow
def test_report(finished):
    out, records = finished
    text = (out / "merging.md").read_text()
    runs = of(records, "merged", vectors="LoTA, disjoint", rule="sum")
    mean, error = mean_and_stderr([fmean(run["nats"].values()) for run in runs])
    (line,) = [line for line in text.splitlines() if line.startswith("| LoTA, disjoint | sum | 1 | - | 1 |")]
    assert f"| {mean:.3f} ± {error:.3f} |" in line and line.endswith("| 2 |")
    alone = [
        fmean(
            r["nats"]["smoke toy_sort"] for r in of(records, "alone", vectors="LoTA", task="smoke toy_sort")
        )
    ]
    assert "| LoTA | smoke toy_sort | " in text and f"| {alone[0]:.3f} ± " in text
    (weighted,) = [
        line
        for line in text.splitlines()
        if line.startswith(f"| LoTA | {WEIGHTED} | ") and line.endswith("| 2 |")
    ]
    weights = of(records, "merged", vectors="LoTA", rule=WEIGHTED)[0]["cell"]["weights"]
    assert f"| {' '.join(f'{weight:g}' for weight in weights)} | - |" in weighted
    assert "- Task: toy_shift, raise every digit" in text and "another version" not in text
    assert (out / "merging.png").read_bytes().startswith(b"\x89PNG")
    assert "TIES" in (out / "merging.html").read_text()
    with pytest.raises(SystemExit, match="has no merged model: run the study first"):
        merge_report.write(out / "masks")
