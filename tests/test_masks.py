"""Mask: counts, set algebra, both file layouts, and refusal of what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

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


@pytest.mark.parametrize(
    "write",
    [
        lambda p: None,
        lambda p: p.write_bytes(b"not a file of torch"),
        lambda p: p.write_bytes(b""),
        lambda p: torch.save([1, 2], p),
        lambda p: torch.save({"w": "text"}, p),
        lambda p: torch.save({}, p),
        lambda p: (torch.save({"w": torch.ones(1000)}, p), p.write_bytes(p.read_bytes()[:600])),
        lambda p: torch.save({"format": "lota-mask", "version": 99, "bits": {}, "shapes": {}, "meta": {}}, p),
    ],
    ids=["absent", "text", "empty", "list", "strings", "no entries", "truncated", "newer version"],
)
def test_bad_files_are_named(tmp_path, write):
    path = tmp_path / "bad_mask.pt"
    write(path)
    with pytest.raises(ValueError, match=r"bad_mask\.pt"):
        Mask.load(path)


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
