"""Loading: what comes back is the file's numbers, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import (
    CONFIGS,
    INPUT,
    ROWS,
    TIED,
    WIDE,
    logits,
    new_config,
    new_model,
    save_model,
    save_policy,
    word_tokenizer,
)
from safetensors.torch import load_file, save_file
from tolerance import assert_same, chain
from transformers import AutoModelForCausalLM

from lota.models.loading import (
    add_pad_token,
    choose_pad_token_id,
    dtype_of,
    enable_activation_checkpointing,
    load_model,
    load_tokenizer,
    resize_vocabulary,
    turn_dropout_off,
)
from lota.models.policy import read_policy
from lota.models.scope import transformer_blocks
from lota.models.weights import open_weights

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder with a saved model of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in CONFIGS:
        new_model(kind).save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_gives_what_transformers_gives(kind, dtype, folders, tmp_path):
    tuned = new_model(kind, seed=1)
    tuned.save_pretrained(tmp_path / "tuned")
    ours = load_model(
        folders / kind, archive=save_policy(tmp_path / "policy.pt", tuned.state_dict()), dtype=dtype
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=dtype)
    assert torch.equal(logits(ours), logits(theirs))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert {p.dtype for p in ours.parameters()} == {dtype} == {ours.config.dtype}
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name  # rotary frequencies stay float32


def test_what_the_archive_may_be(folders, tmp_path):
    tuned = new_model("llama", seed=1)
    tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "epoch-1").mkdir()
    save_policy(tmp_path / "epoch-1" / "policy.pt", tuned.state_dict())
    for archive in ("tuned", "epoch-1", "epoch-1/policy.pt"):
        loaded = load_model(folders / "llama", archive=tmp_path / archive)
        assert torch.equal(logits(loaded), logits(tuned)) and not loaded.training
    policy = tmp_path / "epoch-1" / "policy.pt"
    policy.write_bytes(bytes(policy.stat().st_size))  # overwritten in place: the weights do not live there
    assert torch.equal(logits(loaded), logits(tuned))
    with pytest.raises(ValueError, match=r"nothing does not exist: give a Hugging Face folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no policy file at .*absent\.pt"):
        load_model(folders / "llama", archive=tmp_path / "absent.pt")


def wrap(pattern: str):
    return lambda state, folder: {pattern.format(name): value for name, value in state.items()}


def without(*names: str, **added: torch.Tensor):
    return lambda state, folder: {n: v for n, v in state.items() if n not in names} | added


def checkpointed(state, folder):
    return {name.replace(".h.0.", ".h.0._checkpoint_wrapped_module."): v for name, v in state.items()}


def as_on_disk(state, folder):
    """Experts apart and `embed_out`: names of an older release of transformers."""
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("gpt2", wrap("module.{}")),
        ("gpt2", wrap("_orig_mod.{}")),
        ("gpt2", wrap("module._orig_mod.{}")),
        ("gpt2", checkpointed),
        ("mixtral", as_on_disk),
        ("gpt_neox", as_on_disk),
        ("gpt2", without("lm_head.weight")),
        ("gpt2", without("transformer.wte.weight")),
        ("gpt2", without(**{"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)})),  # an older release's
    ],
)
def test_a_policy_under_other_names(kind, edit, folders, tmp_path):
    state = new_model(kind).state_dict()
    edited = edit(state, folders / kind)
    assert set(edited) != set(state)
    loaded = load_model(folders / kind, archive=save_policy(tmp_path / "policy.pt", edited))
    assert torch.equal(logits(loaded), logits(new_model(kind)))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == (kind in TIED)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("llama", without(UP), rf"1 missing there: {UP}"),
        ("llama", without(UP, **{"model.layers.9.x": torch.ones(3)}), r"1 missing.*1 only there: model\.la"),
        ("llama", without(**{"model.layers.9.x": torch.ones(3)}), r"1 only there: model\.layers\.9\.x"),
        (
            "llama",
            without(**{"model.norm.weight": torch.ones(31)}),
            r"norm\.weight \(31,\) instead of",
        ),
    ],
)
@pytest.mark.parametrize("stored", ["policy", "folder"])
def test_weights_that_do_not_fit_are_refused(kind, edit, message, stored, folders, tmp_path):
    archive = tmp_path / "archive"
    new_model(kind).save_pretrained(archive)
    state = edit(load_file(archive / "model.safetensors"), archive)
    if stored == "policy":
        archive = save_policy(tmp_path / "policy.pt", state)
    else:
        save_file(state, archive / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"(?s){archive}.* does not belong to a Llama.*{message}"):
        load_model(folders / kind, archive=archive)


def test_a_deeper_models_weights_and_untied_ones_are_refused(folders, tmp_path):
    new_model("llama").save_pretrained(tmp_path)
    new_config("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)9 only there: model\.layers\.1.*and 5 more"):
        load_model(tmp_path)
    state = {**new_model("qwen2").state_dict(), "lm_head.weight": torch.zeros(ROWS, 32)}
    with pytest.raises(ValueError, match="differ, but the base ties them"):
        load_model(folders / "qwen2", archive=save_policy(tmp_path / "policy.pt", state))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_damaged_weights_is_named(content, file, tmp_path):
    new_model("llama").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        load_model(tmp_path)


class RunsCode:
    def __init__(self, touched: Path):
        self.touched = str(touched)

    def __reduce__(self):
        return (open, (self.touched, "w"))


@pytest.mark.parametrize("read", [read_policy, open_weights])
def test_a_pickle_that_would_run_code_is_not_run(read, tmp_path):
    runs_code = RunsCode(tmp_path / "touched")
    path = save_policy(tmp_path / "policy.pt", {"a": torch.zeros(2), "b": runs_code})
    with pytest.raises(ValueError, match=r"policy\.pt was not read.*could run code"):
        read(path)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(runs_code))
    with pytest.raises(ValueError, match=r"bare\.pt"):
        read(tmp_path / "bare.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("read", [read_policy, open_weights])
def test_a_truncated_policy_is_refused_at_every_length(read, tmp_path):
    path = save_policy(tmp_path / "policy.pt", new_model("llama").state_dict())
    content = path.read_bytes()
    for length in (0, 1, 10, 100, len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        message = (
            r"policy\.pt \(.* bytes\) cannot be read: it is truncated" if length else "policy.pt is empty"
        )
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.zeros(2)}, "lacks step_idx, state, metrics"),
        ({"step_idx": 1, "state": {"w": torch.zeros(2)}}, "lacks metrics"),
        ({"step_idx": 1, "state": {}, "metrics": {}}, "'state' is not"),
        ({"step_idx": 1, "state": {"w": 3}, "metrics": {}}, "'state' is not"),
        ([1, 2], "holds a list"),
        ({"step_idx": 1, "state": dict.fromkeys(["w", "module.w"], INPUT), "metrics": {}}, "both called w"),
    ],
)
def test_other_layouts_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=message):
        read_policy(tmp_path / "policy.pt")


def test_a_policy_in_torchs_old_format_is_refused(tmp_path):
    content = {"step_idx": 1, "state": {"w": torch.arange(3.0)}, "metrics": {}}
    torch.save(content, tmp_path / "policy.pt", _use_new_zipfile_serialization=False)
    for read in (read_policy, open_weights):
        with pytest.raises(ValueError, match=r"policy\.pt .* layout of before torch 1\.6: load it and"):
            read(tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_grown_and_cut_vocabularies(kind, folders, tmp_path):
    plain = load_model(folders / kind)
    assert torch.equal(logits(plain), logits(new_model(kind)))
    for rows in (ROWS - 4, ROWS + 3):
        resized, again = load_model(folders / kind), load_model(folders / kind)
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        resize_vocabulary(resized, rows)
        assert torch.equal(torch.rand(3), expected)  # the random stream is left alone, and not used:
        resize_vocabulary(again, rows)
        assert all(torch.equal(a, b) for a, b in zip(resized.parameters(), again.parameters(), strict=True))
        for layer in (resized.get_input_embeddings(), resized.get_output_embeddings()):
            assert layer.weight.shape == (rows, 32)
            mean = layer.weight[:ROWS].double().mean(dim=0).float()
            assert torch.equal(layer.weight[ROWS:], mean.expand(max(rows - ROWS, 0), -1))
        ids, shown = INPUT.clamp(max=rows - 1), min(rows, ROWS)  # the head's product has other sizes
        got, want = (model(ids).logits[..., :shown] for model in (resized, plain))
        assert_same(got, want, terms=chain(plain))
        loaded = load_model(folders / kind, archive=save_policy(tmp_path / "policy.pt", resized.state_dict()))
        for model in (resized, loaded):
            assert torch.equal(logits(model), logits(resized)) and model.config.vocab_size == rows
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert tied == (kind in TIED)


def test_pad_token_grows_model_and_tokenizer_once(tmp_path):
    new_model("llama").save_pretrained(tmp_path)
    word_tokenizer(ROWS, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    loaded = load_model(tmp_path, pad_token="<PAD>", tokenizer=tokenizer)
    assert tokenizer.pad_token_id == ROWS == loaded.config.pad_token_id
    assert loaded.get_input_embeddings().weight.shape[0] == ROWS + 1
    policy = save_policy(tmp_path / "policy.pt", loaded.state_dict())
    again = load_model(tmp_path, archive=policy, pad_token="<PAD>")
    assert torch.equal(logits(again), logits(loaded))
    assert again.get_input_embeddings().weight.shape[0] == ROWS + 1


def test_pad_token_uses_a_spare_row(tmp_path):
    """Some models have more embedding rows than tokens: no growth then, and none for a token that exists."""
    new_model("llama").save_pretrained(tmp_path)
    word_tokenizer(ROWS - 5, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert load_model(tmp_path, pad_token="<PAD>", tokenizer=tokenizer).config.vocab_size == ROWS
    assert tokenizer.pad_token_id == ROWS - 5
    assert add_pad_token(tokenizer, "w3") == 3


@pytest.mark.parametrize(
    ("rows", "special", "config_eos", "expected"),
    [
        (ROWS, {"eos_token": "e", "pad_token": "p"}, 2, ROWS - 1),
        (ROWS, {"eos_token": "e"}, 2, ROWS - 1),
        (ROWS + 1, {"eos_token": "e", "pad_token": "p"}, 2, ROWS - 1),
        (ROWS, {"unk_token": "u"}, None, ROWS - 1),
        (ROWS, {}, None, 0),
        (ROWS, {}, [5, 6], 5),
    ],
)
def test_choose_pad_token_id_never_leaves_the_embedding(rows, special, config_eos, expected):
    config = new_config("llama", pad_token_id=None, eos_token_id=config_eos)
    assert choose_pad_token_id(word_tokenizer(rows, **special), config) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.CodeGenConfig(eos_token_id=7), 7),  # which has no pad_token_id
        (transformers.CpmAntConfig(), 0),  # which has neither
        (transformers.Gemma3Config(text_config={"eos_token_id": 5, "pad_token_id": 6}), 6),
    ],
)
def test_choose_pad_token_id_of_a_config_without_such_keys(config, expected):
    assert choose_pad_token_id(word_tokenizer(8), config) == expected


def test_real_tokenizer(stories):
    tokenizer = load_tokenizer(stories)
    assert tokenizer.pad_token_id is None
    assert choose_pad_token_id(tokenizer, load_model(stories).config) == tokenizer.eos_token_id == 2
    assert len(tokenizer) == 512


def test_parameters_that_are_parts_of_one_stored_tensor_get_memory_of_their_own(tmp_path):
    """HRM's projections are stored as one tensor, and to autograd the parts that it is cut into stay one."""
    config = transformers.HrmTextConfig(
        **WIDE, num_layers_per_stack=1, H_cycles=1, L_cycles=2, num_key_value_heads=4, head_dim=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    places = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in model.parameters())
    tied = load_model(save_model("gpt2", tmp_path / "tied") and tmp_path / "tied")
    assert tied.lm_head.weight is tied.transformer.wte.weight


