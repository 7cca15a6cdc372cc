"""Folders written parameter by parameter hold what transformers' own save_pretrained would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, logits, new_model, save_model, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lota.models.scope import meta_model
from lota.models.weights import open_weights
from lota.share.hf_weights import write_like


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
    save_model(kind, tmp_path / "base")
    other = save_model(kind, tmp_path / "other", seed=1)
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
    save_model("llama", base)
    word_tokenizer(64, eos_token="</s>").save_pretrained(base)
    found = written(base, out, open_weights(base).read, max_shard_size="20KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and index.keys() == found.keys()
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()


def test_tensors_beside_the_parameters_and_dtypes(tmp_path):
    """What else the base holds is copied in its dtype; a tied weight that it holds twice is written once."""
    base = tmp_path / "base"
    save_model("qwen2", base)
    other = save_model("qwen2", tmp_path / "other", seed=1)
    state = load_file(base / "model.safetensors")
    further = {
        str(dtype): torch.tensor([0, 1, 1]).to(dtype)
        for dtype in (torch.float8_e5m2, torch.int8, torch.int16, torch.uint16, torch.bool)
    }
    fp8 = "model.layers.0.mlp.up_proj.weight"
    state |= {"lm_head.weight": state["model.embed_tokens.weight"].clone(), **further}
    state[fp8] = state[fp8].to(torch.float8_e4m3fn)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    found = written(base, tmp_path / "out", open_weights(tmp_path / "other").read)
    assert found.keys() == state.keys() - {"lm_head.weight"}
    for name, value in further.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name
    values = {**other.state_dict(), fp8: other.state_dict()[fp8].to(torch.float8_e4m3fn)}
    for name in found.keys() - further.keys():
        assert found[name].dtype == values[name].dtype
        assert torch.equal(found[name].view(torch.uint8), values[name].view(torch.uint8)), name
