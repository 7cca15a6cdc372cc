"""Loading: what comes back is the file's numbers, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lota.models import (
    add_pad_token,
    choose_pad_token_id,
    dtype_of,
    enable_activation_checkpointing,
    find_block_class,
    load_model,
    load_tokenizer,
    read_policy,
    resize_vocabulary,
    transformer_blocks,
)

ROWS = 64
SIZES = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**WIDE, num_key_value_heads=2, attention_dropout=0.3),
    "gpt2": lambda: GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
    "mixtral": lambda: MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=4),
    "gpt_neox": lambda: GPTNeoXConfig(**WIDE, attention_dropout=0.3, hidden_dropout=0.3, **IDS),
    "qwen2": lambda: Qwen2Config(**WIDE, num_key_value_heads=2, tie_word_embeddings=True, **IDS),
    "gptj": lambda: GPTJConfig(
        vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, resid_pdrop=0.3, **IDS
    ),
}
TIED = ("gpt2", "qwen2")
INPUT = torch.arange(20).view(2, 10)


def new_model(kind: str, seed: int = 0):
    """A model whose every tensor is random, biases and norms too, so that none can be taken for another."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def save_policy(path: Path, state: dict, step_idx: int = 7) -> Path:
    torch.save({"step_idx": step_idx, "state": state, "metrics": {"loss": 1.5}}, path)
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits


@pytest.fixture(params=sorted(CONFIGS))
def base(request, tmp_path: Path):
    """(kind, model, its folder)."""
    model = new_model(request.param)
    model.save_pretrained(tmp_path / "base")
    return request.param, model, tmp_path / "base"


def test_folder_gives_the_saved_numbers(base):
    _, model, folder = base
    loaded = load_model(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_gives_what_transformers_gives(base, dtype, tmp_path):
    _, _, folder = base
    tuned = new_model(base[0], seed=1)
    tuned.save_pretrained(tmp_path / "tuned")
    archive = save_policy(tmp_path / "policy.pt", tuned.state_dict())
    ours = load_model(folder, archive=archive, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=dtype)
    assert torch.equal(logits(ours), logits(theirs))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert {p.dtype for p in ours.parameters()} == {dtype} == {ours.config.dtype}
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name  # rotary frequencies stay float32


def test_policy_weights_do_not_live_in_the_file(tmp_path):
    model = new_model("llama")
    model.save_pretrained(tmp_path / "base")
    archive = save_policy(tmp_path / "policy.pt", model.state_dict())
    loaded = load_model(tmp_path / "base", archive=archive)
    archive.write_bytes(bytes(archive.stat().st_size))  # overwritten in place
    assert torch.equal(logits(loaded), logits(model))


def test_archive_may_be_a_folder(tmp_path):
    base, tuned = new_model("llama"), new_model("llama", seed=1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "epoch-1").mkdir()
    save_policy(tmp_path / "epoch-1" / "policy.pt", tuned.state_dict())
    for archive in ("tuned", "epoch-1", "epoch-1/policy.pt"):
        assert torch.equal(logits(load_model(tmp_path / "base", archive=tmp_path / archive)), logits(tuned))


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "inner"])
def test_wrapped_names_are_unwrapped(wrap, tmp_path):
    model = new_model("gpt2")
    state = {
        name.replace(".h.0.", ".h.0._checkpoint_wrapped_module.")
        if wrap == "inner"
        else wrap.format(name): value
        for name, value in model.state_dict().items()
    }
    assert set(state) != set(model.state_dict())
    read = read_policy(save_policy(tmp_path / "policy.pt", state))
    assert list(read) == list(model.state_dict())
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox"])
def test_policy_with_names_of_an_older_release(kind, tmp_path):
    """Experts apart and `embed_out`, as on disk: transformers' own table translates them."""
    from safetensors.torch import load_file

    model = new_model(kind)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert set(state) != set(model.state_dict())
    archive = save_policy(tmp_path / "policy.pt", state)
    assert torch.equal(logits(load_model(tmp_path, archive=archive)), logits(model))