@pytest.mark.parametrize(
    ("make", "encoder", "decoder"),
    [
        (transformers.BertConfig, {"is_decoder": False}, {"is_decoder": True}),
        (transformers.XLMConfig, {"causal": False}, {"causal": True}),
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(make, encoder, decoder, tmp_path):
    for how, settings in (("encoder", encoder), ("decoder", decoder)):
        config = make(**{**WIDE, **settings})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / how)
    ((key, value),) = decoder.items()
    with pytest.raises(
        ValueError, match=rf"encoder: .* on what comes after it.* set {key} to {json.dumps(value)} in"
    ):
        load_model(tmp_path / "encoder")
    assert load_model(tmp_path / "decoder").num_parameters()


def test_xlnet_is_refused_either_way(tmp_path):
    """Of two directions it sees too much; of one it takes no batch with an attention mask."""
    for kind, message in (("bi", "give a causal model"), ("uni", "does not run on batches of token ids")):
        config = transformers.XLNetConfig(**WIDE, d_inner=48, d_head=8, attn_type=kind)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / kind)


def test_a_model_that_needs_more_than_token_ids_is_refused(folders, monkeypatch):
    def forward(self, pixel_values, **more):
        raise AssertionError

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM does not run on batches of token ids alone.*pixel_values"
    ):
        load_model(folders / "llama")


