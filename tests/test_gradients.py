"""Gradients summed while batches stream through a model, against autograd over everything at once."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from memory import needs_proc, printed
from safetensors.torch import load_file

import lota
from lota.masks import kept_count
from lota.masks.extract.gradients import Collected, collect_gradients
from lota.models.loading import enable_activation_checkpointing
from lota.models.scope import find_scope
from tests.mask_pairs import assert_mask, sorted_masks
from tests.tolerance import assert_same, chain

ARCHITECTURES = ["llama", "gpt2", "qwen2", "mixtral"]


def loss_of(model):
    """Summed token loss of a batch of ids."""
    return lambda ids: model(input_ids=ids, labels=ids).loss * ids[:, 1:].numel()


def autograd(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if name in find_scope(model)}
    grads = torch.autograd.grad(loss_of(model)(ids), list(named.values()), allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sum_over_batches_is_the_gradient_of_all_examples(architecture, checkpointing):
    model = tiny.make(architecture)
    batches = tiny.batches(3)
    expected = autograd(model, torch.cat(batches))
    if checkpointing:
        enable_activation_checkpointing(model)
    collected = collect_gradients(model, loss_of(model), batches, meta={"task": "ids"})
    assert list(collected.values) == list(find_scope(model))
    for name, grad in expected.items():
        assert_same(collected.values[name], grad, terms=chain(model, tokens=3 * 48), name=name)
    assert collected.kind == "sum" and collected.meta == {"batches": 3, "task": "ids"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_squares_are_of_each_batch(architecture):
    model = tiny.make(architecture)
    batches = tiny.batches(3)
    by_batch = [autograd(model, ids) for ids in batches]
    collected = collect_gradients(model, loss_of(model), batches, kind="squares")
    rows = [row[None] for ids in batches for row in ids]
    by_example = [autograd(model, row) for row in rows]
    fisher = collect_gradients(model, loss_of(model), rows, kind="squares")
    terms = 4 * chain(model, tokens=48)  # a square has twice the relative error of the gradient
    for name in find_scope(model):
        expected = sum(grads[name].square() for grads in by_batch)
        assert_same(collected.values[name], expected, terms=terms, name=name)
        expected = sum(grads[name].square() for grads in by_example)
        assert_same(fisher.values[name], expected, terms=terms, name=name)


@pytest.mark.parametrize("kind", ["sum", "squares"])
@pytest.mark.parametrize(
    "weights, sums", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16",) * 2]
)
def test_coarser_numbers(weights, sums, kind):
    model = tiny.make("llama", dtype=getattr(torch, weights))
    exact = tiny.make("llama", dtype=torch.float32)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    batches = tiny.batches(4)
    expected = collect_gradients(exact, loss_of(exact), batches, kind=kind)
    dtype = getattr(torch, sums)
    got = collect_gradients(model, loss_of(model), batches, kind=kind, dtype=dtype)
    for name, value in got.values.items():
        assert value.dtype == dtype
        wanted = expected.values[name]
        error = (value.float() - wanted).norm() / wanted.norm()
        assert error < (0.01 if weights == "float32" else 0.1), name


@pytest.mark.parametrize("kind", ["sum", "squares"])
def test_bf16_sums_of_many_small_gradients(kind):
    """300 batches of one gradient: rounded to the nearest value, sums stop at about 256 times of it."""
    model, (ids,) = tiny.make("llama"), tiny.batches(1)
    expected = collect_gradients(model, loss_of(model), [ids], kind=kind)
    got = collect_gradients(model, loss_of(model), [ids] * 300, kind=kind, dtype=torch.bfloat16)
    again = collect_gradients(model, loss_of(model), [ids] * 300, kind=kind, dtype=torch.bfloat16)
    for name, once in expected.values.items():
        large = once.abs() > 1e-3 * once.abs().max()
        ratio = got.values[name].double()[large] / once.double()[large]
        # a sum S of steps g: of each, a variance below g times bf16's last place, 2^-7 S; of all, 2^-8 S^2
        sigma = 300 * 2**-4 / math.sqrt(2)
        assert abs(ratio.mean().item() - 300) < 5 * sigma / math.sqrt(large.sum().item()), name
        assert torch.equal(got.values[name], again.values[name])


def test_only_the_scope_has_gradients_and_one_at_a_time():
    model = tiny.make("llama")
    names = [name for name in find_scope(model) if "up_proj" in name]
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    held = []

    def seen(module, arguments, output):  # the gradient of a layer's output is there before its weights' are
        output.register_hook(lambda grad: held.append(sum(p.grad is not None for p in model.parameters())))

    def loss(ids):
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)
        return loss_of(model)(ids)

    hooks = [layer.mlp.register_forward_hook(seen) for layer in model.model.layers]
    collected = collect_gradients(model, loss, tiny.batches(2), names=names)
    assert held == [0] * 4  # two layers, twice: each was freed before the layer below began
    for hook in hooks:
        hook.remove()
    assert set(collected.values) == set(names) and all(v.any() for v in collected.values.values())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not frozen.requires_grad and all(p.grad is None for p in model.parameters())
    loss_of(model)(tiny.batches(1)[0]).backward()  # the hooks are gone
    assert sum(p.grad is not None for p in model.parameters()) == sum(before.values())


@pytest.mark.parametrize("score", ["gradient", "fisher", "snip"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_masks(score, architecture, tmp_path):
    """Against a sort of scores from autograd; mixtral's experts lie on disk one by one."""
    model = tiny.make(architecture)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")
    batches = tiny.batches(2)
    kind = "squares" if score == "fisher" else "sum"
    collected = collect_gradients(model, loss_of(model), batches, kind=kind, meta={"task": "ids"})
    masks = lota.extract(tmp_path, sparsities=[0.5, 0.9], score=score, collected=collected)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(weights[name]) for name in find_scope(model)}
    for ids in batches:
        for name, grad in autograd(model, ids).items():
            total[name] += grad.square() if score == "fisher" else grad
    scores = {n: (g * weights[n] if score == "snip" else g).abs() for n, g in total.items()}
    for sparsity, mask in masks.items():
        k = kept_count(sparsity, mask.n_total)
        expected = sorted_masks(scores, k)
        differ = sum((mask.dense(n) != flags).sum().item() for n, flags in expected.items())
        assert differ <= 4  # the last digits of sums in another order
        assert mask.n_kept == k - mask.meta["shortfall"]
        assert mask.meta["data"] == {"batches": 2, "task": "ids"} and mask.meta["score"] == score


