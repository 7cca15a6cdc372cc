"""The default scope: attention and MLP matrices by role, in every architecture."""

from __future__ import annotations

import pytest
import tiny

from lota.models.scope import find_scope, transformer_blocks

_LLAMA_ATTENTION = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
_LLAMA_MLP = {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
PER_LAYER = {  # (attention, MLP) names within a block
    "llama": (_LLAMA_ATTENTION, _LLAMA_MLP),
    "gpt2": ({"attn.c_attn.weight", "attn.c_proj.weight"}, {"mlp.c_fc.weight", "mlp.c_proj.weight"}),
    "qwen2": (_LLAMA_ATTENTION, _LLAMA_MLP),
    "gpt_neox": (
        {"attention.query_key_value.weight", "attention.dense.weight"},
        {"mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"},
    ),
    "mixtral": (_LLAMA_ATTENTION, {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
}


@pytest.mark.parametrize("architecture", PER_LAYER)
def test_default_scope(architecture):
    model = tiny.make(architecture)
    scope = find_scope(model)
    blocks = [prefix for prefix, _ in transformer_blocks(model)]
    assert len(blocks) == 2
    for layer, prefix in enumerate(blocks):
        for role, expected in zip(("attention", "mlp"), PER_LAYER[architecture], strict=True):
            found = {
                n.removeprefix(prefix + ".") for n, t in scope.items() if t.layer == layer and t.role == role
            }
            assert found == expected
    order = [name for name, _ in model.named_parameters() if name in scope]
    assert list(scope) == order
    assert all(scope[n].shape == p.shape for n, p in model.named_parameters() if n in scope)


def test_routers_stay_outside():
    assert not [name for name in find_scope(tiny.make("mixtral")) if name.endswith("mlp.gate.weight")]


def test_scope_by_pattern():
    model = tiny.make("llama")
    assert set(find_scope(model, r"layers\.1\..*norm")) == {
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }
    with pytest.raises(ValueError, match="matches no parameter"):
        find_scope(model, "no_such_name")
    with pytest.raises(ValueError, match="not a regular expression"):
        find_scope(model, "(")
    with pytest.raises(ValueError, match="block_name=GPT2Block"):
        find_scope(model, r"layers\.1", "GPT2Block")


def test_blocks_by_class_name():
    model = tiny.make("gpt2")
    assert transformer_blocks(model) == transformer_blocks(model, "GPT2Block")
    with pytest.raises(ValueError, match=r"block_name=LlamaDecoderLayer: .*one of GPT2Block"):
        transformer_blocks(model, "LlamaDecoderLayer")