@pytest.mark.parametrize("model_type", ["gpt2", "llama", None])
def test_folder_without_tokenizer_is_refused(model_type, tmp_path):
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer_name_or_path"):
        load_tokenizer(tmp_path)


def test_a_checkpoint_that_is_not_converted_yet(tmp_path):
    """Also given by the run's own folder: the last one is meant."""
    for at, name in enumerate(("step-8", "step-16")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.pt").write_bytes(b"")
        os.utime(tmp_path / name / "policy.pt", (at, at))
    for given in (tmp_path / "step-16", tmp_path / "step-16" / "policy.pt", tmp_path):
        (tmp_path / "config.yaml").write_text("{}")
        with pytest.raises(ValueError, match=r"convert it first, .*step-16/policy\.pt"):
            load_tokenizer(given)


def test_dropout_is_off_beside_a_config_that_is_a_dict():
    """IDEFICS keeps one on a module."""
    module = torch.nn.Dropout(0.5)
    module.config = {"attention_dropout": 0.5}
    turn_dropout_off(module)
    assert module.p == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_dropout_is_off_in_train_mode(kind, folders):
    assert torch.equal(logits(load_model(folders / kind).train()), logits(load_model(folders / kind)))
    if kind in ("llama", "gpt_neox", "gpt2", "gptj"):  # the test's configs have dropout there
        model = new_model(kind).train()
        assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("kind", CONFIGS)
def test_activation_checkpointing_gives_the_same_gradients(kind, folders, monkeypatch):
    plain, checkpointed = (load_model(folders / kind).train() for _ in range(2))
    enable_activation_checkpointing(checkpointed)
    assert checkpointed.config.use_cache is False
    # without a cache on either side: through it, keys are laid out anew and take other kernels (gptj's did)
    plain.config.use_cache = False
    recomputed = []
    block = transformer_blocks(checkpointed)[0][1]
    first_linear = next(m for m in block.modules() if not list(m.children()) and list(m.parameters()))
    first_linear.register_forward_hook(lambda *_: recomputed.append(1))
    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "apply", None)  # the reentrant kind fails
    for model in (plain, checkpointed):
        model(INPUT, labels=INPUT).loss.backward()
    assert len(recomputed) == 2  # once forward, once more in backward
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert_same(b.grad, a.grad, terms=chain(plain, tokens=INPUT.numel()), name=name)


