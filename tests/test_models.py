"""Loading: what comes back is the file's numbers, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, INPUT, ROWS, TIED, WIDE, logits, new_model, save_policy, word_tokenizer
from transformers import LlamaConfig

from lota.models.loading import (
    add_pad_token,
    choose_pad_token_id,
    dtype_of,
    enable_activation_checkpointing,
    load_model,
    load_tokenizer,
    resize_vocabulary,
)
from lota.models.scope import transformer_blocks


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


def test_archive_may_be_a_folder(tmp_path):
    base, tuned = new_model("llama"), new_model("llama", seed=1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "epoch-1").mkdir()
    save_policy(tmp_path / "epoch-1" / "policy.pt", tuned.state_dict())
    for archive in ("tuned", "epoch-1", "epoch-1/policy.pt"):
        assert torch.equal(logits(load_model(tmp_path / "base", archive=tmp_path / archive)), logits(tuned))


def test_folder_without_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    new_model("llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.self_attn.q_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing there: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_model(tmp_path)


def test_folder_that_is_absent_names_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"name_or_path=.*nothing"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no policy file at .*absent\.pt"):
        new_model("llama").save_pretrained(tmp_path)
        load_model(tmp_path, archive=tmp_path / "absent.pt")


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


def test_resize_leaves_the_random_stream_alone(tmp_path):
    model = new_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    resize_vocabulary(model, ROWS + 1)
    assert torch.equal(torch.rand(3), expected)


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


def test_dtype_names():
    assert dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="'fp8': choose one of float32, bfloat16, float16"):
        dtype_of("fp8")


def test_a_checkpoint_that_is_not_converted_yet(tmp_path):
    (tmp_path / "policy.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="convert it first"):
        load_tokenizer(tmp_path)
