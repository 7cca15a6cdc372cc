"""Masks from a pair on disk, against a stable sort of all saliencies in memory."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lota
from lota.masks import Mask, kept_count
from lota.masks.extract import topk
from lota.masks.extract.saliency import SaliencyStream
from lota.masks.extract.select import Quota, Rule, check_sparsities, kept_by_layer, select
from lota.models import chunks
from lota.models.hashing import content_hash
from lota.models.pair import open_pair
from lota.models.scope import find_scope
from lota.models.weights import open_weights
from scripts import family_models
from tests.hf_models import CONFIGS, save_model, save_policy
from tests.mask_pairs import assert_mask, make_pair, saliencies_of, small_chunks, sorted_masks  # noqa: F401

SPARSITIES = [0.0, 0.5, 0.9, 0.99]


@pytest.mark.parametrize("tuned", ["hf", "policy"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_equals_a_sort(kind, tuned, tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path, kind, tuned=tuned)
    masks = lota.extract(base_path, tuned_path, SPARSITIES)
    saliencies = saliencies_of(base, changed)
    n = sum(value.numel() for value in saliencies.values())
    assert list(masks) == SPARSITIES
    for sparsity, mask in masks.items():
        k = kept_count(sparsity, n)
        assert_mask(mask, sorted_masks(saliencies, k))
        mask.check(base)
        assert mask.meta["shortfall"] == k - mask.n_kept
        assert mask.n_kept == k or sparsity == 0.0  # a seventh of the entries did not move
    kept = [value[masks[0.9].dense(name)] for name, value in saliencies.items()]
    assert masks[0.9].meta["threshold"] == torch.cat(kept).min().item()
    assert masks[0.9].meta["base_hash"] == content_hash(open_weights(base_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ties", [True, False])
def test_dtypes(dtype, ties, tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path, dtype=dtype, ties=ties)
    saliencies = saliencies_of(base, changed)
    assert open_weights(base_path).dtype(next(iter(saliencies))) == dtype
    for sparsity, mask in lota.extract(base_path, tuned_path, SPARSITIES[1:]).items():
        assert_mask(mask, sorted_masks(saliencies, kept_count(sparsity, mask.n_total)))


def test_sides_of_different_dtype(tmp_path):
    base_path, _, base, _ = make_pair(tmp_path, dtype=torch.bfloat16)
    torch.manual_seed(3)
    tuned = copy.deepcopy(base).float()
    for parameter in tuned.parameters():
        parameter.data += torch.randn(parameter.shape) * 1e-3
    save_policy(tmp_path / "fp32.pt", tuned.state_dict())
    mask = lota.extract(base_path, tmp_path / "fp32.pt", [0.9])[0.9]
    assert_mask(mask, sorted_masks(saliencies_of(base, tuned), kept_count(0.9, mask.n_total)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_the_base_is_no_change_of_it(dtype, tmp_path):
    """An fp32 base trained in bf16: entries that did not move differ from it by what rounding took off."""
    base_path, _, base, _ = make_pair(tmp_path)
    tuned = copy.deepcopy(base)
    moved = {}
    for name in find_scope(base):
        p = tuned.get_parameter(name)
        p.data += torch.rand(p.shape) * 1e-3  # no number of fewer bits
        base.get_parameter(name).data.copy_(p)
        moved[name] = torch.rand(p.shape) < 0.01
        p.data[moved[name]] += 1
    base.save_pretrained(base_path, max_shard_size="20KB")
    save_policy(tmp_path / "narrow.pt", {name: value.to(dtype) for name, value in tuned.state_dict().items()})
    mask = lota.extract(base_path, tmp_path / "narrow.pt", [0.5])[0.5]
    assert_mask(mask, moved)  # none of the others has a saliency
    rounded = {name: base.get_parameter(name).detach().to(dtype).float() for name in moved}
    saliencies = {
        name: (tuned.get_parameter(name).detach().to(dtype).float() - rounded[name]).abs() for name in moved
    }
    few = lota.extract(base_path, tmp_path / "narrow.pt", [0.995])[0.995]
    assert_mask(few, sorted_masks(saliencies, kept_count(0.995, few.n_total)))


def test_policy_against_policy_takes_the_structure_from_the_run_or_from_model(tmp_path):
    base_path, tuned_path, base, _changed = make_pair(tmp_path, tuned="policy")
    run = tmp_path / "run"
    (run / "epoch-1").mkdir(parents=True)
    save_policy(run / "epoch-1" / "policy.pt", base.state_dict())
    with pytest.raises(ValueError, match="give model="):
        lota.extract(run / "epoch-1" / "policy.pt", tuned_path, [0.5])
    expected = lota.extract(base_path, tuned_path, [0.5])[0.5]
    named = lota.extract(run / "epoch-1", tuned_path, [0.5], model=base_path)[0.5]
    (run / "config.yaml").write_text(f"model:\n  name_or_path: {base_path}\n")
    found = lota.extract(run / "epoch-1", tuned_path, [0.5])[0.5]
    for mask in (named, found):
        assert_mask(mask, {name: expected.dense(name) for name in expected.names})


def test_smallest_keeps_the_smallest_nonzero_scores(tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path, ties=False)
    mask = lota.extract(base_path, tuned_path, [0.9], smallest=True)[0.9]
    saliencies = saliencies_of(base, changed)
    inverse = {name: torch.where(value > 0, 1e9 - value.double(), 0.0) for name, value in saliencies.items()}
    assert_mask(mask, sorted_masks(inverse, kept_count(0.9, mask.n_total)))
    kept = torch.cat([value[mask.dense(name)] for name, value in saliencies.items()])
    assert mask.meta["threshold"] == kept.max().item()  # the score of the last entry taken


def test_magnitude_needs_no_tuned_model(tmp_path):
    base_path, _, base, _ = make_pair(tmp_path)
    mask = lota.extract(base_path, sparsities=[0.9], score="magnitude")[0.9]
    weights = {name: dict(base.named_parameters())[name].detach().abs() for name in find_scope(base)}
    assert_mask(mask, sorted_masks(weights, kept_count(0.9, mask.n_total)))
    assert mask.meta["base_hash"] == content_hash(open_weights(base_path))


def test_random_depends_on_seed_and_not_on_chunks(tmp_path, monkeypatch):
    base_path, _, _, _ = make_pair(tmp_path)

    def bits(seed):
        mask = lota.extract(base_path, sparsities=[0.5], score="random", seed=seed)[0.5]
        assert mask.n_kept == kept_count(0.5, mask.n_total)
        return torch.cat([mask.dense(name).reshape(-1) for name in mask.names])

    first, other = bits(0), bits(1)
    monkeypatch.setattr(chunks, "CHUNK", 1 << 20)
    assert torch.equal(bits(0), first)
    agree = (first == other).double().mean().item()
    assert abs(agree - 0.5) < 4 * 0.5 / len(first) ** 0.5  # independent seeds agree by chance only
    halves = first[: len(first) // 2].double().mean().item()
    assert abs(halves - 0.5) < 4 * 0.5 / (len(first) / 2) ** 0.5


def test_protected_entries_are_left_alone_and_still_count(tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path, ties=False)
    first = lota.extract(base_path, tuned_path, [0.7])[0.7]
    other = lota.extract(base_path, sparsities=[0.9], score="random")[0.9]
    other.save(tmp_path / "other.pt")
    second = lota.extract(base_path, tuned_path, [0.5], protect=[first, tmp_path / "other.pt"])[0.5]
    free = {
        name: value.masked_fill(first.dense(name) | other.dense(name), 0)
        for name, value in saliencies_of(base, changed).items()
    }
    assert_mask(second, sorted_masks(free, kept_count(0.5, second.n_total)))
    assert second.overlap(first) == second.overlap(other) == 0
    assert second.meta["protected"] == first.union(other).n_kept


def test_protected_entries_leave_too_little_room(tmp_path):
    base_path, tuned_path, _, _ = make_pair(tmp_path)
    first = lota.extract(base_path, sparsities=[0.5], score="random")[0.5]
    with pytest.raises(ValueError, match=r"sparsity 0\.4 .* at least 0\.5"):
        lota.extract(base_path, tuned_path, [0.9, 0.4], protect=[first])
    alien = Mask.from_dense({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="does not belong"):
        lota.extract(base_path, tuned_path, [0.9], protect=[alien])


def test_as_many_as_the_protected_masks_leave(tmp_path):
    base_path, tuned_path, _, _ = make_pair(tmp_path)
    half = lota.extract(base_path, sparsities=[0.5], score="random")[0.5]
    rest = lota.extract(base_path, sparsities=[0.5], score="random", seed=1, protect=[half])[0.5]
    assert rest.n_kept == half.n_total - half.n_kept and rest.overlap(half) == 0
    with pytest.raises(ValueError, match="leave no entry of the scope free: protect fewer"):
        lota.extract(base_path, tuned_path, [0.9], protect=[half, rest])
    nothing = lota.extract(base_path, tuned_path, [0.9999999], protect=[half, rest])
    assert nothing[0.9999999].n_kept == 0  # none was asked for
    with pytest.raises(ValueError, match=r"keeps 1[\d,]+ of the .* leave 1 free: choose .* at least 0.9999$"):
        one = next(name for name in rest.names if rest.kept(name))
        bits = {name: rest.dense(name) for name in rest.names}
        bits[one].view(-1)[rest.positions(one)[0]] = False
        lota.extract(base_path, tuned_path, [0.9], protect=[half, Mask.from_dense(bits)])


def test_what_is_not_given(tmp_path):
    """The defaults: sparsity 0.9, the largest task vectors, seed 0, the hash of the base."""
    base_path, tuned_path, _, _ = make_pair(tmp_path, ties=False)
    masks = lota.extract(base_path, tuned_path)
    assert list(masks) == [0.9]
    rule = Rule("task_vector", "global", smallest=False, seed=0, protect=(), granularity="element")
    assert Rule() == rule and Rule("random") == Rule("random", seed=0)
    for given in (rule, Rule()):
        mask = select(Quota(open_pair(base_path, tuned_path), [0.9], given))[0.9]
        assert mask.meta == masks[0.9].meta and mask.overlap(masks[0.9]) == mask.n_kept
    known = {"scope": "attention and MLP weights", "per": "global", "granularity": "element"}
    known |= {"score": "task_vector", "smallest": False, "seed": None, "data": None, "protected": 0}
    known |= {"shortfall": 0, "base": str(base_path), "tuned": str(tuned_path), "sparsity": 0.9}
    assert known.items() <= masks[0.9].meta.items()
    pair = open_pair(base_path, tuned_path)
    assert select(Quota(pair, [0.9], Rule()), with_hash=False)[0.9].meta["base_hash"] is None
    assert Quota(pair, [0.9], Rule()).units == {} == Quota(pair, [0.9], Rule()).taken
    first, again, other = (
        lota.extract(base_path, sparsities=[0.5], score="random", **seed)[0.5]
        for seed in ({}, {"seed": 0}, {"seed": 1})
    )
    assert first.overlap(again) == first.n_kept > first.overlap(other)
    assert (first.meta["seed"], other.meta["seed"], first.meta["tuned"]) == (0, 1, None)
    assert first.meta["base_hash"] == content_hash(open_weights(base_path))


def test_sparsities_are_numbers_and_each_is_there_once():
    assert check_sparsities(["0.5", 0.9, 0.5, 0]) == [0.5, 0.9, 0.0]
    refused = [([-0.0], "sparsity -0.0: write 0.0"), ([0.5, -0.0], "sparsity -0.0: write 0.0")]
    refused += [(["-0"], "sparsity '-0': write 0.0"), ([0.5, 1.5], "sparsity=1.5")]
    refused += [([0.5, None, 0.9], "sparsity None is not"), ([], "no sparsity given")]
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            check_sparsities(wrong)


@pytest.mark.parametrize("per", ["tensor", "layer"])
def test_a_threshold_of_each_tensor_or_layer(per, tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path, ties=False)
    mask = lota.extract(base_path, tuned_path, [0.8], scope="proj|embed|norm", per=per)[0.8]
    pair = open_pair(base_path, tuned_path, scope="proj|embed|norm")
    before, after = dict(base.named_parameters()), dict(changed.named_parameters())
    labels = {n: n.split(".")[2] if ".layers." in n else "outside" for n in pair.scope}
    pools = {}
    for name in pair.scope:
        pools.setdefault(name if per == "tensor" else labels[name], {})[name] = (
            after[name].detach() - before[name].detach()
        ).abs()
    expected, thresholds = {}, {}
    for label, pool in pools.items():
        kept = sorted_masks(pool, kept_count(0.8, sum(value.numel() for value in pool.values())))
        expected |= kept
        thresholds[label] = min(float(v[kept[n]].min()) for n, v in pool.items() if kept[n].any())
    assert_mask(mask, {name: expected[name] for name in pair.scope})
    assert mask.meta["threshold"] == thresholds and mask.meta["per"] == per
    assert list(mask.meta["threshold"]) == sorted(pools, key=lambda label: min(pools[label]))
    assert mask.meta["base_hash"] == content_hash(open_weights(base_path))
    rows = kept_by_layer(pair, mask)
    assert set(rows) == {"0", "1", "outside"}
    for label, row in rows.items():
        names = [name for name in pair.scope if labels[name] == label]
        assert row["kept"] == sum(int(expected[name].sum()) for name in names)
        assert row["entries"] == sum(before[name].numel() for name in names)


def test_a_pair_without_a_difference(tmp_path):
    base_path, _, base, _ = make_pair(tmp_path)
    same = save_policy(tmp_path / "same.pt", base.state_dict())
    with pytest.raises(ValueError, match=r"same\.pt has the weights of base=.* of the scope, so there"):
        lota.extract(base_path, same, [0.9])
    assert lota.extract(base_path, same, [0.9999999])[0.9999999].n_kept == 0  # none was asked for
    both = lota.extract(base_path, tmp_path / "tuned", [0.9, 0.9999999])
    assert [mask.n_kept > 0 for mask in both.values()] == [True, False]
    mask = lota.extract(base_path, sparsities=[0.5], score="random")[0.5]
    with pytest.raises(ValueError, match="of the scope that the protected masks leave, so there"):
        lota.extract(base_path, same, [0.9], protect=[mask])
    zeros = {name: torch.zeros_like(value) for name, value in base.state_dict().items()}
    nothing = save_policy(tmp_path / "zeros.pt", zeros)
    with pytest.raises(ValueError, match=r"score=magnitude is 0 for every entry of .*zeros\.pt: choose"):
        lota.extract(nothing, sparsities=[0.9], score="magnitude", model=base_path)
    with pytest.raises(ValueError, match="score=snip reads gradients: pass collected="):
        lota.extract(base_path, sparsities=[0.9], score="snip")


def test_unmoved_entries_are_never_kept(tmp_path, caplog):
    base_path, _, base, _ = make_pair(tmp_path)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"][3, :5] += 1
    save_policy(tmp_path / "few.pt", state)
    mask = lota.extract(base_path, tmp_path / "few.pt", [0.9])[0.9]
    assert mask.positions("model.layers.1.mlp.up_proj.weight").tolist() == [3 * 32 + i for i in range(5)]
    assert mask.n_kept == 5
    assert mask.meta["shortfall"] == kept_count(0.9, mask.n_total) - 5
    assert mask.meta["threshold"] == 0.0
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    few = f"sparsity 0.9: {mask.meta['shortfall']} entries fewer than asked for are kept, because their sal"
    assert [(level, text.startswith(few)) for level, text in told] == [("WARNING", True)]


@pytest.mark.parametrize("unmoved", [0, 1])
def test_what_a_shortfall_comes_from_is_said(unmoved, tmp_path, caplog):
    """INFO if no whole row fits into what is left; WARNING if any tensor lacks entries that moved."""
    base_path, _, base, changed = make_pair(tmp_path, ties=False)
    state = {name: value.clone() for name, value in changed.state_dict().items()}
    for name in sorted(find_scope(base))[:unmoved]:
        state[name] = base.state_dict()[name]
    tuned = save_policy(tmp_path / "tuned.pt", state)
    caplog.set_level("INFO")
    mask = lota.extract(base_path, tuned, [0.9], per="tensor", granularity="row")[0.9]
    (told,) = [record for record in caplog.records if "fewer than asked for" in record.getMessage()]
    assert f"{mask.meta['shortfall']} entries fewer" in told.getMessage()
    assert told.levelname == ("WARNING" if unmoved else "INFO")
    assert ("their saliency is 0" if unmoved else "no whole row fits") in told.getMessage()


def test_scope_by_regular_expression(tmp_path):
    base_path, tuned_path, base, _ = make_pair(tmp_path)
    mask = lota.extract(base_path, tuned_path, [0.5], scope=r"layers\.1\..*(norm|q_proj)")[0.5]
    assert mask.names == [
        n for n, _ in base.named_parameters() if "layers.1." in n and ("norm" in n or "q_proj" in n)
    ]
    assert mask.meta["scope"] == r"layers\.1\..*(norm|q_proj)"
    for pattern in ("nothing_like_this", "("):
        with pytest.raises(ValueError, match="scope"):
            lota.extract(base_path, tuned_path, [0.5], scope=pattern)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_not_a_number_is_refused_by_name(bad, side, tmp_path):
    base_path, tuned_path, _, _ = make_pair(tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight"
    folder = {"base": base_path, "tuned": tuned_path}[side]
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][-1, -1] = bad
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} of .*{folder.name}"):
        lota.extract(base_path, tuned_path, [0.5])
    if side == "base":
        with pytest.raises(ValueError, match=name):
            lota.extract(base_path, sparsities=[0.5], score="magnitude", smallest=True)


def test_another_vocabulary_is_no_difference(tmp_path):
    base_path, tuned_path, _base, changed = make_pair(tmp_path)
    expected = lota.extract(base_path, tuned_path, [0.9])[0.9]
    changed.resize_token_embeddings(70, mean_resizing=False)
    changed.save_pretrained(tmp_path / "grown")
    save_policy(tmp_path / "grown.pt", changed.state_dict())
    for path in (tmp_path / "grown", tmp_path / "grown.pt"):
        mask = lota.extract(base_path, path, [0.9])[0.9]
        assert_mask(mask, {name: expected.dense(name) for name in expected.names})


def test_a_block_that_several_layers_share_is_listed_once(tmp_path):
    """Zamba's folder holds it once, its policy.pt under the name of every layer."""
    model = family_models.tiny_model("zamba")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mask = lota.extract(tmp_path / "base", save_policy(tmp_path / "tuned.pt", model.state_dict()), [0.5])[0.5]
    shared = {name.split(".shared_transf")[0] for name in mask.names if "shared_transf" in name}
    assert shared == {"model.layers.1"}
    assert set(mask.names) <= {name for name, _ in model.named_parameters()}