def test_dtype_names():
    assert dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="'fp8': choose one of float32, bfloat16, float16"):
        dtype_of("fp8")


# What is refused before anything is read, and NaN


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def edited(folder, **changes):
    """Change keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def stored_as(folder, change, extra=None):
    """Rewrite the weights, one matrix changed, others added."""
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "down_proj" in name)
    state[name] = change(state[name])
    extra = {k.format(name): v for k, v in (extra or {}).items()}
    save_file(state | extra, folder / "model.safetensors", metadata={"format": "pt"})


BAD_MODELS = {
    "lfs": (lambda f: (f / "model.safetensors").write_bytes(LFS), r"model\.safetensors is a Git LFS pointer"),
    "page": (lambda f: (f / "model.safetensors").write_bytes(b"<html>"), r"model\.safetensors is a web page"),
    "config page": (lambda f: (f / "config.json").write_bytes(LFS), r"config\.json is a Git LFS pointer"),
    "deep": (
        lambda f: (f / "config.json").write_text('{"a":' * 200_000),
        r"config\.json is damaged: its .* bytes of JSON could take",
    ),
    "list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json is damaged: it holds no JSON object",
    ),
    "heads": (lambda f: edited(f, num_attention_heads=7), r"config\.json is refused .*attention heads \(7\)"),
    "no heads": (
        lambda f: edited(f, num_attention_heads=0),
        r"config\.json is refused by transformers: integer modulo",
    ),
    "text": (lambda f: edited(f, hidden_size="wide"), r"config\.json is refused .*hidden_size.*got str"),
    "layers": (
        lambda f: edited(f, num_hidden_layers=1),
        r"does not belong to a Llama(.|\n)*only there: .*layers\.1",
    ),
    "endless layers": (lambda f: edited(f, num_hidden_layers=10**12), r"asks for 1,000,000,000,000 layers"),
    "more layers": (lambda f: edited(f, num_hidden_layers=3), r"missing there: model\.layers\.2"),
    "shapes": (lambda f: edited(f, intermediate_size=96), "of another shape"),
    "int8": (lambda f: stored_as(f, lambda w: w.to(torch.int8)), r"is quantized \(.*is torch\.int8"),
    "fp8": (
        lambda f: stored_as(f, lambda w: w.to(torch.float8_e4m3fn), {"{}_scale_inv": torch.ones(1)}),
        r"float8_e4m3fn and has its scales in another tensor",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds a PEFT adapter"),
    "name": (
        lambda f: (f / "model.safetensors").rename(f / "x.safetensors"),
        "transformers reads model.safe",
    ),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_is_named_before_it_is_loaded(kind, tmp_path, monkeypatch):
    save_model("llama", tmp_path)
    spoil, message = BAD_MODELS[kind]
    spoil(tmp_path)
    monkeypatch.setattr("lota.models.loading._load_all", None)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_fp8_with_scales_is_never_compared(tmp_path):
    save_model("llama", tmp_path)
    stored_as(tmp_path, lambda w: w.to(torch.float8_e4m3fn), {"{}_scale_inv": torch.ones(1)})
    with pytest.raises(ValueError, match="has its scales in another tensor"):
        open_weights(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", ["folder", "policy"])
def test_nan_and_infinity_are_told_with_tensor_and_file(value, stored, tmp_path):
    model = save_model("llama", tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_policy(tmp_path / "policy.pt", state)
    if stored == "folder":
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    archive = tmp_path / "policy.pt" if stored == "policy" else None
    file = "policy.pt" if stored == "policy" else "model.safetensors"
    with pytest.raises(ValueError, match=rf"{file}: model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_model(tmp_path, archive=archive)


def test_values_that_a_dtype_cannot_hold(tmp_path):
    save_model("llama", tmp_path)
    stored_as(tmp_path, lambda w: w + 1e6)
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"down_proj\.weight has values that torch\.float16 cannot hold"):
        load_model(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("kind", ["safetensors", "delta"])
def test_what_is_no_policy_says_so(kind, folders, tmp_path):
    file = tmp_path / "delta.safetensors"
    save_file({"x": torch.zeros(2)}, file, metadata={"format": "lota-delta" if kind == "delta" else "pt"})
    message = "is a delta file, .* put it on its base" if kind == "delta" else "is no policy.pt: give the Hug"
    with pytest.raises(ValueError, match=message):
        load_model(folders / "llama", archive=file)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save_model("llama", tmp_path)
    tokenizer = word_tokenizer(ROWS + 2, eos_token="</s>", pad_token="<pad>")
    with pytest.raises(ValueError, match=rf"has 1 tokens more than the {ROWS} embedding rows .*'</s>' first"):
        load_model(tmp_path, tokenizer=tokenizer)
    fitting = word_tokenizer(ROWS + 1, eos_token="</s>", pad_token="<pad>")  # the pad token needs no row
    assert load_model(tmp_path, tokenizer=fitting)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff", b'{"a":' * 200_000, LFS, b"<html>"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(file, content, tmp_path):
    save_model("llama", tmp_path)
    word_tokenizer(ROWS, eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is (damaged|empty|a Git LFS pointer|a web page)"):
        load_tokenizer(tmp_path)
