"""Models with towers for images and sound: the text tower trains, the rest stays as it is, on disk too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import transformers
from hf_models import save_policy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import eval_model_all
import extract_masks
import generate_samples
import merge_models
from lota import delta
from lota.masks import Mask
from lota.masks.extract.select import extract
from lota.masks.trainable import trainable_mask
from lota.models.loading import load_model
from lota.models.roles import inside, towers
from lota.models.scope import auto_class, find_scope, load_config, meta_model, scope_share
from lota.share.convert import convert_policy
from lota.train.preflight import prepare
from tasks import get_task

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PHI = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    **_IDS,
}
_TEXT = {**_PHI, "head_dim": 8}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_SMALL, "intermediate_size": 24, "image_size": 16, "patch_size": 8}
_QWEN: dict[str, Any] = {
    "text_config": {**_TEXT, "layer_types": ["linear_attention", "full_attention"]}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    | {"out_hidden_size": 32, "num_position_embeddings": 16, "patch_size": 8},
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT,
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 62,
    },
    "gemma4": {
        "text_config": {**_TEXT, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
        | {"global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**_SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
        | {"patch_size": 4, "position_embedding_size": 16, "use_clipped_linears": True},
        "audio_config": {**_SMALL, "subsampling_conv_channels": [4, 2], "output_proj_dims": 16},
        "image_token_id": 60,
        "video_token_id": 61,
        "audio_token_id": 62,
    },
    "qwen3_5": _QWEN,
    "llama4": {
        "text_config": {**_TEXT, "intermediate_size_mlp": 48, "num_local_experts": 4, "moe_layers": [1]},
        "vision_config": {**_VISION, "intermediate_size": 64, "vision_output_dim": 16}
        | {"projector_input_dim": 16, "projector_output_dim": 16},
        "image_token_index": 62,
    },
    "mllama": {
        "text_config": {**_PHI, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {**_VISION, "attention_heads": 2, "num_global_layers": 1, "max_num_tiles": 2}
        | {"vision_output_dim": 32, "intermediate_layers_indices": [0]}
        | {"supported_aspect_ratios": [[1, 1], [1, 2]]},
        "image_token_index": 62,
    },
    "phi4_multimodal": {
        **_PHI,
        "vision_config": {**_VISION, "crop_size": 16, "image_token_id": 60},
        "audio_config": {"hidden_size": 16, "intermediate_size": 24, "num_blocks": 1, "input_size": 8}
        | {"num_attention_heads": 2, "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16}
        | {"nemo_conv_channels": 8, "audio_token_id": 61},
    },
    "qwen3_5_moe": {  # experts apart on disk, below `language_model.`
        **_QWEN,
        "text_config": {**_QWEN["text_config"], "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    },
    "llava": {  # of which transformers makes no causal LM
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "image_token_index": 62,
        "image_seq_length": 4,
    },
}
CONFIGS["qwen3_vl"] = {  # rotary positions of three axes
    **CONFIGS["qwen3_5"],
    "text_config": {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "vision_config": {**CONFIGS["qwen3_5"]["vision_config"], "deepstack_visual_indexes": [0]},
}
CONFIGS["qwen2_audio"] = {  # which only `AutoModelForMultimodalLM` knows
    "text_config": {**_PHI, "model_type": "qwen2"},
    "audio_config": {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "num_mel_bins": 8}
    | {"encoder_ffn_dim": 24, "max_source_positions": 16},
    "audio_token_index": 62,
}
# Text alone is what `AutoModelForCausalLM` makes of these; their towers stay on disk.
TEXT_ALONE = ("qwen3_5", "qwen3_5_moe", "llama4", "mllama")
BESIDE = {  # what a loader of images reads, and what nobody knows
    "preprocessor_config.json": '{"do_resize": true}',
    "processor_config.json": '{"image_seq_length": 4}',
    "video_preprocessor_config.json": '{"fps": 2}',
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id": 2, "max_length": 30}',
}
SIZES = ("batch_size=8", "eval_batch_size=8", "max_length=48", "max_prompt_length=24", "warmup_steps=2")


def letters() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "->", *map(chr, range(97, 123))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_composite(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with all its towers, every tensor random, saved with what stands beside weights."""
    config = transformers.CONFIG_MAPPING[kind](**CONFIGS[kind])
    torch.manual_seed(0)
    model = (loaders(config)[1:2] or loaders(config))[0].from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    for name, content in BESIDE.items():
        (folder / name).write_text(content)
    return model


def loaders(config: transformers.PreTrainedConfig) -> list[Any]:
    """The Auto classes that load such a config."""
    named = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    autos = [getattr(transformers, name) for name in named]
    return [auto for auto in autos if type(config) in auto._model_mapping]


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        some[name].dtype == others[name].dtype and torch.equal(some[name], others[name]) for name in some
    )


