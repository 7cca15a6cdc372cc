"""What benchmarks/step.py prints: a small run, ratios and verdicts against numbers worked out by hand."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import tiny
import torch

from benchmarks import step
from benchmarks.step_report import REACHES, Measured, reached, table

MIB = 2**20


def test_every_contestant_of_the_wanted_ratios_exists_and_runs_by_default():
    wanted = {name for reaches in REACHES.values() for r in reaches for name in (r.contestant, r.other)}
    assert wanted <= set(step.DEFAULT) <= set(step.CONTESTANTS)
    assert set(step.REFERENCES) <= set(step.DEFAULT)


def test_a_ratio_below_one_is_better_than_the_reference():
    rows = [Measured("lota", 3.0, 800 * MIB), Measured("peft_lora_r64", 4.0, 1000 * MIB)]
    head, ours, lora = table(rows, step.REFERENCES).splitlines()
    assert head.split() == ["contestant", "median", "s", "/", "lora_r64", "peak", "MiB", "/", "lora_r64"]
    assert ours.split() == ["lota", "3.000", "0.75", "800", "0.80"]
    assert lora.split() == ["peft_lora_r64", "4.000", "1.00", "1000", "1.00"]


def test_without_a_reference_the_first_contestant_is_it():
    rows = [Measured("lota_rows", 2.0, 500 * MIB), Measured("lota", 3.0, 600 * MIB)]
    assert table(rows, step.REFERENCES).splitlines()[2].split() == ["lota", "3.000", "1.50", "600", "1.20"]


@pytest.mark.parametrize(("seconds", "verdict"), [(3.4, "reached"), (3.41, "missed")])
def test_the_limit_itself_is_reached(seconds, verdict):
    rows = [Measured("lota_rows", seconds, 800 * MIB), Measured("peft_lora_r64", 4.0, 1000 * MIB)]
    time, peak = reached(rows, 0.9)
    assert time.startswith("lota_rows: seconds / peft_lora_r64's") and time.endswith(f"<= 0.85: {verdict}")
    assert peak.endswith("0.800, wanted <= 0.80: reached")
    assert not reached(rows, 0.5) and not reached(rows[:1], 0.9)


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_masks_of_lines_keep_their_share_of_every_weight(granularity):
    model = tiny.make("llama")
    mask = step.line_mask(model, 0.5, granularity, block=16)
    for name in mask.names:
        kept = mask.dense(name)
        tall, wide = {"row": (1, kept.shape[1]), "column": (kept.shape[0], 1), "block": (16, 16)}[granularity]
        tiles = kept[::tall, ::wide]
        height, width = kept.shape
        whole = tiles.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[:height, :width]
        assert torch.equal(kept, whole)
        assert int(tiles.sum()) == round(0.5 * tiles.numel())


def test_a_small_run(monkeypatch, capsys):
    """Peaks come from processes of their own and are left out here."""
    monkeypatch.setattr(step, "own_process_peak", lambda args, name, module: 100 * MIB)
    names = ["lota", "lota_rows", "lota_columns", "lota_blocks", "dense_masked_scope"]
    options = [
        "--shape=tiny",
        "--length=8",
        "--batch=2",
        "--rounds=2",
        "--sparsity=0.5",
        "--contestants",
        *names,
    ]
    monkeypatch.setattr(sys, "argv", ["step", *options])
    step.main()
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [line["contestant"] for line in lines] == names
    assert all(len(line["seconds"]) == 2 for line in lines)
    assert "dense_masked" in printed.splitlines()[-1] and "wanted" not in printed  # of another shape


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft reads it
def test_adapters_have_the_dtype_of_the_model():
    """A baseline that multiplied its adapters in fp32 beside bf16 weights would be slow for no reason."""
    args = argparse.Namespace(shape="tiny", dtype="bfloat16", device="cpu", checkpointing=False, length=8)
    model = step.adapted(step.build_model(args), step.lora_config())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.bfloat16}
