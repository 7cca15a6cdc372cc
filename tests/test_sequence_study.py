"""The study of tasks one after the other: what is made of its results, and a small sequence of each kind."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from lota.lotto.config_checks import sequence_problems
from lota.models.loading import load_model, load_tokenizer
from lota.train.trainer import Trainer
from scripts import sequence_study
from scripts.methods import DENSE
from scripts.sequence_report import (
    SIZES,
    bests,
    draw,
    every_rate,
    final,
    forgotten,
    learnt,
    members,
    settings,
    summary,
)
from scripts.sequence_study import FFT, KEEPING, LOTTO, SMOKE_SIZES, WAYS, Sequences, Way
from scripts.study import Study, exact
from scripts.workloads import BASES, GROUPS, SMOKE, WORKLOADS
from tests.test_study import nats_of


def run_of(way, lr, seed, losses, validation=None, order="given"):
    """losses: of task after stage, a line per stage."""
    tasks = ["a", "b", "c"]
    stages = [
        {"tasks": {task: {"test": line[i], "validation": line[i]} for i, task in enumerate(tasks) if line[i]}}
        for line in losses
    ]
    stages[-1]["own"] = 1.0
    for values in stages[-1]["tasks"].values():
        values["validation"] = values["test"] if validation is None else validation
    cell = {"part": "sequence", "way": way, "order": order, "lr": lr, "seed": seed}
    return {"cell": cell, "base": "f00", "tasks": tasks, "stages": stages}


ONE = [[1.0, 0, 0], [1.5, 2.0, 0], [3.0, 2.5, 4.0]]


def test_what_is_made_of_a_sequence():
    run = run_of("LoTTO", 1e-2, 0, ONE)
    assert learnt(run, "test") == pytest.approx((1 + 2 + 4) / 3)
    assert final(run, "test") == pytest.approx((3 + 2.5 + 4) / 3)
    assert forgotten(run, "test") == pytest.approx(((3 - 1) + (2.5 - 2)) / 2)


def test_the_rate_is_chosen_on_validation_rows():
    better_on_test = [[0.5, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0.5]]
    records = [
        *(run_of("LoTTO", 1e-2, seed, ONE, validation=1.0) for seed in (0, 1)),
        *(run_of("LoTTO", 1e-3, seed, better_on_test, validation=2.0) for seed in (0, 1)),
        {
            "cell": {"part": "sequence", "way": "LoTTO", "order": "given", "lr": 1.0, "seed": 0},
            "stages": None,
        },
    ]
    assert bests(records, "given")["LoTTO"].lr == 1e-2 and bests(records, "reversed") == {}
    header, line = summary(records, "given")
    assert line[:5] == ["LoTTO", "0.01", "2.333 ± 0.000", "3.167 ± 0.000", "1.250 ± 0.000"]
    assert line[5:] == ["-", "-", "1.0000 ± 0.0000", "2"] and len(header) == len(line)
    assert [line[1] for line in every_rate(records, "given")[1:]] == ["0.001", "0.01"]
    (axes,) = draw({"group": records}).axes
    (curve,) = axes.get_lines()
    assert curve.get_xydata().flatten().tolist() == pytest.approx([0.5, 0.0, 7 / 3, 1.25])


def test_every_way_is_a_sequence_that_lotto_takes(tmp_path):
    sequences = Sequences(tmp_path, "toy tasks", SMOKE_SIZES, (1e-3, 1e-2))
    for way in WAYS:
        config = sequences.config(way, "reversed", 3, 1e-3)
        assert (config.method, config.sequence) == (way.method, ["toy_reverse", "toy_sort", "toy_shift"])
        assert config.validation_fraction == 0.1 and config.seed == 3
    lora = sequences.config(WAYS[2], "given", 0, 1e-3)
    assert (lora.optimizer, lora.lora_rank) == ("AdamW", sequences.first.rank_for(0.9))
    for way in KEEPING:
        config = sequences.config(way, "given", 0, 1e-3)
        assert {key: getattr(config.retain, key) for key in way.retain} == way.retain
        assert way.retain or config.task_overrides
        assert list(sequence_problems(config)) == []
    late = sequences.config(Way("x", "lotto", 0.0, late_sparsity=0.99), "given", 0, 1e-3)
    assert [late.own(task, "sparsity") for task in late.sequence] == [0.9, 0.99, 0.99]


def test_a_way_takes_the_rate_of_another_that_is_not_asked_for(tmp_path, monkeypatch):
    way = next(way for way in KEEPING if way.like == FFT.name)
    runs = []
    monkeypatch.setattr(Sequences, "rate", lambda self, way, seeds: {FFT.name: 1e-3}[way.name])
    monkeypatch.setattr(Sequences, "measured", lambda self, way, *cell: runs.append((way.name, *cell)))
    args = argparse.Namespace(ways=[way.name], orders=["reversed"], seeds=[0, 1])
    sequence_study.run(Sequences(tmp_path, "toy tasks", SMOKE_SIZES, (1e-3,)), args)
    assert runs == [(way.name, "reversed", seed, 1e-3) for seed in (0, 1)]


def test_rates_are_chosen_in_the_given_order(tmp_path, monkeypatch):
    """On validation rows, and a task without a score stays so."""
    seen = []

    def measured(self, way, order, seed, lr):
        seen.append((order, seed))
        losses = {1e-3: 3.0, 1e-2: 1.0, 1e-1: 2.0}
        return {"stages": [{"tasks": {"a": {"validation": losses[lr], "test": -losses[lr]}}}]}

    monkeypatch.setattr(Sequences, "measured", measured)
    assert Sequences(tmp_path, "toy tasks", SMOKE_SIZES, (1e-3, 1e-2, 1e-1)).rate(FFT, [0, 1]) == 1e-2
    assert {*seen} == {("given", 0), ("given", 1)}
    scored = [(one.task, one.n_examples, one.n_scored) for one in members("real tasks", SIZES).values()]
    assert scored == [("sql", 320, 60), ("gsm8k", 320, 0), ("boolq", 320, 60)]


@pytest.mark.slow
def test_a_sequence_is_measured_after_every_stage(tmp_path, monkeypatch):
    """The losses of the model that the sequence leaves, from logits; the same command finds all done."""
    kept = tmp_path / "kept"
    monkeypatch.setattr(
        "scripts.sequence_study.shutil.rmtree", lambda folder, ignore_errors: folder.rename(kept)
    )
    command = ["--smoke", "--seeds", "0", "--orders", "given", "--ways", LOTTO.name, "--out", str(tmp_path)]
    monkeypatch.setattr(sequence_study, "RATES", (1e-3,))
    monkeypatch.setattr(sequence_study, "SMOKE_SIZES", {**SMOKE_SIZES, "n_scored": 0})
    monkeypatch.setattr(Sequences, "rate", lambda self, way, seeds: 1e-2)
    sequence_study.main(command)
    (record,) = [json.loads(line) for line in (tmp_path / "toy tasks.jsonl").read_text().splitlines()]
    assert [list(stage["tasks"]) for stage in record["stages"]] == [
        list(GROUPS["toy tasks"][:n]) for n in (1, 2, 3)
    ]
    folder = BASES["tiny-llama"].source
    (policy,) = kept.glob("3_*/adapt/*/policy.pt")
    model, tokenizer = load_model(folder, archive=policy).eval(), load_tokenizer(folder)
    for name, found in record["stages"][-1]["tasks"].items():
        study = Study(tmp_path / "other", name, replace(WORKLOADS[name], **SMOKE_SIZES))
        nats = tokens = 0.0
        for row in study.rows("test"):
            prompt = tokenizer(study.task.prompt(row)).input_ids
            after = [
                *tokenizer(study.task.target(row), add_special_tokens=False).input_ids,
                tokenizer.eos_token_id,
            ]
            nats, tokens = nats + nats_of(model, prompt, after), tokens + len(after)
        assert found["test"] == pytest.approx(nats / tokens, rel=1e-4)
    assert record["stages"][-1]["own"] == pytest.approx(study.own(model, tokenizer), rel=1e-5)
    assert "LoTTO | 0.01 |" in (tmp_path / "sequences.md").read_text()
    monkeypatch.setattr(Sequences, "_learnt", None)
    sequence_study.main(command)


def test_a_diverged_sequence_is_known_as_such(tmp_path, monkeypatch):
    sequences = Sequences(tmp_path, "toy tasks", SMOKE_SIZES, (1e-3,))
    found = sequences.measured(FFT, "given", 0, 1e6)
    assert found["stages"] is None and settings([found]) == {}
    assert not list((tmp_path / "runs" / "toy tasks").glob("*"))


def test_the_exact_model(tmp_path):
    """Where training holds bf16 copies, what is measured are the masters; frozen entries are those copies."""
    study = Study(tmp_path, "smoke", SMOKE)
    config = study.config(DENSE, 0, 1e-2)
    config.mask_path = str(tmp_path / "mask.pt")
    from lota.masks import Mask

    model = load_model(study.folder)
    name = "model.layers.0.mlp.up_proj.weight"
    kept = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
    kept[::2, 3] = True
    Mask.from_dense({name: kept}).save(tmp_path / "mask.pt")
    config.model.fsdp_policy_mp = "bfloat16"
    trainer = Trainer(config, study.find_task)
    trainer.train()
    narrow = trainer.model.get_parameter(name).detach().float().clone()
    masters = trainer.optimizer.exact_values(trainer.model.get_parameter(name)).clone()
    found = exact(trainer).get_parameter(name).detach()
    assert found.dtype == torch.float32 and torch.equal(found[kept], masters)
    assert not torch.equal(narrow[kept], masters) and torch.equal(found[~kept], narrow[~kept])