def moved(folder: Path, base: Path) -> set[str]:
    """Names on disk of what differs; both hold the same names and dtypes."""
    before, after = on_disk(base), on_disk(folder)
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    return {name for name in before if not torch.equal(before[name], after[name])}


def tokens(number: int) -> PreTrainedTokenizerFast:
    tokenizer = letters()
    tokenizer.add_tokens([f"w{i}" for i in range(number - len(tokenizer))])
    return tokenizer


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_text_tower_is_the_scope(kind, tmp_path, caplog):
    save_composite(kind, tmp_path)
    model, structure = load_model(tmp_path), meta_model(tmp_path)
    assert "LOAD REPORT" not in caplog.text  # of towers that are not loaded, line by line
    assert type(model) is type(structure)
    assert type(model) is auto_class(load_config(tmp_path))._model_mapping[type(load_config(tmp_path))]
    scope, elsewhere = find_scope(model), towers(model)
    assert bool(elsewhere) == (kind not in TEXT_ALONE)
    assert scope and not [name for name in scope if inside(name, elsewhere)]
    text = [n for n, p in model.named_parameters() if ".layers." in n and p.ndim > 1 and "norm" not in n]
    missed = [n for n in text if n not in scope and not inside(n, elsewhere)]
    others = ("conv1d.weight", "router.weight", "mlp.gate.weight", "shared_expert_gate.weight")
    assert all(name.endswith(others) for name in missed)
    if elsewhere:
        assert scope_share(model, scope).largest.startswith(tuple(elsewhere))
        chosen = find_scope(model, "vision|visual|image_embed|audio")
        assert all(inside(name, elsewhere) for name in chosen)
    with torch.no_grad():
        assert model(input_ids=torch.arange(12).view(2, 6)).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_the_whole_way(kind, workplace, capsys):
    whole_way(kind, workplace, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("gemma3", "qwen3_5")])
def test_the_whole_way_of_others(kind, workplace, capsys):
    whole_way(kind, workplace, capsys)