def test_coarse_sums_break_ties_by_position(tmp_path):
    model = tiny.make("llama")
    model.save_pretrained(tmp_path)
    values = {n: torch.randint(0, 4, t.shape).to(torch.bfloat16) for n, t in find_scope(model).items()}
    for smallest in (False, True):
        mask = lota.extract(
            tmp_path,
            sparsities=[0.8],
            score="gradient",
            collected=Collected(values, "sum"),
            smallest=smallest,
        )[0.8]
        ranked = {n: torch.where(v > 0, 9 - v, 0) if smallest else v for n, v in values.items()}
        assert_mask(mask, sorted_masks(ranked, kept_count(0.8, mask.n_total)))


def test_refusals(tmp_path):
    model = tiny.make("llama")
    model.save_pretrained(tmp_path)
    ids = tiny.batches(1)
    with pytest.raises(ValueError, match="no batches"):
        collect_gradients(model, loss_of(model), [])
    with pytest.raises(ValueError, match="choose one of sum, squares"):
        collect_gradients(model, loss_of(model), ids, kind="mean")
    with pytest.raises(ValueError, match=r"no parameter layers\.0.*nearest"):
        collect_gradients(model, loss_of(model), ids, names=["layers.0.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match="loss of batch 0 is nan"):
        collect_gradients(model, lambda batch: loss_of(model)(batch) * float("nan"), ids)
    collected = collect_gradients(model, loss_of(model), ids)
    with pytest.raises(ValueError, match=r"score=snip reads gradients.*collect_gradients"):
        lota.extract(tmp_path, score="snip")
    with pytest.raises(ValueError, match=r"are of kind='sum', but the saliency reads squares"):
        lota.extract(tmp_path, score="fisher", collected=collected)
    fewer = collect_gradients(model, loss_of(model), ids, names=list(find_scope(model))[1:])
    with pytest.raises(ValueError, match="nothing was collected"):
        lota.extract(tmp_path, score="snip", collected=fewer)
    name = next(iter(find_scope(model)))
    fewer.values[name] = torch.full_like(collected.values[name], float("inf"))
    with pytest.raises(ValueError, match=f"{name} of the collected gradients"):
        lota.extract(tmp_path, score="gradient", collected=fewer)
    loss_of(model)(ids[0]).backward()
    with pytest.raises(ValueError, match=r"holds a gradient already.*zero_grad"):
        collect_gradients(model, loss_of(model), ids)


MEMORY = """
import torch, transformers
from lota.masks.extract.gradients import collect_gradients
from lota.models.scope import find_scope

def model(hidden, layers):
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=64, tie_word_embeddings=True,
    )
    return transformers.AutoModelForCausalLM.from_config(config).train()

def collect(model, dtype):
    ids = torch.arange(8)[None]
    loss = lambda ids: model(input_ids=ids, labels=ids).loss
    return collect_gradients(model, loss, [ids] * 3, dtype=dtype)

collect(model(64, 2), torch.float32)  # imports, kernels
large = model(768, 8)
scope = [p for n, p in large.named_parameters() if n in find_scope(large)]
dtype = getattr(torch, sys.argv[1])
before = memory("VmHWM")
collect(large, dtype)
sums, largest = sum(p.numel() for p in scope) * dtype.itemsize, max(p.numel() for p in scope) * 4
print(sums, largest, memory("VmHWM") - before)
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_weights_sums_and_one_gradient(dtype):
    """190 MB of weights in the scope, in fp32: gradients of all, as autograd keeps them, would be as much."""
    exact = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }  # what is freed is given back at once
    sums, gradient, grown = printed(MEMORY, dtype, **exact)
    assert grown < sums + 2 * gradient + 24 * 2**20  # activations, workspaces of the kernels