def test_models_that_do_not_belong_together(tmp_path):
    base_path, _, base, _ = make_pair(tmp_path)
    save_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"(?s)missing there: model\.layers.*only there: transformer\.h"):
        lota.extract(base_path, tmp_path / "gpt2", [0.5])
    state = base.state_dict()
    deeper = {name.replace("layers.1.", "layers.2."): value for name, value in state.items()}
    wider = {name: value.repeat(2, 1) if "up_proj" in name else value for name, value in state.items()}
    fewer = {name: value for name, value in state.items() if "down_proj" not in name}
    whole = {n: value.to(torch.int8) if "down_proj" in n else value for n, value in state.items()}
    for other, message in (
        (state | deeper, r"only there: model\.layers\.2"),
        (wider, r"of another shape: .*up_proj\.weight \(96, 32\) instead of \(48, 32\)"),
        (fewer, r"2 missing there: model\.layers\.0\.mlp\.down_proj"),
        (whole, r"down_proj\.weight is torch\.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            lota.extract(base_path, save_policy(tmp_path / "other.pt", other), [0.5])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsities": [1.0]}, "sparsity=1.0"),
        ({"sparsities": [-0.1]}, "sparsity=-0.1"),
        ({"sparsities": [float("nan")]}, "sparsity=nan"),
        ({"sparsities": ["many"]}, "'many' is not a number"),
        ({"sparsities": []}, "no sparsity"),
        ({"score": "task_vectr"}, "did you mean task_vector"),
        ({"per": "layers"}, "global, tensor, layer .*mean layer"),
        ({"tuned": None}, "tuned=None"),
        ({"tuned": "/nowhere/policy.pt"}, "does not exist"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    base_path, tuned_path, _, _ = make_pair(tmp_path)
    with pytest.raises(ValueError, match=message):
        lota.extract(**{"base": base_path, "tuned": tuned_path, "sparsities": [0.5], **arguments})


@pytest.mark.parametrize("passes", [1, 2])
def test_the_files_are_read_at_most_twice(passes, tmp_path, monkeypatch):
    """The hash of the base takes part in the first pass; a small sample comes on top."""
    base_path, tuned_path, _, _ = make_pair(tmp_path)
    monkeypatch.setattr(topk, "_sampled_brackets", lambda *args: [topk.Bracket(1, topk.MAX_KEY)])
    if passes == 2:
        monkeypatch.setattr(topk, "REMEMBERED", 100)
    pair = open_pair(base_path, tuned_path)
    read = {"base": 0, "tuned": 0}
    for role, source in pair.sources.items():

        def counted(tensor, start, stop, out=None, role=role, plain=source._read_bytes):
            read[role] += stop - start
            return plain(tensor, start, stop, out)

        monkeypatch.setattr(source, "_read_bytes", counted)
    mask = select(Quota(pair, [0.9], Rule()))[0.9]
    outside = sum(math.prod(shape) for shape in pair.shapes.values()) - mask.n_total
    assert read == {"base": passes * mask.n_total + outside, "tuned": passes * mask.n_total}


def test_random_saliencies_are_positive_and_uniform(tmp_path):
    base_path, _tuned_path, _, _ = make_pair(tmp_path)
    stream = SaliencyStream(open_pair(base_path, needs=()).sources, "random", seed=7)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = stream.keys(chunks.Span(name, 0, 100_003)).view(np.float32)
    assert np.array_equal(stream.keys(chunks.Span(name, 808, 1001)).view(np.float32), whole[808:1001])
    assert whole.min() > 0 and whole.max() <= 1
    assert np.abs(np.histogram(whole, 10, (0, 1))[0] / 1e5 - 0.1).max() < 5 * (0.1 * 0.9 / 1e5) ** 0.5