def whole_way(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrate, extract, adapt, convert, evaluate, sample, and a delta there and back."""
    base = place / "base"
    save_composite(kind, base)
    begin = load_model(base).state_dict()
    how = (f"model.name_or_path={base}", *SIZES, "model.policy_dtype=float32", "lr=1e-2")
    dense, tuned = runs.train(*how, "exp_name=dense")
    elsewhere = towers(dense.model)
    assert all(not p.requires_grad for n, p in dense.model.named_parameters() if inside(n, elsewhere))
    assert same(
        {n: v for n, v in runs.policy(tuned).items() if inside(n, elsewhere)},
        {n: v for n, v in begin.items() if inside(n, elsewhere)},
    )
    masks = ["--sparsities", "0.9", "--name", "mini", "--out", str(place / "masks")]
    extract_masks.main(["--base", str(base), "--tuned", str(tuned), *masks])
    assert ("largest left out" in capsys.readouterr().out) == bool(elsewhere)
    file = place / "masks" / "mini" / "0.9_mask.pt"
    mask = Mask.load(file)
    assert mask.names == list(find_scope(meta_model(base))) and mask.n_kept > 100
    _, adapted = runs.train(*how, "exp_name=adapted", f"mask_path={file}")
    assert runs.assert_frozen(mask, runs.policy(adapted), begin) > 0.2

    check_converted(base, place / "converted", adapted, capsys)
    check_delta(base, place, adapted, file)


def check_converted(base: Path, out: Path, adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is complete, moved in the scope alone, and loads as the base did, on images too."""
    convert_policy(base, adapted / "policy.pt", out)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == {*names, "conversion.json"}
    for name in (*BESIDE, "tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    tuned = moved(out, base)
    assert tuned and all("layers" in name for name in tuned)
    assert not [
        name for name in tuned if any(word in name for word in ("vision", "visual", "audio", "image"))
    ]
    config, told = load_config(base), json.loads((out / "config.json").read_text())
    assert type(load_config(out)) is type(config) and told["architectures"] == config.architectures
    assert load_config(out).get_text_config().vocab_size == config.get_text_config().vocab_size
    trained = runs.policy(adapted)
    for auto in loaders(config):
        model, info = auto.from_pretrained(out, output_loading_info=True, dtype=torch.bfloat16)
        base_model, base_info = auto.from_pretrained(base, output_loading_info=True, dtype=torch.bfloat16)
        assert info == base_info and type(model) is type(base_model)
        if type(model) is type(load_model(base)):
            assert all(torch.equal(v, trained[n].to(v.dtype)) for n, v in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == letters().get_vocab()
    results = out.parent / "results"
    evaluate = ["--datasets", "mini", "--n_examples", "2", "--max_new_tokens", "4", "--out", str(results)]
    assert eval_model_all.main(["--model", str(out), *evaluate]) == 0
    prompts = out.parent / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": "a b c ->"}]))
    draw = ["--prompt_set", str(prompts), "--model_name", "lota", "--max_length", "12"]
    draw += ["--max_prompt_length", "8", "--out", str(results)]
    assert generate_samples.main(["--model_path", str(out), *draw]) == 0


def check_delta(base: Path, place: Path, adapted: Path, mask: Path) -> None:
    """base + delta is what the converter wrote, and back again."""
    file = place / "mini.safetensors"
    delta.extract(base, adapted, file, mask=mask)
    delta.apply(base, file, place / "applied")
    assert same(on_disk(place / "applied"), on_disk(place / "converted"))
    delta.revert(place / "applied", file, place / "back")
    assert same(on_disk(place / "back"), on_disk(base))
    assert {path.name for path in (place / "back").iterdir()} >= {path.name for path in base.iterdir()}


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "qwen3_5_moe", "phi4_multimodal"])
@pytest.mark.parametrize("vocab", ["checkpoint", "base"])
def test_a_vocabulary_that_has_grown(kind, vocab, tmp_path):
    """Every embedding grows, the config that it stands in says so, and the towers stay."""
    base, out, old = tmp_path / "base", tmp_path / "out", _PHI["vocab_size"]
    save_composite(kind, base)
    tokenizer = tokens(old)
    model = load_model(base, pad_token="<PAD>", tokenizer=tokenizer)
    assert len(tokenizer) == old + 1 == model.get_input_embeddings().weight.shape[0]
    embeddings = re.compile(r"embed_tokens(_per_layer)?\.weight|lm_head")
    grown = [p for name, p in model.named_parameters() if embeddings.search(name)]
    assert len(grown) == {"gemma3": 1}.get(kind, 2)  # Gemma 3 ties its two, Gemma 4 has another
    assert all(torch.allclose(p[old:], p[:old].mean(0, keepdim=True), atol=1e-6) for p in grown)
    tokenizer.save_pretrained(base)
    policy = save_policy(tmp_path / "policy.pt", model.state_dict())
    convert_policy(base, policy, out, vocab=vocab, pad_token="<PAD>" if vocab == "checkpoint" else None)
    config = load_config(out).get_text_config()
    if vocab == "base":
        assert moved(out, base) == set() and config.pad_token_id == 0
        assert (out / "config.json").read_text() == (base / "config.json").read_text()
        return
    assert config.pad_token_id == old
    before, after = on_disk(base), on_disk(out)
    assert before.keys() == after.keys()
    grown = {name for name in before if before[name].shape != after[name].shape}
    assert grown and all(re.search("embed_tokens|lm_head", name) for name in grown)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - grown)
    for auto in loaders(load_config(out)):
        _, info = auto.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]


def test_a_vocabulary_that_cannot_grow(workplace):
    """Mllama's embedding has 8 rows that are no outputs."""
    base = workplace / "base"
    save_composite("mllama", base)
    tokens(72).save_pretrained(base)
    with pytest.raises(ValueError, match=r"model\.pad_token=<PAD>: .* 72 embedding rows for 64 outputs"):
        load_model(base, pad_token="<PAD>", tokenizer=tokens(72))
    with pytest.raises(ValueError, match=r"model\.pad_token=<PAD>: .* 72 embedding rows for 64 outputs"):
        prepare(runs.settings(f"model.name_or_path={base}", *SIZES, "model.pad_token='<PAD>'"), get_task)


def test_what_else_a_checkpoint_holds_is_kept(tmp_path):
    """Weights of a head that nothing loads, under names of another release, are in the converted folder."""
    base, out = tmp_path / "base", tmp_path / "out"
    save_composite("qwen3_5", base)
    weights = on_disk(base) | {"mtp.layers.0.weight": torch.randn(4, 4)}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    policy = save_policy(tmp_path / "policy.pt", load_model(base).state_dict())
    convert_policy(base, policy, out)
    assert same(on_disk(out), weights)
    convert_policy(base, policy, out, dtype=torch.float16)
    assert {value.dtype for value in on_disk(out).values()} == {torch.float16}


