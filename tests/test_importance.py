"""What entries matter to tasks: mean squares of gradients, masks that avoid them, and the files of it."""

from __future__ import annotations

import hashlib

import pytest
import tiny
import torch
from mask_pairs import assert_mask, make_pair, saliencies_of, small_chunks, sorted_masks  # noqa: F401

import lota
from lota.masks import Mask, kept_count
from lota.masks.extract.gradients import Collected
from lota.masks.extract.importance import Listed, importance_of, load_importance, save_importance
from lota.models.scope import find_scope


def squares(model, seed: int, scale: float = 1.0) -> Collected:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in find_scope(model).items()}
    values = {n: scale * torch.rand(s, generator=generator).pow(8) for n, s in shapes.items()}
    return Collected(values, "squares", {"datasets": [f"task{seed}"]})


def test_each_task_counts_the_same_and_an_entry_has_one_on_average():
    model = tiny.make("llama")
    found = importance_of(squares(model, seed, scale) for seed, scale in ((1, 1e-9), (2, 1e6)))
    one, two = (
        torch.cat([v.flatten().double() for v in squares(model, seed).values.values()]) for seed in (1, 2)
    )
    total = torch.cat([value.flatten() for value in found.values.values()])
    torch.testing.assert_close(total.double(), one / one.mean() + two / two.mean(), rtol=1e-5, atol=1e-6)
    assert found.kind == "importance"
    assert found.meta == {"tasks": [{"datasets": ["task1"]}, {"datasets": ["task2"]}]}


def test_importance_is_the_fisher_diagonal_of_examples():
    """Against autograd, example by example."""
    model = tiny.make("llama")
    rows = [row[None] for row in tiny.batches(1)[0]]

    def loss_of(ids):
        return model(input_ids=ids, labels=ids).loss

    found = importance_of([lota.collect_gradients(model, loss_of, rows, kind="squares")])
    scope = {name: p for name, p in model.named_parameters() if name in find_scope(model)}
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in scope.items()}
    for row in rows:
        for name, grad in zip(scope, torch.autograd.grad(loss_of(row), [*scope.values()]), strict=True):
            sums[name] += grad.double() ** 2
    mean = torch.cat([value.flatten() for value in sums.values()]).mean()
    for name, value in sums.items():
        torch.testing.assert_close(found.values[name].double(), value / mean, rtol=1e-3, atol=1e-6)


def test_what_is_no_importance_is_refused():
    model = tiny.make("llama")
    one = squares(model, 1)
    with pytest.raises(ValueError, match="no tasks"):
        importance_of([])
    with pytest.raises(ValueError, match="not of kind='sum'"):
        importance_of([Collected(one.values, "sum")])
    with pytest.raises(ValueError, match="other parameters"):
        importance_of([one, Collected({"a": torch.ones(3)}, "squares")])
    with pytest.raises(ValueError, match=r"mean squared gradient of \['task1'\] is 0.0"):
        importance_of([Collected({n: 0 * v for n, v in one.values.items()}, "squares", one.meta)])
    with pytest.raises(ValueError, match="mean squared gradient of a task is inf"):
        importance_of([Collected({n: v / 0 for n, v in one.values.items()}, "squares")])


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_a_mask_keeps_what_changed_most_and_matters_least(granularity, tmp_path):
    """score^2 = change^2 / (1 + strength importance), against a sort; chunks do not matter."""
    base_path, tuned_path, base, changed = make_pair(tmp_path)
    avoid, change = importance_of([squares(base, 3)]), saliencies_of(base, changed)
    rates = {n: (v.square() / (1 + 7.5 * avoid.values[n])).sqrt() for n, v in change.items()}
    options = {"granularity": granularity, "avoid": avoid}
    mask = lota.extract(base_path, tuned_path, [0.9], avoid_strength=7.5, **options)[0.9]
    plain = lota.extract(base_path, tuned_path, [0.9], granularity=granularity)[0.9]
    if granularity == "element":
        assert_mask(mask, sorted_masks(rates, kept_count(0.9, mask.n_total)))
    kept = {m: sum(avoid.values[n][m.dense(n)].sum().item() for n in m.names) for m in (mask, plain)}
    less = 0.7 if granularity == "element" else 0.95  # rows are more alike
    assert kept[mask] < less * kept[plain]
    assert mask.meta["avoid"] == {"strength": 7.5, "tasks": [{"datasets": ["task3"]}]}
    assert "avoid" not in plain.meta
    off = lota.extract(base_path, tuned_path, [0.9], avoid_strength=0.0, **options)[0.9]
    assert off.fingerprint() == plain.fingerprint()


def test_an_entry_that_did_not_change_is_not_kept_however_little_it_matters(tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path)
    still = {name: value == 0 for name, value in saliencies_of(base, changed).items()}
    assert any(value.any() for value in still.values())
    mask = lota.extract(base_path, tuned_path, [0.0], avoid=importance_of([squares(base, 3)]))[0.0]
    assert_mask(mask, {name: ~value for name, value in still.items()})


