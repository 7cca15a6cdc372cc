"""Delta files: what is read is what two models differ in; nothing damaged is read."""

from __future__ import annotations

import hashlib
import json

import hf_models
import numpy as np
import pytest
import safetensors
import torch
from delta_models import bits, change, save_model
from tiny import random_mask

from lota.delta import Delta, extract
from lota.masks import Mask
from lota.models.hashing import content_hash
from lota.models.weights import open_weights
from lota.share.delta.format import SEGMENT, Parameter, segments
from lota.utils import atomic_path


@pytest.fixture
def pair(tmp_path):
    """(base, tuned) folders of bf16 Llamas."""
    model = save_model(tmp_path / "base")
    change(model).save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_changes_are_the_differences_of_the_files(tmp_path, dtype):
    model = save_model(tmp_path / "base", dtype=dtype)
    change(model).save_pretrained(tmp_path / "tuned")
    meta = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.safetensors", task="sql")
    delta = Delta.open(tmp_path / "d.safetensors")
    base, tuned = open_weights(tmp_path / "base"), open_weights(tmp_path / "tuned")
    n_changed = n_entries = 0
    for name in base.names():
        before, after = base.read(name), tuned.read(name)
        assert torch.equal(bits(delta.tuned(name, before)), bits(after))
        differing = (before != after).flatten().nonzero().flatten()  # no entry goes from 0 to -0 here
        assert torch.equal(delta.positions(name), differing)
        positions, differences = delta.differences(name, before)
        assert torch.equal(positions, differing) and differences.dtype == torch.float32
        assert torch.equal(differences, (after.float() - before.float()).flatten()[differing])
        assert (name in delta.names) == (len(differing) > 0) == (delta.changed(name) > 0)
        n_changed, n_entries = n_changed + len(differing), n_entries + before.numel()
    assert delta.meta == meta and meta["changed"] == n_changed and meta["entries"] == n_entries
    assert meta["base_hash"] == content_hash(base) and meta["tuned_hash"] == content_hash(tuned)
    assert meta["task"] == "sql" and meta["dtype"] == str(dtype).removeprefix("torch.")
    assert meta["sparsity"] == pytest.approx(1 - n_changed / n_entries)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_neox", "qwen2"])