def test_names_of_memory_on_disk_stay(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save_composite("gemma3", base).save_pretrained(base, save_original_format=False)
    assert any(name.startswith("model.language_model.layers") for name in on_disk(base))
    convert_policy(base, save_policy(tmp_path / "policy.pt", load_model(base).state_dict()), out)
    assert same(on_disk(out), on_disk(base))


def test_scopes_that_somebody_chose(workplace):
    """A tower that was tuned elsewhere gets its mask, and gradients in training; a text alone has none."""
    base, tuned = workplace / "base", workplace / "tuned"
    model = save_composite("gemma3", base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower.encoder" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tuned)
    both = r"vision_tower\.encoder.*(q|fc1)\w*\.weight|language_model.*q_proj"
    masks = {s: extract(base, tuned, [0.9], scope=s)[0.9] for s in (both, "vision_tower.*fc1")}
    assert {name.split(".")[1] for name in masks[both].names} == {"vision_tower", "language_model"}
    assert all("vision_tower" in n for n in masks[both].names if masks[both].kept(n))
    masks[both].save(workplace / "both.pt")
    how = (f"model.name_or_path={base}", *SIZES, f"model.scope='{both}'")
    chosen, _ = runs.train(*how, "exp_name=dense")
    asks = {n for n, p in chosen.model.named_parameters() if p.requires_grad and "vision_tower" in n}
    assert asks == {n for n in masks[both].names if "vision_tower" in n}
    save_composite("qwen3_5", workplace / "text")
    with pytest.raises(ValueError, match="'visual' matches no parameter of Qwen3_5ForCausalLM"):
        find_scope(meta_model(workplace / "text"), "visual")


def test_frozen_layers_leave_towers_alone(tmp_path):
    save_composite("gemma3", tmp_path)
    model = meta_model(tmp_path)
    mask = trainable_mask(model, None, freeze_layers="odd")
    assert not any(mask.kept(name) for name in mask.names if inside(name, towers(model)))
    assert mask.kept("model.language_model.layers.0.mlp.up_proj.weight")


def test_a_tuned_model_may_be_the_text_alone(tmp_path):
    """What `AutoModelForCausalLM` saves of it pairs with the whole; a tower's change would be lost."""
    base, text, changed = (tmp_path / name for name in ("base", "text", "changed"))
    whole = save_composite("qwen3_5", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        whole.model.visual.merger.linear_fc1.weight.mul_(2)
    model.save_pretrained(text)
    whole.save_pretrained(changed)
    for folder in (base, changed):  # what older releases saved, and computed
        weights = on_disk(folder) | {"model.visual.rotary_emb.inv_freq": torch.ones(1) * len(folder.name)}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    mask = extract(base, text, [0.99])[0.99]
    assert [name for name in mask.names if mask.kept(name)] == ["model.layers.0.mlp.up_proj.weight"]
    delta.extract(base, text, tmp_path / "x.safetensors")
    delta.apply(base, tmp_path / "x.safetensors", tmp_path / "out")
    assert moved(tmp_path / "out", base) == {"model.language_model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(ValueError, match=r"linear_fc1\.weight is not that of .* its change would be lost"):
        delta.extract(base, changed, tmp_path / "y.safetensors")
    whole.model.visual.merger.linear_fc1.weight.data.div_(2)
    whole.float().save_pretrained(changed)  # the same values in another dtype
    found = delta.extract(base, changed, tmp_path / "z.safetensors")
    assert found["base_hash"] == found["tuned_hash"]


@pytest.mark.parametrize(
    ("kind", "why"), [("blip-2", "computes nothing without pixel_values"), ("t5gemma2", "has an encoder")]
)
def test_what_does_not_continue_a_text_is_refused(kind, why, tmp_path):
    transformers.CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"makes no causal language model .*{why}"):
        meta_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5_moe", "gemma3"])
def test_deltas_on_top_and_merged(kind, workplace):
    """Halves of the scope, one as a delta and one as a folder: the merge has both and the base's towers."""
    base = workplace / "base"
    save_composite(kind, base)
    tuned = []
    for half in (0, 1):
        model = load_model(base)
        with torch.no_grad():
            for name in list(find_scope(model))[half::2]:
                model.get_parameter(name).mul_(1.25)
        policy = save_policy(workplace / f"{half}.pt", model.state_dict())
        tuned.append(convert_policy(base, policy, workplace / f"tuned{half}").folder)
    file, results, out = workplace / "0.safetensors", str(workplace / "results"), workplace / "merged"
    delta.extract(base, workplace / "0.pt", file)
    evaluate = ["--model", str(base), "--delta", str(file), "--datasets", "mini", "--n_examples", "2"]
    assert eval_model_all.main([*evaluate, "--max_new_tokens", "4", "--out", results]) == 0
    inputs = ["--base", str(base), "--deltas", str(file), str(tuned[1]), "--method", "task_arithmetic"]
    assert not merge_models.main([*inputs, "--out", str(out)])
    assert moved(out, base) == moved(tuned[0], base) | moved(tuned[1], base)
    assert {path.name for path in out.iterdir()} >= {path.name for path in base.iterdir()}
