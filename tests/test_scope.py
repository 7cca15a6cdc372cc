"""The default scope: attention and MLP matrices by role, in every architecture."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
import transformers
from hf_models import ROWS, WIDE, new_config
from torch import nn
from transformers import AutoModelForCausalLM

from lota.masks.trainable import trainable_mask
from lota.models.roles import towers
from lota.models.scope import find_scope, layer_numbers, scope_share, share_sentence, transformer_blocks

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


_BARE = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2}
_GROUPED = {**WIDE, "num_key_value_heads": 2, "pad_token_id": 0}
_STATE = {"state_size": 8, "time_step_rank": 2}
_MAMBA = {"mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}
_HEADS = {f"self_attn.{x}_proj" for x in "qkvo"}
_GATED = {f"{x}_proj" for x in ("gate", "up", "down")}
# family: (config, attention and MLP matrices by their names within a block): all that there are
FAMILIES = {
    "xlm": (  # two lists side by side
        transformers.XLMConfig(vocab_size=ROWS, emb_dim=32, n_layers=2, n_heads=4),
        ({"q_lin", "k_lin", "v_lin", "out_lin"}, {"lin1", "lin2"}),
    ),
    "hrm_text": (  # two stacks
        transformers.HrmTextConfig(**_GROUPED),
        ({*_HEADS, "self_attn.gate_proj"}, {f"mlp.{x}" for x in _GATED}),
    ),
    "moshi": (  # a class "GatingMLP"
        transformers.MoshiConfig(**_BARE, num_attention_heads=4, ffn_dim=48, num_codebooks=2),
        ({f"self_attn.{x}_proj.linear" for x in "qkvo"}, {"mlp.fc1", "mlp.fc2"}),
    ),
    "xlnet": (  # parameters of the attention itself, of three dimensions
        transformers.XLNetConfig(vocab_size=ROWS, d_model=32, n_layer=2, n_head=4, d_inner=48),
        ({f"rel_attn.{x}" for x in "qkvor"}, {"ff.layer_1", "ff.layer_2"}),
    ),
    "dbrx": (  # experts below one another
        transformers.DbrxConfig(
            vocab_size=ROWS,
            d_model=32,
            n_heads=4,
            n_layers=2,
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4},
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ),
        (
            {"norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj"},
            {f"ffn.experts.mlp.{x}" for x in ("w1", "v1", "w2")},
        ),
    ),
    "mamba": (transformers.MambaConfig(**_BARE, **_STATE), (_MAMBA, set())),
    "falcon_mamba": (transformers.FalconMambaConfig(**_BARE, **_STATE), (_MAMBA, set())),
    "mamba2": (
        transformers.Mamba2Config(**_BARE, num_heads=8, head_dim=8, n_groups=2),
        ({"mixer.in_proj", "mixer.out_proj"}, set()),
    ),
    "rwkv": (
        transformers.RwkvConfig(**_BARE, intermediate_size=48),
        (
            {f"attention.{x}" for x in ("key", "value", "receptance", "output")},
            {f"feed_forward.{x}" for x in ("key", "value", "receptance")},
        ),
    ),
    "recurrent_gemma": (
        transformers.RecurrentGemmaConfig(
            **_GROUPED, lru_width=32, head_dim=8, block_types=["recurrent", "attention"]
        ),
        (
            {f"temporal_block.{x}_proj" for x in "qkvo"}
            | {f"temporal_block.linear_{x}" for x in ("x", "y", "out")}
            | {f"temporal_block.rg_lru.{x}_gate_weight" for x in ("input", "recurrent")},
            {f"mlp_block.{x}" for x in _GATED},
        ),
    ),
    "jamba": (
        transformers.JambaConfig(
            **_GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=4, mamba_dt_rank=2
        ),
        (
            _HEADS | {x.replace("mixer", "mamba") for x in _MAMBA},
            {f"feed_forward.{x}" for x in _GATED}
            | {f"feed_forward.experts.{x}" for x in ("gate_up_proj", "down_proj")},
        ),
    ),
    "bamba": (
        transformers.BambaConfig(
            **_GROUPED, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8
        ),
        ({*_HEADS, "mamba.in_proj", "mamba.out_proj"}, {f"feed_forward.{x}" for x in _GATED}),
    ),
    "nemotron_h": (  # mixer, attention, MLP and experts are all called mixer
        transformers.NemotronHConfig(
            **_GROUPED,
            hybrid_override_pattern="M*-E",
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=1,
            n_routed_experts=4,
            moe_intermediate_size=16,
        ),
        (
            {f"mixer.{x}_proj" for x in (*"qkvo", "in", "out")},
            {
                f"mixer.{inner}{x}_proj"
                for inner in ("", "experts.", "shared_experts.")
                for x in ("up", "down")
            },
        ),
    ),
    "lfm2": (
        transformers.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"]),
        (
            {"conv.in_proj", "conv.out_proj", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out"))},
            {f"feed_forward.w{i}" for i in (1, 2, 3)},
        ),
    ),
}


def skeleton(config: transformers.PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_matrix_is_missed(family):
    config, expected = FAMILIES[family]
    model = skeleton(config)
    scope = find_scope(model)
    found: dict[str, set[str]] = {"attention": set(), "mlp": set()}
    for name, tensor in scope.items():
        block = next(prefix for prefix in layer_numbers(model) if name.startswith(f"{prefix}."))
        found[tensor.role].add(name.removeprefix(f"{block}.").removesuffix(".weight"))
    assert (found["attention"], found["mlp"]) == expected
    share = scope_share(model, scope)
    assert (share.share, share.left_out, share.largest) == (1, (), "")


def test_layers_of_several_lists():
    """Lists side by side hold parts of the same layers; stacks of layers are counted one after the other."""
    numbers = layer_numbers(skeleton(FAMILIES["xlm"][0]))
    assert numbers["transformer.attentions.1"] == numbers["transformer.ffns.1"] == 1
    model = skeleton(FAMILIES["hrm_text"][0])
    blocks = [f"model.{stack}_module.layers.{i}" for stack in "LH" for i in range(2)]
    assert layer_numbers(model) == {block: number for number, block in enumerate(blocks)}
    frozen = trainable_mask(model, None, freeze_layers="odd")
    layers = {name: t.layer for name, t in find_scope(model).items()}
    assert {bool(frozen.kept(name)) for name, layer in layers.items() if layer % 2} == {False}
    assert {bool(frozen.kept(name)) for name, layer in layers.items() if not layer % 2} == {True}


def test_what_is_left_out_is_named():
    """Hyper-connections mix the streams between blocks: neither attention nor MLP, and said so."""
    config = transformers.HYV4Config(**{**_GROUPED, "intermediate_size": 8}, n_routed_experts=4, hc_mult=8)
    config.update({"moe_intermediate_size": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8})
    config.update({"num_attention_heads": 1, "num_key_value_heads": 1, "index_n_heads": 1, "v_head_dim": 8})
    model = skeleton(config)
    share = scope_share(model, find_scope(model))
    assert share.share < 0.9 and [name for name, _ in share.left_out][:2] == [
        "model.layers.#.attn_hc.fn",
        "model.layers.#.ffn_hc.fn",
    ]
    said = share_sentence(share.share, share.largest, "model.scope=REGEX")
    assert re.search(
        r"takes \d\d\.\d % .*left out are model\.layers\.#\.attn_hc\.fn \([\d,]+ entries\)", said
    )
    assert said.endswith("and model.scope=REGEX chooses other weights")
    assert "left out" not in share_sentence(share.share, share.largest, None)
    assert "left out" not in share_sentence(0.9, share.largest, "model.scope=REGEX")


def test_share_of_a_pattern():
    model = skeleton(new_config("llama"))
    share = scope_share(model, find_scope(model, "self_attn"))
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    mlp = 2 * 3 * 32 * 48
    assert (share.taken, share.total) == (attention, attention + mlp)
    assert share.left_out[0] == ("model.layers.#.mlp.gate_proj.weight", mlp // 3)


def test_towers_for_images_and_sound():
    model = skeleton(
        transformers.Gemma3Config(
            text_config={**_GROUPED, "head_dim": 8},
            vision_config={**WIDE, "num_hidden_layers": 9, "image_size": 16},
        )
    )
    scope = find_scope(model)
    assert towers(model) == ["model.vision_tower"]
    assert {tensor.layer for tensor in scope.values()} == {0, 1}
    assert all(name.startswith("model.language_model.layers.") for name in scope)
    share = scope_share(model, scope)
    assert share.share < 0.9 and share.largest.startswith("model.vision_tower (")


@pytest.mark.parametrize("tower", [None, "vision_tower"])
def test_stacks_beside_the_one_with_the_embedding(tower):
    """As in BLT all stacks are the text's; beside a tower those outside of the text model connect the two."""
    blocks = [nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)]) for _ in range(3)]
    model = nn.Module()
    model.text, model.resampler = nn.ModuleDict({"embed": nn.Embedding(9, 8), "layers": blocks[0]}), blocks[1]
    if tower is not None:
        model.add_module(tower, nn.ModuleDict({"layers": blocks[2]}))
    model.get_input_embeddings = lambda: model.text["embed"]
    stacks = ["text.layers"] if tower else ["text.layers", "resampler"]
    names = [f"{stack}.{i}" for stack in stacks for i in range(2)]
    assert layer_numbers(model) == {name: number for number, name in enumerate(names)}
    assert towers(model) == ([tower] if tower else [])
