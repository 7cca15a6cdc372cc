"""Folders written parameter by parameter hold what transformers' own save_pretrained would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, logits, new_model, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lota.models.scope import meta_model
from lota.models.weights import open_weights
from lota.share.hf_weights import write_like


def saved(kind: str, folder: Path, seed: int = 0, **options):
    model = new_model(kind, seed)
    model.save_pretrained(folder, **options)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def written(base: Path, out: Path, value_of, **options) -> dict[str, torch.Tensor]:
    out.mkdir()
    model = meta_model(base)
    write_like(base, open_weights(base, model), model, out, value_of, **options)
    return weights(out)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_values_of_another_model(kind, tmp_path):
    """Read under loaded names, written under names on disk: experts apart, heads renamed, tied once."""
    saved(kind, tmp_path / "base")
    other = saved(kind, tmp_path / "other", seed=1)
    source = open_weights(tmp_path / "other")
    found = written(tmp_path / "base", tmp_path / "out", source.read)
    expected = weights(tmp_path / "other")
    assert found.keys() == expected.keys() == weights(tmp_path / "base").keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(other))


def test_each_parameter_is_asked_for_once_and_cast_to_the_bases_dtype(tmp_path):
    new_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    asked = []

    def value_of(name):
        asked.append(name)
        return torch.full(shapes[name], 1 / 3)

    shapes = {name: tuple(p.shape) for name, p in meta_model(tmp_path / "base").named_parameters()}
    found = written(tmp_path / "base", tmp_path / "out", value_of)
    assert sorted(asked) == sorted(shapes)
    assert all(
        value.dtype == torch.bfloat16 and (value == torch.tensor(1 / 3).bfloat16()).all()
        for value in found.values()
    )


def test_shards_and_small_files(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    saved("llama", base)
    word_tokenizer(64, eos_token="</s>").save_pretrained(base)
    found = written(base, out, open_weights(base).read, max_shard_size="20KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and index.keys() == found.keys()
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()


def test_a_tied_weight_that_the_base_stores_twice_is_written_once(tmp_path):
    saved("qwen2", tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    other = saved("qwen2", tmp_path / "other", seed=1)
    found = written(tmp_path / "base", tmp_path / "out", open_weights(tmp_path / "other").read)
    assert "lm_head.weight" not in found
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(other))