def test_names_on_disk_may_differ_from_those_in_memory(tmp_path, kind):
    model = save_model(tmp_path / "base", kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    change(model).save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.safetensors")
    delta = Delta.open(tmp_path / "d.safetensors")
    assert set(delta.parameters) == set(before)
    for name, p in model.named_parameters():
        assert torch.equal(bits(delta.tuned(name, before[name])), bits(p.detach()))


def test_a_policy_file_is_taken_as_the_converter_would_write_it(tmp_path):
    model = save_model(tmp_path / "base").float()
    before = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    policy = hf_models.save_policy(tmp_path / "policy.pt", change(model).state_dict())
    extract(tmp_path / "base", policy, tmp_path / "d.safetensors")
    delta = Delta.open(tmp_path / "d.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(bits(delta.tuned(name, before[name])), bits(p.detach().bfloat16()))


def test_large_tensors_are_cut_and_small_ones_pooled():
    sizes = [("a", torch.bfloat16, SEGMENT + 5), ("b", torch.bfloat16, 3), ("c", torch.bfloat16, SEGMENT - 8),
             ("d", torch.bfloat16, 1), ("e", torch.float32, 0), ("f", torch.float32, 2)]  # fmt: skip
    found = segments([Parameter(name, dtype, (n,)) for name, dtype, n in sizes])
    assert [[tuple(piece) for piece in segment.pieces] for segment in found] == [
        [("a", 0, SEGMENT, 0)],
        [("a", SEGMENT, SEGMENT + 5, 0), ("b", 0, 3, 5), ("c", 0, SEGMENT - 8, 8)],
        [("d", 0, 1, 0)],
        [("f", 0, 2, 0)],
    ]
    assert [segment.n for segment in found] == [SEGMENT, SEGMENT, 1, 2]


def test_parts_of_a_tensor_over_several_segments(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(3, SEGMENT // 2 + 11, generator=generator).half(), "b": torch.zeros(5).half()}
    tuned = {"w": base["w"].clone(), "b": base["b"] + 1}
    tuned["w"].view(-1)[torch.randperm(base["w"].numel(), generator=generator)[:40_000]] += 1
    for name, state in (("base.pt", base), ("tuned.pt", tuned)):
        hf_models.save_policy(tmp_path / name, state)
    extract(tmp_path / "base.pt", tmp_path / "tuned.pt", tmp_path / "d.safetensors")
    delta = Delta.open(tmp_path / "d.safetensors")
    assert torch.equal(delta.tuned("w", base["w"]), tuned["w"])
    expected = (base["w"] != tuned["w"]).flatten().nonzero().flatten().numpy()
    for start, stop in ((0, 10), (SEGMENT - 7, SEGMENT + 900), (5, base["w"].numel()), (100, 100)):
        positions, xors = delta.changes("w", start, stop)
        assert np.array_equal(positions.numpy() + start, expected[(expected >= start) & (expected < stop)])
        assert len(xors) == len(positions)


def test_a_mask_bounds_what_may_have_changed(tmp_path):
    model = save_model(tmp_path / "base")
    mask = random_mask(model)
    change(model, mask=mask).save_pretrained(tmp_path / "tuned")
    meta = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.safetensors", mask=mask)
    assert meta["kept"] == mask.n_kept and meta["sparsity"] == pytest.approx(1 - mask.density)
    assert 0 < meta["changed"] <= mask.n_kept
    name = mask.names[2]  # everything kept
    smaller = Mask.from_dense({n: mask.dense(n) & (n != name) for n in mask.names})
    with pytest.raises(ValueError, match=rf"entries changed outside the mask, .* in {name}"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "e.safetensors", mask=smaller)
    mask.save(tmp_path / "mask.pt")
    with pytest.raises(ValueError, match="does not belong"):
        extract(
            tmp_path / "base",
            tmp_path / "tuned",
            tmp_path / "e.safetensors",
            mask=Mask.from_dense({"x": smaller.dense(name)}),
        )
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "e.safetensors", mask=tmp_path / "mask.pt")
    assert (tmp_path / "e.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()


def test_equal_models_and_wholly_different_ones(tmp_path, pair):
    base = pair[0]
    assert extract(base, base, tmp_path / "none.safetensors")["changed"] == 0
    nothing = Delta.open(tmp_path / "none.safetensors")
    source = open_weights(base)
    name = source.names()[0]
    assert nothing.names == [] and len(nothing.positions(name)) == 0
    assert torch.equal(nothing.tuned(name, source.read(name)), source.read(name))
    other = hf_models.new_model("llama", seed=5).bfloat16()
    other.save_pretrained(tmp_path / "other")
    extract(base, tmp_path / "other", tmp_path / "all.safetensors")
    everything = Delta.open(tmp_path / "all.safetensors")
    for name, p in other.named_parameters():
        assert torch.equal(everything.tuned(name, source.read(name)), p.detach())


def test_every_byte_counts(tmp_path, pair):
    path = tmp_path / "d.safetensors"
    extract(*pair, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = np.random.default_rng(0)
    places = [*range(0, header), *generator.integers(header, len(whole), 200), len(whole) - 1]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"d\.safetensors"):
            Delta.open(path)
    for length in (0, 4, 8, 100, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"d\.safetensors"):
            Delta.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="truncated or changed"):
        Delta.open(path)
    path.write_bytes(whole)
    assert Delta.open(path).n_changed > 0


def test_the_container_is_safetensors_with_a_checksum(tmp_path, pair):
    path = tmp_path / "d.safetensors"
    meta = extract(*pair, path)
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["data", "index"]
        stored = file.metadata()
    assert {key: str(value) for key, value in meta.items()} == {
        k: v for k, v in stored.items() if k != "checksum"
    }
    blank = path.read_bytes().replace(stored["checksum"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == stored["checksum"]


def test_other_files_are_no_deltas(tmp_path, pair):
    with pytest.raises(ValueError, match="does not exist"):
        Delta.open(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="no delta file"):
        Delta.open(pair[0] / "model.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        Delta.open(tmp_path)
    extract(*pair, tmp_path / "d.safetensors")
    newer = (tmp_path / "d.safetensors").read_bytes().replace(b'"version":"1"', b'"version":"2"')
    (tmp_path / "d.safetensors").write_bytes(newer)
    with pytest.raises(ValueError, match="update lota"):
        Delta.open(tmp_path / "d.safetensors")


def test_what_lies_at_the_place_to_write_to_is_not_lost(tmp_path, pair):
    base, tuned = pair
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is a folder: name a file"):
        extract(base, tuned, base)
    with pytest.raises(ValueError, match="no delta file: name a new file"):
        extract(base, tuned, base / "model.safetensors")
    assert (base / "config.json").is_file() and (base / "model.safetensors").read_bytes() == before
    extract(base, tuned, tmp_path / "d.safetensors")
    extract(base, base, tmp_path / "d.safetensors")  # a delta file is replaced
    assert Delta.open(tmp_path / "d.safetensors").n_changed == 0


def test_no_file_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    with pytest.raises(IsADirectoryError), atomic_path(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "notes"]


def test_models_that_do_not_belong_together(tmp_path, pair):
    base, tuned = pair
    deeper = hf_models.LlamaConfig(**{**hf_models.WIDE, "num_hidden_layers": 3}, num_key_value_heads=2)
    hf_models.AutoModelForCausalLM.from_config(deeper).save_pretrained(tmp_path / "deeper")
    grown = hf_models.AutoModelForCausalLM.from_pretrained(tuned)
    grown.resize_token_embeddings(hf_models.ROWS + 1, mean_resizing=False)
    grown.save_pretrained(tmp_path / "grown")
    with pytest.raises(ValueError, match="does not belong to"):
        extract(base, tmp_path / "deeper", tmp_path / "d.safetensors")
    wider = hf_models.LlamaConfig(**{**hf_models.WIDE, "hidden_size": 64, "intermediate_size": 96})
    hf_models.AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="of another shape") as error:
        extract(base, tmp_path / "wider", tmp_path / "d.safetensors")
    assert "vocabulary has grown" not in str(error.value)
    with pytest.raises(ValueError, match=r"vocabulary has grown.*--vocab base"):
        extract(base, tmp_path / "grown", tmp_path / "d.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))


def test_the_base_must_come_in_its_own_dtype_and_shape(tmp_path, pair):
    extract(*pair, tmp_path / "d.safetensors")
    delta = Delta.open(tmp_path / "d.safetensors")
    name = delta.names[0]
    base = open_weights(pair[0]).read(name)
    for wrong in (base.float(), base[:-1]):
        with pytest.raises(ValueError, match="dtype of its files"):
            delta.tuned(name, wrong)
    with pytest.raises(ValueError, match="no parameter"):
        delta.differences("strange", base)


def test_a_narrower_policy_is_explained(tmp_path):
    model = save_model(tmp_path / "base", dtype=torch.float32)
    mask = random_mask(model)
    policy = hf_models.save_policy(tmp_path / "policy.pt", change(model, mask=mask).bfloat16().state_dict())
    with pytest.raises(ValueError, match="narrower dtype"):
        extract(tmp_path / "base", policy, tmp_path / "d.safetensors", mask=mask)


def test_the_index_is_json(tmp_path, pair):
    import zstandard

    extract(*pair, tmp_path / "d.safetensors")
    with safetensors.safe_open(tmp_path / "d.safetensors", "np") as file:
        index = json.loads(zstandard.ZstdDecompressor().decompress(file.get_tensor("index").tobytes()))
    source = open_weights(pair[0])
    assert [row[:3] for row in index["parameters"]] == [
        [n, "bfloat16", list(source.shape(n))] for n in sorted(source.names())
    ]
