"""policy.pt: every honest file gives the trained model, every other one an error that names it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, ROWS, TIED, logits, new_model, save_policy
from transformers import AutoModelForCausalLM

from lota.models.loading import load_model, resize_vocabulary
from lota.models.policy import read_policy


@pytest.fixture(params=sorted(CONFIGS))
def base(request, tmp_path: Path):
    """(kind, model, its folder)."""
    model = new_model(request.param)
    model.save_pretrained(tmp_path / "base")
    return request.param, model, tmp_path / "base"


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
    read = read_policy(save_policy(tmp_path / "policy.pt", state)).state
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
    with pytest.raises(ValueError, match=r"1 missing there: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, archive=save_policy(tmp_path / "a.pt", state))
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"(?s)1 missing there.*1 only there: model\.layers\.9"):
        load_model(tmp_path, archive=save_policy(tmp_path / "b.pt", state))
    state = {**model.state_dict(), "model.norm.weight": torch.zeros(31)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(31,\) instead of \(32,\)"):
        load_model(tmp_path, archive=save_policy(tmp_path / "c.pt", state))


def test_untied_policy_of_a_tied_base_is_refused(tmp_path):
    model = new_model("qwen2")
    model.save_pretrained(tmp_path)
    state = {**model.state_dict(), "lm_head.weight": torch.zeros(ROWS, 32)}
    with pytest.raises(ValueError, match="differ, but the base ties them"):
        load_model(tmp_path, archive=save_policy(tmp_path / "policy.pt", state))


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
    assert torch.equal(read_policy(tmp_path).state["w"], torch.arange(3.0))


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