def test_policy_with_saved_buffers_of_an_older_release(tmp_path):
    model = new_model("gpt2")
    model.save_pretrained(tmp_path)
    state = {**model.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    loaded = load_model(tmp_path, archive=save_policy(tmp_path / "policy.pt", state))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kept", ["lm_head.weight", "transformer.wte.weight"])
def test_policy_with_a_tied_name_once(kept, tmp_path):
    model = new_model("gpt2")
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    state.pop("lm_head.weight" if kept != "lm_head.weight" else "transformer.wte.weight")
    loaded = load_model(tmp_path, archive=save_policy(tmp_path / "policy.pt", state))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_policy_that_does_not_fit_is_refused_both_ways(tmp_path):
    model = new_model("llama")
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, archive=save_policy(tmp_path / "a.pt", state))
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"1 missing.*1 not in the model: model\.layers\.9"):
        load_model(tmp_path, archive=save_policy(tmp_path / "b.pt", state))
    state = {**model.state_dict(), "model.norm.weight": torch.zeros(31)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(file \(31,\), model \(32,\)\)"):
        load_model(tmp_path, archive=save_policy(tmp_path / "c.pt", state))


def test_untied_policy_of_a_tied_base_is_refused(tmp_path):
    model = new_model("qwen2")
    model.save_pretrained(tmp_path)
    state = {**model.state_dict(), "lm_head.weight": torch.zeros(ROWS, 32)}
    with pytest.raises(ValueError, match="differ, but the base ties them"):
        load_model(tmp_path, archive=save_policy(tmp_path / "policy.pt", state))


def test_folder_without_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    new_model("llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.self_attn.q_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_model(tmp_path)


def test_folder_that_is_absent_names_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"model\.name_or_path=.*nothing"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no policy file at .*absent\.pt"):
        new_model("llama").save_pretrained(tmp_path)
        load_model(tmp_path, archive=tmp_path / "absent.pt")


class _RunsCode:
    def __init__(self, touched: str):
        self.touched = touched

    def __reduce__(self):
        return (open, (self.touched, "w"))


def test_pickle_that_would_run_code_is_not_run(tmp_path):
    touched = tmp_path / "touched"
    state = {"a": torch.zeros(2), "b": _RunsCode(str(touched))}
    path = save_policy(tmp_path / "policy.pt", state)
    with pytest.raises(ValueError, match=r"policy\.pt was not read.*could run code"):
        read_policy(path)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(_RunsCode(str(touched))))
    with pytest.raises(ValueError, match=r"bare\.pt"):
        read_policy(tmp_path / "bare.pt")
    assert not touched.exists()


def test_truncated_policy_is_refused_at_every_length(tmp_path):
    path = save_policy(tmp_path / "policy.pt", new_model("llama").state_dict())
    content = path.read_bytes()
    for length in (0, 1, 10, 100, len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"policy\.pt \(.* bytes\) cannot be read: it is truncated"):
            read_policy(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.zeros(2)}, "lacks step_idx, state, metrics"),
        ({"step_idx": 1, "state": {"w": torch.zeros(2)}}, "lacks metrics"),
        ({"step_idx": 1, "state": {}, "metrics": {}}, "'state' is not"),
        ({"step_idx": 1, "state": {"w": 3}, "metrics": {}}, "'state' is not"),
        ([1, 2], "holds a list"),
        (
            {"step_idx": 1, "state": {"w": torch.ones(1), "module.w": torch.ones(1)}, "metrics": {}},
            "both called w",
        ),
    ],
)
def test_other_layouts_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=message):
        read_policy(tmp_path / "policy.pt")


