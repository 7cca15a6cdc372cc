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
from lota.models.scope import find_scope


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
        "than the file holds",
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
