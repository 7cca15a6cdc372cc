"""Mask: counts, set algebra, both file layouts, and refusal of what does not fit."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from lota.masks import Mask, kept_count
from lota.masks.trainable import mask_or_dense, refuse_other_base, trainable_mask
from lota.models.hashing import content_hash
from lota.models.scope import find_scope
from lota.models.weights import open_weights


def random_kept(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 7), "b": (5, 2, 3), "c": (8,)}
    return {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95, 0.99, 0.123])
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 226_560])
def test_kept_count(sparsity, n):
    assert kept_count(sparsity, n) == round((1 - sparsity) * n)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_kept_count_refuses(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        kept_count(sparsity, 10)


def test_dense_positions_and_counts_agree():
    kept = random_kept(0)
    mask = Mask.from_dense(kept)
    for name, value in kept.items():
        assert torch.equal(mask.dense(name), value)
        assert mask.positions(name).tolist() == np.flatnonzero(value.numpy()).tolist()
        assert mask.kept(name) == int(value.sum())
    assert mask.n_kept == sum(int(v.sum()) for v in kept.values())
    assert mask.n_total == 21 + 30 + 8
    assert mask.density == mask.n_kept / mask.n_total
    again = Mask.from_positions({n: mask.positions(n).flip(0) for n in kept}, mask.shapes)
    assert all(torch.equal(again.dense(name), value) for name, value in kept.items())
    assert mask.kept("absent") == 0
    assert mask.positions("absent").numel() == 0


def test_set_algebra_against_booleans():
    a, b = random_kept(1), random_kept(2)
    del b["c"]
    first, second = Mask.from_dense(a), Mask.from_dense(b)
    for name in ("a", "b"):
        assert torch.equal(first.minus(second).dense(name), a[name] & ~b[name])
        assert torch.equal(first.union(second).dense(name), a[name] | b[name])
        assert torch.equal(first.intersect(second).dense(name), a[name] & b[name])
    assert torch.equal(first.minus(second).dense("c"), a["c"])
    assert torch.equal(second.union(first).dense("c"), a["c"])
    assert first.overlap(second) == sum(int((a[n] & b[n]).sum()) for n in b)
    assert first.minus(second).overlap(second) == 0


def test_flip_is_the_complement_in_the_scope_and_nowhere_else():
    mask = Mask.from_dense(random_kept(3))
    flipped = mask.flip()
    assert all(torch.equal(flipped.dense(name), ~mask.dense(name)) for name in mask.names)
    assert mask.flip({"a"}).names == ["a"]
    assert torch.equal(flipped.flip().dense("b"), mask.dense("b"))


@pytest.mark.parametrize("n", [*range(1, 18), 63, 64, 65])
def test_flipped_and_absent_bits_at_every_length(n):
    """The unused bits of the last byte stay 0, whatever is done with a mask."""
    kept = {"w": torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5}
    mask = Mask.from_dense(kept)
    assert mask.flip().bits["w"].tolist() == np.packbits(~kept["w"].numpy()).tolist()
    assert mask.flip().n_kept == n - mask.n_kept
    other = Mask.from_dense({"v": torch.ones(3, dtype=torch.bool)})
    assert torch.equal(mask.union(other).dense("w"), kept["w"])
    assert mask.union(other).kept("v") == 3
    assert torch.equal(mask.minus(other).dense("w"), kept["w"])


def test_an_empty_mask():
    mask = Mask({}, {})
    assert (mask.n_kept, mask.n_total, mask.density) == (0, 0, 0.0)


def test_the_fingerprint_is_of_names_shapes_and_bits():
    def of(**kept):
        return Mask.from_dense({name: torch.tensor(value) for name, value in kept.items()})

    first = of(a=[True, False], b=[[False, True]])
    again = Mask.from_dense({n: first.dense(n) for n in ("b", "a")}, {"score": "random"})
    assert again.fingerprint() == first.fingerprint()  # neither the order nor metadata count
    others = [
        of(a=[True, False], b=[[True, True]]),
        of(a=[True, False], b=[[False], [True]]),
        of(a=[True, False], c=[[False, True]]),
        of(a=[True, False]),
    ]
    assert len({mask.fingerprint() for mask in (first, *others)}) == 5


ORIGINS = {"scope": "default", "base": "folder", "base_hash": "1", "score": "gradient"}


def test_metadata_that_stay_true():
    mask = Mask.from_dense(random_kept(3), {**ORIGINS, "threshold": 0.5})
    assert mask.flip().meta == {**ORIGINS, "flipped": True}
    assert mask.flip().flip().meta == {**ORIGINS, "flipped": False}
    assert mask.only(["a", "b", "c"]).meta == mask.meta
    assert mask.only(["c", "absent"]).meta == {**ORIGINS, "scope": None}
    share = {"scope_share": 0.5, "left_out": "x"}
    shared = Mask(mask.bits, mask.shapes, {**ORIGINS, **share})
    assert shared.flip().meta == {**ORIGINS, **share, "flipped": True}
    assert shared.only(["c"]).meta == {**ORIGINS, "scope": None}
    other = Mask.from_dense(random_kept(4), {**ORIGINS, "base": "another", "base_hash": "2"})
    assert mask.union(mask).meta == ORIGINS
    assert mask.union(other).meta == {"scope": "default", "score": "gradient"}
    assert mask.minus(Mask.from_dense(random_kept(4))).meta == {"scope": None}


def test_results_of_the_older_layout_are_of_it_if_they_list_all_it_lists():
    old = Mask.from_dense(random_kept(3), {"layout": "dense"})
    new = Mask.from_dense({name: kept for name, kept in random_kept(4).items() if name != "c"})
    assert all(made.meta["layout"] == "dense" for made in (old.union(new), new.union(old), old.minus(new)))
    assert all("layout" not in made.meta for made in (old.intersect(new), new.minus(old), new.union(new)))


def test_loaded_bits_are_in_memory_unless_asked_otherwise(tmp_path):
    path = tmp_path / "m.pt"
    mask = Mask.from_dense({"w": torch.ones(4096, dtype=torch.bool)})
    mask.save(path)
    read, for_training = Mask.load(path), mask_or_dense(path)
    whole = path.read_bytes()
    with path.open("r+b") as file:  # into the same file, as a copy over it does
        file.write(whole.replace(b"\xff" * 512, bytes(512)))
    assert read.n_kept == for_training.n_kept == 4096
    with pytest.raises(ValueError, match="changed since it was written: its CRC-32 does not fit"):
        Mask.load(path)
    with pytest.raises(ValueError, match="format='text': choose packed or dense"):
        mask.save(tmp_path / "other.pt", format="text")
    assert not (tmp_path / "other.pt").exists()


def test_flipping_the_older_layout_never_unfreezes_norms(tmp_path):
    model = tiny.make("llama")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tiny.random_mask(model).save(tmp_path / "old.pt", format="dense", all_shapes=shapes)
    old = Mask.load(tmp_path / "old.pt")
    assert set(old.names) == set(shapes)  # that layout lists every parameter
    with pytest.raises(ValueError, match="scope"):
        old.flip()
    scope = find_scope(model)
    flipped = old.flip(scope)
    assert set(flipped.names) == set(scope)
    assert flipped.n_kept == flipped.n_total - old.n_kept


def test_packed_file_round_trip(tmp_path):
    mask = Mask.from_dense(random_kept(4), {"score": "task_vector", "threshold": 0.25})
    mask.save(tmp_path / "deep" / "m.pt")
    again = Mask.load(tmp_path / "deep" / "m.pt")
    assert again.names == mask.names
    assert again.shapes == mask.shapes
    assert again.meta["score"] == "task_vector"
    assert again.meta["threshold"] == 0.25
    assert all(torch.equal(again.bits[n], mask.bits[n]) for n in mask.names)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.pt"]


def test_dense_file_is_name_to_frozen_and_nothing_else(tmp_path):
    kept = random_kept(5)
    shapes = {"norm": (4,), "a": (3, 7), "b": (5, 2, 3), "c": (8,)}
    Mask.from_dense(kept).save(tmp_path / "m.pt", format="dense", all_shapes=shapes)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    assert list(content) == ["norm", "a", "b", "c"]
    assert torch.equal(content["a"], ~kept["a"])
    assert content["a"].dtype == torch.bool
    assert content["norm"].all()
    again = Mask.load(tmp_path / "m.pt")
    assert all(torch.equal(again.dense(name), value) for name, value in kept.items())
    assert again.kept("norm") == 0


def test_float_tensors_of_the_older_layout(tmp_path):
    torch.save({"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, tmp_path / "m.pt")
    assert Mask.load(tmp_path / "m.pt").positions("w").tolist() == [1, 2]


def test_check_names_differences_both_ways():
    mask = Mask.from_dense(random_kept(6))
    mask.check({"a": (3, 7), "b": (5, 2, 3), "c": (8,), "more": (2,)})
    with pytest.raises(ValueError, match=r"1 names of the mask are not in the model: c") as error:
        mask.check({"a": (3, 7), "b": (5, 2, 3), "other": (9,)})
    assert "1 names of the model are not in the mask: other" in str(error.value)
    assert str(error.value).startswith("the mask does not belong to this model:\n  1 names")
    assert str(error.value).endswith(
        "\n  extract a mask from this model, or name the model that the mask came from"
    )
    with pytest.raises(ValueError, match=r"1 shapes differ: a: mask \(3, 7\), model \(7, 3\)"):
        mask.check({"a": (7, 3), "b": (5, 2, 3), "c": (8,)})


def test_masks_of_different_models_do_not_combine():
    with pytest.raises(ValueError, match="different models"):
        Mask.from_dense({"a": torch.ones(2, 3, dtype=torch.bool)}).minus(
            Mask.from_dense({"a": torch.ones(3, 2, dtype=torch.bool)})
        )


def packed(**changes) -> dict:
    """What a mask file of one 3 x 3 parameter with three kept entries holds, changed."""
    bits = {"w": torch.tensor([0b11100000, 0], dtype=torch.uint8)}
    whole = {"format": "lota-mask", "version": 1, "bits": bits, "shapes": {"w": [3, 3]}, "meta": {}}
    return {key: value for key, value in {**whole, **changes}.items() if value != "left out"}


def saved(content):
    return lambda path: torch.save(content, path)


def cut(share: float, size: int = 100_000):
    """The first part of a mask file."""

    def write(path):
        Mask.from_dense({"w": torch.ones(size, dtype=torch.bool)}).save(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def compressed(path):
    torch.save({"w": torch.zeros(100_000, dtype=torch.bool)}, path)
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as smaller:
        for name in whole.namelist():
            smaller.writestr(name, whole.read(name))


BAD_FILES = {
    "absent": (lambda p: None, "does not exist"),
    "folder": (lambda p: ((p / "x").mkdir(parents=True), (p / "0.9_mask.pt").touch()), "0.9_mask.pt"),
    "text": (lambda p: p.write_bytes(b"not a file of torch"), "not written by torch.save"),
    "a word": (lambda p: p.write_bytes(b"every"), "not written by torch.save"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "pointer": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "weights": (lambda p: save_file({"w": torch.ones(3)}, p), "is a file of weights"),
    "delta": (lambda p: save_file({"w": torch.ones(3)}, p, {"format": "lota-delta"}), "is a delta"),
    "policy": (saved({"step_idx": 1, "state": {"w": torch.ones(3)}, "metrics": {}}), "is a checkpoint"),
    "list": (saved([1, 2]), "no dict of tensors"),
    "no entries": (saved({}), "no dict of tensors"),
    "strings": (saved({"w": "text"}), "'w' are no named tensors"),
    "numbers as names": (saved({3: torch.zeros(4, dtype=torch.bool)}), "3 are no named tensors"),
    "scores": (saved({"w": torch.rand(3)}), "weights or scores"),
    "integers": (saved({"w": torch.ones(3, dtype=torch.int64)}), "whether 1 means kept or frozen"),
    "one entry for all": (
        saved({"w": torch.zeros(1, dtype=torch.bool).expand(10**12)}),
        "entries of a tensor share a place",
    ),
    "one tensor for all": (
        saved(dict.fromkeys("abcdefgh", torch.zeros(10_000, dtype=torch.bool))),
        "more entries than the file holds",
    ),
    "compressed": (compressed, "is compressed"),
    "cut early": (cut(0.001), "truncated"),
    "cut in the middle": (cut(0.5), "truncated"),
    "cut at the end": (cut(0.999), "truncated"),
    "newer version": (saved(packed(version=99)), "version 99"),
    "version as text": (saved(packed(version="1")), "its version is '1'"),
    "no version": (saved(packed(version="left out")), "its version is None"),
    "no bits": (saved(packed(bits="left out")), "'bits', a dict with names as keys, is missing"),
    "null bits": (saved(packed(bits=None)), "is None"),
    "null shapes": (saved(packed(shapes=None)), "is None"),
    "null meta": (saved(packed(meta=None)), "'meta', a dict with names as keys, is None"),
    "odd meta": (saved(packed(meta={"scope": [1]})), r"scope=\[1\]"),
    "text as sparsity": (saved(packed(meta={"sparsity": "0.9"})), "sparsity='0.9'"),
    "shape of another": (saved(packed(shapes={"v": [3, 3]})), "of v, w it has bits or a shape"),
    "shape as number": (saved(packed(shapes={"w": 9})), "the shape of 'w' is 9"),
    "negative shape": (saved(packed(shapes={"w": [-3, -3]})), "no list of sizes"),
    "fractions of a shape": (saved(packed(shapes={"w": [3.0, 3]})), "no list of sizes"),
    "vast shape": (saved(packed(shapes={"w": [10**18, 10**18]})), "cannot hold one bit"),
    "bits as list": (saved(packed(bits={"w": [1, 2]})), "no tensor"),
    "bits of another type": (saved(packed(bits={"w": torch.zeros(2)})), "torch.float32 cannot hold"),
    "bits of another length": (saved(packed(bits={"w": torch.zeros(3, dtype=torch.uint8)})), "3 bytes"),
    "bits behind the end": (
        saved(packed(bits={"w": torch.full((2,), 255, dtype=torch.uint8)})),
        "bits are set behind the last of its 9 entries",
    ),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("write", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named_with_the_reason(tmp_path, write, words, mapped):
    path = tmp_path / "bad_mask.pt"
    write(path)
    with pytest.raises(ValueError, match=rf"(?s)bad_mask\.pt .*{words}"):
        Mask.load(path, mapped=mapped)


def test_what_the_bad_files_are_made_of_is_a_mask(tmp_path):
    torch.save(packed(), tmp_path / "m.pt")
    assert Mask.load(tmp_path / "m.pt").positions("w").tolist() == [0, 1, 2]


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt.*Unsupported global") as refused:
        Mask.load(tmp_path / "evil.pt")
    assert "weights_only" not in str(refused.value)  # torch advises to load it all the same


def test_bits_of_another_length_are_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        Mask({"a": torch.zeros(3, dtype=torch.uint8)}, {"a": (4, 4)})


def test_bits_behind_the_last_entry_are_refused():
    with pytest.raises(ValueError, match="bits are set behind the last of its 3 entries"):
        Mask({"a": torch.full((1,), 0xFF, dtype=torch.uint8)}, {"a": (3,)})  # else the density would be 2.67


# what trains in a run: lota/masks/trainable.py


@pytest.mark.parametrize("name", ["0.0_mask.pt", "0_mask.pt", "0.00_mask.pt"])
def test_an_absent_file_of_sparsity_0_means_dense(tmp_path, name):
    assert mask_or_dense(None) is None
    assert mask_or_dense(tmp_path / name) is None and mask_or_dense(str(tmp_path / name)) is None
    Mask.from_dense(random_kept(0)).save(tmp_path / name)
    assert mask_or_dense(tmp_path / name).n_kept == Mask.from_dense(random_kept(0)).n_kept


@pytest.mark.parametrize(
    "name", ["0.9_mask.pt", "0.01_mask.pt", "10.0_mask.pt", "0.0_mask.pt.old", "a0.0_mask.pt"]
)
def test_any_other_absent_mask_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match="does not exist"):
        mask_or_dense(tmp_path / name)


def test_a_mask_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Mask.from_dense(random_kept(0)).save(tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for mapped in (False, True):
        mask = mask_or_dense("~/m.pt", mapped)
        (tmp_path / "m.pt").unlink()
        assert mask.names == ["a", "b", "c"]
        (tmp_path / "m.pt").write_bytes(whole)


def deep_llama():
    """Five blocks, so that odd and even ones differ in number."""
    from tests.hf_models import new_model

    return new_model("llama", num_hidden_layers=5)


def kept_by(mask: Mask, model) -> dict[str, torch.Tensor]:
    return {
        name: mask.dense(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        for name, p in model.named_parameters()
    }


def test_nothing_to_freeze_trains_everything():
    assert trainable_mask(deep_llama(), None) is None
    assert trainable_mask(deep_llama(), None, protect=iter([])) is None


@pytest.mark.parametrize(("word", "frozen"), [("even", (0, 2, 4)), ("odd", (1, 3))])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("block_name", [None, "LlamaDecoderLayer"])
def test_frozen_layers(word, frozen, given, block_name):
    model = deep_llama()
    mask = tiny.random_mask(model) if given else None
    found = kept_by(trainable_mask(model, mask, freeze_layers=word, block_name=block_name), model)
    for name, p in model.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer in frozen:
            assert not found[name].any(), name
        elif given:
            assert torch.equal(found[name], mask.dense(name)) if name in mask else not found[name].any()
        else:
            assert found[name].all() and found[name].shape == p.shape


def test_protected_entries_do_not_train():
    model = deep_llama()
    first, second, third = (tiny.random_mask(model, seed=seed) for seed in range(3))
    found = kept_by(trainable_mask(model, None, protect=iter([second, third])), model)
    assert all(torch.equal(found[n], ~second.dense(n) & ~third.dense(n)) for n in second.names)
    assert found["model.norm.weight"].all() and found["model.embed_tokens.weight"].all()
    found = kept_by(trainable_mask(model, first, flip=True, protect=[second]), model)
    assert all(torch.equal(found[n], ~first.dense(n) & ~second.dense(n)) for n in second.names)
    assert not found["model.norm.weight"].any()


def test_flipped_within_the_scope_that_is_given():
    model = deep_llama()
    mask = tiny.random_mask(model)
    found = trainable_mask(model, mask, flip=True, scope="mlp")
    assert found.names == [name for name in mask.names if "mlp" in name]
    assert all(torch.equal(found.dense(name), ~mask.dense(name)) for name in found.names)
    assert trainable_mask(model, mask, scope="mlp").names == mask.names  # a mask has its own scope


def test_masks_of_other_models_do_not_train():
    model, other = deep_llama(), Mask.from_dense(random_kept(0))
    with pytest.raises(ValueError, match="does not belong to this model"):
        trainable_mask(model, other)
    with pytest.raises(ValueError, match="does not belong to this model"):
        trainable_mask(model, tiny.random_mask(model), protect=[other])
    with pytest.raises(ValueError, match="no module of this class"):
        trainable_mask(model, None, freeze_layers="odd", block_name="GPT2Block")


def test_a_mask_of_other_weights_of_the_same_shapes(tmp_path):
    from tests.hf_models import save_model

    base, other = tmp_path / "base", tmp_path / "other"
    model = save_model("llama", base)
    save_model("llama", other, seed=1)
    own, strange = (content_hash(open_weights(folder)) for folder in (base, other))
    kept = random_kept(0)
    for meta in ({}, {"base_hash": None}, {"base_hash": [strange]}, {"base_hash": own},
                 {"base_hash": strange, "flipped": True}):  # fmt: skip
        refuse_other_base(Mask.from_dense(kept, meta), "mask_path=m.pt", str(base), model)
    for wrong, start, found in ((strange, base, own), (own, other, strange)):
        mask = Mask.from_dense(kept, {"base": "its base", "base_hash": wrong, "flipped": False})
        with pytest.raises(ValueError) as error:
            refuse_other_base(mask, "mask_path=m.pt", str(start), model)
        told = f"mask_path=m.pt: the mask was extracted from its base (weights of hash {wrong[:9]}), "
        assert str(error.value).startswith(f"{told}and this run starts from {start} ({found[:9]})")


def test_the_older_layout_trains_what_it_keeps_and_fits_an_embedding_that_grew():
    model = deep_llama()
    mask = tiny.random_mask(model)
    whole = {
        name: mask.dense(name) if name in mask else torch.zeros(p.shape, dtype=torch.bool)
        for name, p in model.named_parameters()
    }
    whole["model.embed_tokens.weight"] = torch.zeros(7, 32, dtype=torch.bool)  # of the model before it grew
    whole["model.norm.weight"][3] = True  # kept by hand, outside of any scope
    old = Mask.from_dense(whole, {"layout": "dense"})
    found = trainable_mask(model, old)
    assert set(found.names) == {*mask.names, "model.norm.weight"}
    assert all(torch.equal(found.dense(name), whole[name]) for name in found.names)
    found = trainable_mask(model, old, flip=True)
    assert set(found.names) == set(mask.names)
    assert all(torch.equal(found.dense(name), ~mask.dense(name)) for name in found.names)
    found = trainable_mask(model, old, scope="mlp")  # in the scope: also those of which nothing is kept
    assert mask.names[1] not in found.names and set(found.names) == {
        *(n for n in mask.names if mask.kept(n) or "mlp" in n),
        "model.norm.weight",
    }
    whole["model.embed_tokens.weight"][0] = True
    with pytest.raises(ValueError, match="does not belong"):
        trainable_mask(model, Mask.from_dense(whole, {"layout": "dense"}))
    by_name = trainable_mask(model, old, freeze_layers="odd", block_name="LlamaDecoderLayer", flip=True)
    assert (
        by_name.kept("model.layers.1.mlp.up_proj.weight")
        == 0
        < by_name.kept("model.layers.2.mlp.up_proj.weight")
    )


@pytest.mark.parametrize(("start", "stop"), [(0, 30), (8, 19), (5, 24), (13, 14), (30, 30), (16, 30)])
def test_the_part_of_a_stretch_keeps_what_lies_in_it(start, stop):
    kept = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = Mask.from_dense({"a": kept, "b": kept})
    part = mask.part({"a": (start, stop)}, {"a": (stop - start,)})
    assert part.names == ["a"]
    assert torch.equal(part.dense("a"), kept.view(-1)[start:stop])
    assert torch.equal(mask.dense("a"), kept)