def test_what_cannot_be_avoided_is_refused(tmp_path):
    base_path, tuned_path, base, _ = make_pair(tmp_path)
    good = importance_of([squares(base, 3)])
    name = next(iter(good.values))

    def refused(message: str, avoid: Collected = good, **more) -> None:
        with pytest.raises(ValueError, match=message):
            lota.extract(base_path, tuned_path, [0.9], avoid=avoid, **more)

    for strength in (-1.0, -0.5, float("nan"), float("inf")):
        refused(f"avoid_strength={strength}: must be finite", avoid_strength=strength)
    refused("smallest=True would keep what matters", smallest=True)
    refused(r"pass lota.importance_of\(\[collected\]\)", squares(base, 3))
    for bad in (-1.0, float("nan"), float("inf")):
        values = {**good.values, name: torch.full_like(good.values[name], bad)}
        refused(f"{name}: importance to avoid is negative, NaN or infinite", Collected(values, good.kind))
    less = {n: v for n, v in good.values.items() if n != name}
    refused(f"gradients of {name}: .* nothing was collected", Collected(less, good.kind))


def test_files_hold_what_a_mask_keeps_and_fit_no_other(tmp_path):
    model = tiny.make("llama")
    found, mask, path = importance_of([squares(model, 1)]), tiny.random_mask(model), tmp_path / "i.pt"
    save_importance(path, found, mask, "made of this")
    listed = load_importance(path, mask)
    assert listed.key == "made of this"
    for name in mask.names:
        expected = found.values[name][mask.dense(name)]
        assert torch.equal(listed.values[name], expected) if mask.kept(name) else name not in listed.values
    digest = listed.digest
    with pytest.raises(ValueError, match="importance of other entries than those that train"):
        load_importance(path, tiny.random_mask(model, seed=1))
    with pytest.raises(ValueError, match="other entries"):
        load_importance(path, None)
    without = mask.only([name for name in mask.names if mask.kept(name)])  # the same entries are kept
    assert load_importance(path, without).digest == digest
    save_importance(path, found, None)
    assert load_importance(str(path), None).values.keys() == found.values.keys()
    assert load_importance(path, None).digest != digest


@pytest.mark.parametrize(
    "content",
    [b"no torch file", {"importance": {}}, [1], "negative"],
)
def test_other_files_are_refused(content, tmp_path):
    path, mask = tmp_path / "i.pt", Mask.from_dense({"a": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="does not exist"):
        load_importance(path, mask)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "negative":
        save_importance(path, Collected({"a": -torch.ones(2, 2)}, "importance"), mask)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="is no file of importances"):
        load_importance(path, mask)


def test_the_digest_is_of_names_and_values():
    """In any order of the names; against SHA-256 of what the docstring says, written out."""
    a, b = torch.tensor([0.5, 2.0]), torch.tensor([3.0])
    values = {"b": b, "a": a}
    whole = b"a\x002\x00" + a.numpy().tobytes() + b"b\x001\x00" + b.numpy().tobytes()
    digest = Listed(values, None).digest
    assert digest == hashlib.sha256(whole).hexdigest() == Listed({"a": a, "b": b}, "x").digest
    others = [{"b": b, "a": a + 1}, {"b": b, "c": a}, {"b": a, "a": b}, {"a": a}]
    assert len({digest, *(Listed(other, None).digest for other in others)}) == 5


def test_every_value_of_a_file_is_looked_at(tmp_path):
    """A zero is a value; one bad number in one of two tensors, or another version, is no such file."""
    path = tmp_path / "i.pt"
    good = {"a": torch.tensor([0.0, 0.25]), "b": torch.tensor([1.0])}
    save_importance(path, Collected(good, "importance"), None)
    assert load_importance(path, None).values["a"].tolist() == [0.0, 0.25]
    content = torch.load(path, weights_only=True)
    bad = [{"importance": {**good, "b": torch.tensor([x])}} for x in (float("inf"), float("nan"), -0.5)]
    for change in (*bad, {"version": 2}, {"version": 0}, {"format": "other"}):
        torch.save({**content, **change}, path)
        with pytest.raises(ValueError, match="is no file of importances that are finite and at least 0"):
            load_importance(path, None)


def test_tensors_that_do_not_fit_the_mask_are_refused(tmp_path):
    """Before their entries are looked at: a view of one number can have a million million of them."""
    path, mask = tmp_path / "i.pt", Mask.from_dense({"a": torch.ones(2, 2, dtype=torch.bool)})
    save_importance(path, Collected({"a": torch.ones(2, 2)}, "importance"), mask)
    content = torch.load(path, weights_only=True)

    def refused(values: object) -> str:
        torch.save({**content, "importance": values}, path)
        with pytest.raises(ValueError) as error:
            load_importance(path, mask)
        return str(error.value)

    assert "share a place" in refused({"a": torch.ones(1).expand(10**12)})
    assert "other entries than those that train" in refused({"a": torch.ones(3)})
    assert "other entries than those that train" in refused({})
    whole = torch.ones(4, dtype=torch.int64)
    for values in ({"a": torch.ones(2, 2)}, {"a": whole}, {"a": 1.0}, torch.ones(4)):
        assert "is no file of importances" in refused(values)
