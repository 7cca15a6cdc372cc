"""Reading weights from disk under the loaded model's names, against transformers' own loading."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Concatenate, Interleave, Transpose, WeightConverter

from lota.models import hashing
from lota.models.hashing import content_hash, remembered_hash
from lota.models.key_mapping import Conversion
from lota.models.scope import meta_model
from lota.models.weights import open_weights
from tests.hf_models import CONFIGS, new_model, save_model


def assert_same_weights(source, model: torch.nn.Module) -> None:
    loaded = dict(model.named_parameters())
    assert source.names() == list(loaded)
    for name, parameter in loaded.items():
        assert source.shape(name) == tuple(parameter.shape)
        assert torch.equal(source.read(name), parameter.detach()), name
        flat = parameter.detach().reshape(-1)
        start, stop = flat.numel() // 3, flat.numel() - flat.numel() // 5
        assert torch.equal(source.read_flat(name, start, stop), flat[start:stop]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_folder_and_policy_give_the_loaded_models_parameters(kind, tmp_path):
    model = save_model(kind, tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    torch.save({"step_idx": 3, "state": model.state_dict(), "metrics": {}}, tmp_path / "policy.pt")
    structure = meta_model(tmp_path / "hf")
    folder = open_weights(tmp_path / "hf")
    policy = open_weights(tmp_path / "policy.pt", structure)
    assert_same_weights(folder, model)
    assert_same_weights(policy, model)
    assert content_hash(folder) == content_hash(policy)


@pytest.mark.parametrize("kind", ["folder", "policy.pt"])
def test_files_that_are_replaced_after_their_headers_were_read_are_refused(kind, tmp_path):
    model = save_model("llama", tmp_path / "hf", max_shard_size="20KB")
    torch.save({"step_idx": 3, "state": model.state_dict(), "metrics": {}}, tmp_path / "policy.pt")
    source = open_weights(tmp_path / ("hf" if kind == "folder" else kind))
    first, *_, last = source.names()
    source.read(first)
    replaced = source.file_of(last)
    replaced.with_name("new").write_bytes(replaced.read_bytes())
    replaced.with_name("new").rename(replaced)
    if kind == "policy.pt":  # open already: all of it is the old file's
        assert torch.equal(source.read(last), model.state_dict()[last])
        source = open_weights(replaced)
        os.utime(replaced, ns=(0, 0))
    with pytest.raises(ValueError, match=f"{replaced.name} was replaced while it was read"):
        source.read(last)


@pytest.mark.parametrize("whole", [False, True])
def test_separate_experts_are_read_in_rows_or_converted_whole(whole, tmp_path, monkeypatch):
    """Eleven experts: expert 10 must not come before expert 2."""
    model = new_model("mixtral", num_local_experts=11)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert name not in load_file(tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    if whole:
        monkeypatch.setattr(Conversion, "row_spans", {})
    else:
        assert len(source._origins[name].row_spans[name]) == 22  # w1 and w3 of every expert, one span each
    assert_same_weights(source, model)
    expected = dict(model.named_parameters())[name].detach().reshape(-1)
    starts = range(0, expected.numel(), 1000)
    pieces = [source.read_flat(name, i, min(i + 1000, expected.numel())) for i in starts]
    assert torch.equal(torch.cat(pieces), expected)


def test_gpt2_folder_without_prefix(tmp_path):
    """The published GPT-2 folders hold the base model: no `transformer.`, and buffers nobody reads."""
    model = save_model("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    state = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(state, file, metadata={"format": "pt"})
    source = open_weights(tmp_path)
    assert_same_weights(source, model)
    assert set(source.unused) == {"h.0.attn.bias"}


@pytest.mark.parametrize("stored_name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weight_under_either_name(stored_name, tmp_path):
    model = save_model("qwen2", tmp_path)
    state = dict(model.state_dict())
    kept = state.pop("lm_head.weight")
    state.pop("model.embed_tokens.weight")
    torch.save({"step_idx": 0, "state": {**state, stored_name: kept}, "metrics": {}}, tmp_path / "policy.pt")
    source = open_weights(tmp_path / "policy.pt", meta_model(tmp_path))
    assert sorted(source.names()) == sorted(name for name, _ in model.named_parameters())
    assert torch.equal(source.read("model.embed_tokens.weight"), kept)


def test_policy_with_wrapped_names_views_and_dtypes(tmp_path):
    model = save_model("llama", tmp_path)
    wrapped = {
        "module._orig_mod." + name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): value
        for name, value in model.state_dict().items()
    }
    key = next(name for name in wrapped if "layers.1.mlp.up_proj" in name)
    wrapped[key] = wrapped[key].t().contiguous().t()  # not contiguous in the file
    norm = next(name for name in wrapped if name.endswith("model.norm.weight"))
    wrapped[norm] = torch.arange(64.0)[16:48]  # a view that starts inside its storage
    bf16 = next(name for name in wrapped if "layers.0" in name and "q_proj" in name)
    wrapped[bf16] = wrapped[bf16].bfloat16()
    torch.save({"step_idx": 0, "state": wrapped, "metrics": {}}, tmp_path / "policy.pt")
    source = open_weights(tmp_path / "policy.pt", meta_model(tmp_path))
    state = model.state_dict()
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(up), state[up])
    assert torch.equal(source.read_flat(up, 100, 300), state[up].reshape(-1)[100:300])
    assert torch.equal(source.read("model.norm.weight"), torch.arange(64.0)[16:48])
    assert source.dtype("model.layers.0.self_attn.q_proj.weight") == torch.bfloat16
    expected = state["model.layers.0.self_attn.q_proj.weight"].bfloat16()
    assert torch.equal(source.read("model.layers.0.self_attn.q_proj.weight"), expected)


def test_folder_of_torch_shards(tmp_path):
    model = save_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_weights(open_weights(tmp_path), model)


def test_run_folder_and_policy_without_a_model(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    (tmp_path / "epoch-1").mkdir()
    state = {"a.weight": tensor, "b.weight": tensor, "c": torch.ones(2)}
    torch.save({"step_idx": 0, "state": state, "metrics": {}}, tmp_path / "epoch-1" / "policy.pt")
    source = open_weights(tmp_path / "epoch-1")
    assert source.names() == ["a.weight", "c"]  # the same bytes are listed once
    assert torch.equal(source.read("a.weight"), tensor)


def test_content_hash_is_over_name_dtype_shape_bytes(tmp_path):
    state = {"b": torch.arange(4, dtype=torch.int32), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "x.pt")
    expected = hashlib.sha256(
        b"a\0bfloat16\x002x3\0"
        + np.full(6, 0x3F80, "<u2").tobytes()
        + b"b\0int32\x004\0"
        + np.arange(4, dtype="<i4").tobytes()
    )
    assert content_hash(open_weights(tmp_path / "x.pt")) == expected.hexdigest()


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist"):
        open_weights(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no weights"):
        open_weights(tmp_path)
    torch.save({"step_idx": 0, "state": {}, "metrics": {}}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="no checkpoint"):
        open_weights(tmp_path / "empty.pt")
    save_model("llama", tmp_path / "hf", max_shard_size="20KB")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        open_weights(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json"):
        open_weights(tmp_path / "hf")


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    model = save_model("llama", tmp_path)
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append(repo_id)
        if repo_id != "somebody/llama":
            raise LocalEntryNotFoundError("offline")
        return str(tmp_path)

    monkeypatch.setattr("lota.models.hub.hub_is_used", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_weights(open_weights("somebody/llama"), model)
    with pytest.raises(ValueError, match="nobody/llama is neither a folder here nor"):
        open_weights("nobody/llama")
    assert asked == ["somebody/llama", "nobody/llama"]


@pytest.mark.parametrize(
    ("operation", "whole_rows"),
    [
        (Concatenate(dim=0), True),
        (Interleave(dim=0), True),
        (Transpose(0, 1), False),
        (Interleave(dim=1), False),
        (Concatenate(dim=1), False),
    ],
)
def test_row_spans_refuse_what_reorders_columns(operation, whole_rows):
    """A transposed or column-shuffled weight is not made of whole rows."""
    names = ["a.x", "a.y"] if isinstance(operation, Concatenate) else ["a.x"]
    data = {name: torch.randn(4, 12) for name in names}
    model = SimpleNamespace(config=None)
    converter = WeightConverter(names, "a.z", [operation])
    conversion = Conversion(converter, "a.z", model, data, [(name, name) for name in names])
    spans = conversion.row_spans.get("a.z", [])
    assert bool(spans) == whole_rows
    if spans:
        built = torch.cat([data[s.source].reshape(-1)[s.source_start :][: s.length] for s in spans])
        assert torch.equal(built, conversion.apply(data.get)["a.z"].reshape(-1))


# Remembered hashes


@pytest.fixture
def count_hashes(monkeypatch):
    """A list that grows by one whenever weights are really hashed; the clock says an hour later."""
    made, now = [], time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(hashing, "content_hash", lambda source: made.append(source) or content_hash(source))
    monkeypatch.setattr(hashing.time, "time_ns", lambda: now)
    return made


def saved(path, value: float = 1.0):
    path.parent.mkdir(exist_ok=True)
    save_file({"a": torch.full((4,), value), "b": torch.zeros(3)}, path)
    return path.parent


def test_weights_are_hashed_once_until_their_files_change(tmp_path, monkeypatch, count_hashes):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "m" / "model.safetensors")
    first = remembered_hash(folder)
    assert first == content_hash(open_weights(folder))
    assert remembered_hash(folder) == first
    assert remembered_hash(saved(tmp_path / "n" / "model.safetensors", 2.0)) != first
    assert remembered_hash(folder) == first and len(count_hashes) == 2
    os.utime(folder / "model.safetensors", ns=(0, 5))
    assert remembered_hash(folder) == first and len(count_hashes) == 3  # touched: nobody knows, so again
    saved(tmp_path / "o" / "model.safetensors", 3.0)
    os.utime(tmp_path / "o" / "model.safetensors", ns=(0, 5))
    os.replace(tmp_path / "o" / "model.safetensors", folder / "model.safetensors")  # same size and time
    assert remembered_hash(folder) == content_hash(open_weights(folder)) != first


def test_another_mapping_of_names_is_another_hash(tmp_path, monkeypatch, count_hashes):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    model = save_model("gpt_neox", tmp_path / "m")
    assert remembered_hash(tmp_path / "m") == remembered_hash(tmp_path / "m", model)
    (tmp_path / "m" / "config.json").unlink()  # now under the stored names
    bare = remembered_hash(tmp_path / "m")
    assert bare == content_hash(open_weights(tmp_path / "m"))
    assert bare != remembered_hash(tmp_path / "m", model) and len(count_hashes) == 2


def test_a_file_written_just_now_or_during_the_hash_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "m" / "model.safetensors")
    remembered_hash(folder)
    assert not (tmp_path / "cache" / "hashes.json").exists()

    def overwritten(source):
        made = content_hash(source)
        os.utime(folder / "model.safetensors", ns=(0, 10**15))
        return made

    os.utime(folder / "model.safetensors", ns=(0, 10**9))
    monkeypatch.setattr(hashing, "content_hash", overwritten)
    remembered_hash(folder)
    assert not (tmp_path / "cache" / "hashes.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 200_000, b'{"KEY": [1]}'])
def test_a_damaged_memory_of_hashes_is_ignored(content, tmp_path, monkeypatch, count_hashes):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    folder = saved(tmp_path / "m" / "model.safetensors")
    expected = remembered_hash(folder)
    memory = tmp_path / "hashes.json"
    key = next(iter(json.loads(memory.read_text())))
    memory.write_bytes(content.replace(b"KEY", key.encode()))
    assert remembered_hash(folder) == expected and len(count_hashes) == 2
    assert json.loads(memory.read_text()) == {key: expected}


def test_a_memory_of_hashes_that_cannot_be_written_is_told(tmp_path, monkeypatch, count_hashes, caplog):
    (tmp_path / "cache").write_text("a file in the folder's place")
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "m" / "model.safetensors")
    with caplog.at_level(logging.INFO):
        assert remembered_hash(folder) == content_hash(open_weights(folder))
    assert "hashes.json is not written" in caplog.text


def test_the_memory_of_hashes_stays_small(tmp_path, monkeypatch, count_hashes):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    monkeypatch.setattr(hashing, "REMEMBERED_AT_MOST", 2)
    made = [remembered_hash(saved(tmp_path / str(i) / "model.safetensors", i)) for i in range(3)]
    assert list(json.loads((tmp_path / "hashes.json").read_text()).values()) == made[1:]
