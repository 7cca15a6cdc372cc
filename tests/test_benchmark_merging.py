"""The benchmark's contestants, on a small shape: they merge the same vectors to the same model."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

import merge_models
from benchmarks import merging

SMALL = merging.SHAPE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def test_contestants_do_the_same_work(tmp_path):
    merging.make(tmp_path, sparsity=0.8, shape=SMALL)
    merged = {}
    for name in ("LoTA, deltas", "LoTA, models"):
        words = merging.contestants(tmp_path)[name][2:]
        merge_models.main([*words, str(tmp_path / name)])
        merged[name] = load_file(tmp_path / name / "model.safetensors")
    base, (one, other) = load_file(tmp_path / "base" / "model.safetensors"), merged.values()
    assert all(torch.equal(one[key], other[key]) for key in base)
    matrix = "model.layers.0.mlp.up_proj.weight"
    tuned = load_file(tmp_path / "a" / "model.safetensors")
    assert (tuned[matrix] != base[matrix]).float().mean() == pytest.approx(0.2, abs=0.05)
    assert (tmp_path / "ties.yml").is_file()


def test_a_command_is_measured_or_ends_the_benchmark():
    seconds, peak = merging.measured([sys.executable, "-c", "import time; time.sleep(0.2)"])
    assert seconds > 0.2 and peak > 2**20
    with pytest.raises(SystemExit, match=r"failed: [\s\S]*ValueError: no"):
        merging.measured([sys.executable, "-c", "raise ValueError('no')"])