def test_policy_of_the_old_torch_format_is_read(tmp_path):
    content = {"step_idx": 1, "state": {"w": torch.arange(3.0)}, "metrics": {}}
    torch.save(content, tmp_path / "policy.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_policy(tmp_path)["w"], torch.arange(3.0))


def test_grown_vocabulary(base):
    kind, model, folder = base
    before = logits(model)
    with torch.random.fork_rng():
        first, second = load_model(folder), load_model(folder)
        torch.manual_seed(1)
        resize_vocabulary(first, ROWS + 3)
        torch.manual_seed(2)
        resize_vocabulary(second, ROWS + 3)
    for layer in (first.get_input_embeddings(), first.get_output_embeddings()):
        assert layer.weight.shape == (ROWS + 3, 32)
        expected = layer.weight[:ROWS].double().mean(dim=0).float()
        assert torch.equal(layer.weight[ROWS:], expected.expand(3, -1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.config.vocab_size == ROWS + 3
    assert (first.get_input_embeddings().weight is first.get_output_embeddings().weight) == (kind in TIED)
    assert torch.allclose(logits(first)[..., :ROWS], before, atol=1e-6)
    assert torch.isfinite(logits(first)).all()


@pytest.mark.parametrize("rows", [ROWS - 4, ROWS + 3])
def test_policy_with_another_vocabulary(base, rows, tmp_path):
    kind, _, folder = base
    resized = load_model(folder)
    resize_vocabulary(resized, rows)
    archive = save_policy(tmp_path / "policy.pt", resized.state_dict())
    loaded = load_model(folder, archive=archive)
    assert torch.equal(logits(loaded), logits(resized))
    assert loaded.config.vocab_size == rows
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == (kind in TIED)


def test_resize_leaves_the_random_stream_alone(tmp_path):
    model = new_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    resize_vocabulary(model, ROWS + 1)
    assert torch.equal(torch.rand(3), expected)


def word_tokenizer(size: int, **special: str) -> PreTrainedTokenizerFast:
    """Words w0, w1, ..., then the special tokens, `size` entries in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*(f"w{i}" for i in range(size - len(special))), *special.values()]
    raw = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special.get("unk_token"))
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def test_pad_token_grows_model_and_tokenizer_once(tmp_path):
    model = new_model("llama")
    model.save_pretrained(tmp_path)
    word_tokenizer(ROWS, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    loaded = load_model(tmp_path, pad_token="<PAD>", tokenizer=tokenizer)
    assert tokenizer.pad_token_id == ROWS == loaded.config.pad_token_id
    assert loaded.get_input_embeddings().weight.shape[0] == ROWS + 1
    again = load_model(
        tmp_path, archive=save_policy(tmp_path / "policy.pt", loaded.state_dict()), pad_token="<PAD>"
    )
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


def test_choose_pad_token_id_never_leaves_the_embedding():
    config = LlamaConfig(**WIDE, pad_token_id=None)
    assert choose_pad_token_id(word_tokenizer(ROWS, eos_token="e", pad_token="p"), config) == ROWS - 1
    assert choose_pad_token_id(word_tokenizer(ROWS, eos_token="e"), config) == ROWS - 1
    assert choose_pad_token_id(word_tokenizer(ROWS + 1, eos_token="e", pad_token="p"), config) == ROWS - 1
    config.eos_token_id = None
    assert choose_pad_token_id(word_tokenizer(ROWS, unk_token="u"), config) == ROWS - 1
    assert choose_pad_token_id(word_tokenizer(ROWS), config) == 0
    config.eos_token_id = [5, 6]
    assert choose_pad_token_id(word_tokenizer(ROWS), config) == 5


def test_real_tokenizer(stories):
    tokenizer = load_tokenizer(stories)
    assert tokenizer.pad_token_id is None
    assert choose_pad_token_id(tokenizer, load_model(stories).config) == tokenizer.eos_token_id == 2
    assert len(tokenizer) == 512


@pytest.mark.parametrize("model_type", ["gpt2", "llama", None])
def test_folder_without_tokenizer_is_refused(model_type, tmp_path):
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer_name_or_path"):
        load_tokenizer(tmp_path)


def test_dropout_is_off_in_train_mode(base):
    _, model, folder = base
    model.train()
    loaded = load_model(folder).train()
    torch.manual_seed(0)
    first = logits(loaded)
    assert torch.equal(first, logits(load_model(folder).eval()))
    if base[0] in ("llama", "gpt_neox", "gpt2", "gptj"):  # the test's configs have dropout there
        assert not torch.equal(logits(model), logits(model))


def test_activation_checkpointing_gives_the_same_gradients(base, monkeypatch):
    import torch.utils.checkpoint as checkpoint_module

    _, _, folder = base
    plain, checkpointed = load_model(folder).train(), load_model(folder).train()
    enable_activation_checkpointing(checkpointed)
    assert checkpointed.config.use_cache is False
    recomputed = []
    block = transformer_blocks(checkpointed)[0][1]
    first_linear = next(m for m in block.modules() if not list(m.children()) and list(m.parameters()))
    first_linear.register_forward_hook(lambda *_: recomputed.append(1))
    monkeypatch.setattr(checkpoint_module.CheckpointFunction, "apply", None)  # the reentrant kind fails
    for model in (plain, checkpointed):
        model(INPUT, labels=INPUT).loss.backward()
    assert len(recomputed) == 2  # once forward, once more in backward
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_block_class_is_found_and_chosen(base):
    kind, model, _ = base
    names = {
        "llama": "LlamaDecoderLayer", "gpt2": "GPT2Block", "mixtral": "MixtralDecoderLayer",
        "gpt_neox": "GPTNeoXLayer", "qwen2": "Qwen2DecoderLayer", "gptj": "GPTJBlock",
    }  # fmt: skip
    assert find_block_class(model).__name__ == names[kind]
    assert find_block_class(model, names[kind]) is find_block_class(model)
    assert len(transformer_blocks(model)) == 2
    with pytest.raises(ValueError, match=rf"model\.block_name=NoSuchLayer.*{names[kind]}"):
        find_block_class(model, "NoSuchLayer")


def test_dtype_names():
    assert dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="'fp8': choose one of float32, bfloat16, float16"):
        dtype_of("fp8")
