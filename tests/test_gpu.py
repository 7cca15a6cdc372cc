"""The same computations on a CUDA device: `pytest -m gpu`. Skipped where there is none."""

from __future__ import annotations

import contextlib
import copy

import pytest
import tiny
import torch

import lota
from lota.data.batches import Encoded
from lota.data.packed import pack
from lota.models import packed
from lota.models.packed import pack_attention
from lota.train.losses import response_logps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(model, mask, *, fused: bool, strategy: str = "even", dtype=torch.float32, device: str = "cuda"):
    model = copy.deepcopy(model).to(device, dtype)
    optimizer = lota.MaskedRMSprop(
        model, mask, lr=1e-3, eps=1e-3, weight_decay=0.1, grad_norm_strategy=strategy, max_grad_norm=0.02
    )
    if fused:
        lota.fuse_in_backward(optimizer)
    tiny.learn(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("strategy", ["even", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_deferred_and_frozen_entries_stay(architecture, strategy, dtype):
    model = tiny.make(architecture)
    mask = tiny.random_mask(model)
    fused, optimizer = train(model, mask, fused=True, strategy=strategy, dtype=dtype)
    deferred, _ = train(model, mask, fused=False, strategy=strategy, dtype=dtype)
    for a, b in zip(fused.parameters(), deferred.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert tiny.count_moved(fused, model.to(dtype), mask) > 0 and optimizer.grad_norm > 0


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_whole_lines_have_their_own_gradients(architecture, granularity):
    model = tiny.make(architecture)
    mask = tiny.line_mask(model, granularity)
    fused, _ = train(model, mask, fused=True)
    layers = [m for m in fused.modules() if "forward" in vars(m)]
    assert len(layers) >= 8
    stacks = [m for m in layers if hasattr(m, "gate_up_proj")]
    assert len(stacks) == (2 if architecture == "mixtral" else 0)
    deferred, _ = train(model, mask, fused=False)
    for a, b in zip(fused.parameters(), deferred.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sum", "squares"])
def test_gradients_are_summed_on_the_device(kind, tmp_path):
    model = tiny.make("llama")
    model.save_pretrained(tmp_path)
    collected = []
    for device in ("cpu", "cuda"):
        moved = copy.deepcopy(model).to(device)
        found = lota.collect_gradients(
            moved, lambda ids, m=moved: m(input_ids=ids, labels=ids).loss,
            [ids.to(device) for ids in tiny.batches(2)], kind=kind,
        )  # fmt: skip
        assert {value.device.type for value in found.values.values()} == {device}
        collected.append(found)
    score = "snip" if kind == "sum" else "fisher"
    masks = [lota.extract(tmp_path, sparsities=[0.9], score=score, collected=c)[0.9] for c in collected]
    assert masks[0].overlap(masks[1]) > 0.99 * masks[0].n_kept


def test_the_cpu_and_the_gpu_agree():
    model = tiny.make("llama")
    mask = tiny.random_mask(model)
    on_gpu, _ = train(model, mask, fused=True)
    on_cpu, _ = train(model, mask, fused=True, device="cpu")
    for a, b in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)


def test_state_is_restored_on_the_device(tmp_path):
    model = tiny.make("llama")
    _, optimizer = train(model, tiny.random_mask(model), fused=True, dtype=torch.bfloat16)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu"))
    tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    assert {t.device.type for t in tensors} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_entries_come_back_on_the_device(dtype):
    from lota.train.reference import starting_values, swapped

    start = tiny.make("llama").to("cuda", dtype)
    model, optimizer = train(start, tiny.random_mask(start), fused=True, dtype=dtype)
    now = {p: p.detach().clone() for p in model.parameters()}
    values = {p: torch.zeros_like(value) for p, value in starting_values(optimizer).items()}
    with swapped(optimizer, values):
        assert not any(torch.equal(p, now[p]) for p in optimizer.names)
    assert all(torch.equal(p, now[p]) for p in model.parameters())


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_cpu(dtype, trains):
    """Products of bf16 operands are summed in fp32 there too; gradients are rounded to bf16 at most twice."""
    from lota.models.head_logps import After, HeadLogProbs

    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(50, 32), torch.randn(301, 32), torch.randn(301)
    targets, upstream = torch.randint(0, 301, (50,)), torch.randn(50)
    found = []
    for device in ("cpu", "cuda"):
        given = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)]
        for x in given[1:]:
            x.requires_grad_(trains)
        logps = HeadLogProbs.apply(*given, targets.to(device), After(0.5, 20.0), dtype, True)
        wanted = [x for x in given if x.requires_grad]
        gradients = torch.autograd.grad(logps, wanted, upstream.to(device))
        found.append([logps.detach().cpu(), *(x.cpu().float() for x in gradients)])
    (logps_cpu, *cpu), (logps_gpu, *gpu) = found
    torch.testing.assert_close(logps_gpu, logps_cpu, rtol=1e-4, atol=1e-4)
    for a, b in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if dtype == torch.float32 else 2e-2, atol=2e-2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_packed_examples_are_what_they_are_alone(architecture, monkeypatch):
    """torch's variable-length attention, where it is there, against one example after the other."""
    model = tiny.make(architecture, dtype=torch.bfloat16).cuda()
    rows = [Encoded(tiny.batches(1, 1, n)[0][0].tolist(), 2) for n in (12, 5, 30, 3)]
    pack_attention(model.eval(), architecture)
    batch = pack(rows).to(torch.device("cuda"))

    def losses_and_gradient():
        model.zero_grad()
        logps = response_logps(model, batch, contextlib.nullcontext())[0]
        logps.sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    by_kernel = losses_and_gradient()
    monkeypatch.setattr(packed, "_kernel", lambda: None)
    for a, b in zip(by_kernel, losses_and_gradient(), strict=True):
        assert (a - b).norm() <= 0.03 * b.norm()


# Kernels (lota/optim/launches.py) against the plain path on the same device


@pytest.fixture
def without_kernels(monkeypatch):
    """A function that calls another one on the plain path."""
    from lota.optim import launches

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(launches, "DEVICES", set())
            return function(*arguments, **options)

    return call


@pytest.mark.parametrize("kind", ["entries", "row", "column", "block", "dense"])
@pytest.mark.parametrize("strategy", ["even", "global"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compute_what_the_plain_path_computes(kind, strategy, fused, dtype, without_kernels):
    """Masters are compared: fp32 values that both paths round alike."""
    model = tiny.make("llama")
    if kind == "entries":
        mask = tiny.random_mask(model)
    else:
        mask = None if kind == "dense" else tiny.line_mask(model, kind)
    got, optimizer = train(model, mask, fused=fused, strategy=strategy, dtype=dtype)
    assert all(optimizer._has_kernels(p) for p in optimizer.names)
    _, plain = without_kernels(train, model, mask, fused=fused, strategy=strategy, dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for (_, places, values), (_, others, wanted) in zip(
        optimizer.kept_values(), plain.kept_values(), strict=True
    ):
        assert places is None or torch.equal(places, others)
        torch.testing.assert_close(values, wanted, **close)
    assert optimizer.grad_norm == pytest.approx(plain.grad_norm, rel=1e-2)
    if mask is not None:
        assert tiny.count_moved(got, model.to(dtype), mask) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [16, 64, 128])
def test_blocks_in_one_launch(side, dtype, without_kernels):
    from lota.masks import Mask
    from lota.optim.kept import kept_entries
    from lota.optim.products import Tiled

    height, width, tokens = 5 * side, 6 * side + 8, 1000  # the last blocks are cut off
    grid = torch.rand(5, 7, generator=torch.manual_seed(0)) < 0.4
    grid[0] = torch.tensor([True, False, False, True, True, False, True])
    flags = grid.repeat_interleave(side, 0).repeat_interleave(side, 1)[:, :width].contiguous()
    product = Tiled(kept_entries(Mask.from_dense({"w": flags}), "w", torch.device("cuda")))
    a, b = (torch.randn(tokens, n, device="cuda").to(dtype) for n in (height, width))
    got, want = product(a, b), without_kernels(product, a, b)
    narrow = dtype != torch.float32  # the plain path rounds the product to it
    torch.testing.assert_close(got, want, rtol=1e-2 if narrow else 1e-4, atol=0.2 if narrow else 1e-3)


def test_updates_from_whole_gradients_of_a_large_weight(without_kernels):
    """More entries than all programs take at once, in one parameter."""
    from lota.masks import Mask

    shape = (4096, 2048)
    flags = torch.rand(shape, generator=torch.manual_seed(0)) < 0.5
    found = []
    for call in (lambda function: function(), without_kernels):

        def learn():
            generator = torch.Generator("cuda").manual_seed(1)
            p = torch.nn.Parameter(torch.randn(shape, device="cuda", generator=generator).bfloat16())
            optimizer = lota.MaskedAdamW([("w", p)], Mask.from_dense({"w": flags}), lr=1e-3, eps=1e-3)
            lota.fuse_in_backward(optimizer)
            for _ in range(3):
                (p.float() * torch.randn(shape, device="cuda", generator=generator)).sum().backward()
                optimizer.step()
            return p.detach(), optimizer.state[p]["master"], optimizer.grad_norm

        found.append(call(learn))
    (p, master, norm), (_, wanted, plain_norm) = found
    torch.testing.assert_close(master, wanted, rtol=1e-5, atol=1e-6)
    assert norm == pytest.approx(plain_norm, rel=1e-5)
    assert torch.equal(p[flags.cuda()], master.bfloat16())


# What the trainer adds


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_compiled_blocks_train_as_plain_ones(granularity):
    from lota.optim.compiled import compile_blocks

    start, found = tiny.make("llama"), []
    mask = tiny.random_mask(start) if granularity == "element" else tiny.line_mask(start, granularity)
    for is_compiled in (False, True):
        model = copy.deepcopy(start).to("cuda")
        optimizer = lota.MaskedRMSprop(model, mask, lr=1e-3, eps=1e-3)
        lota.fuse_in_backward(optimizer)
        if is_compiled:
            blocks = compile_blocks(model)
        tiny.learn(model, optimizer)
        found.append(list(model.parameters()))
    assert blocks.reason is None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("state", ["bfloat16", "factored"])
def test_calibration_in_little_memory_repeats_itself(state):
    """bf16 weights without masters, rounded by lot: the same lots each time, and it moves."""
    start, runs = tiny.make("llama").to("cuda", torch.bfloat16), []
    for _ in range(2):
        model = copy.deepcopy(start)
        options = {"masters": False, "stochastic_rounding": True, "optimizer_state": state}
        optimizer = lota.MaskedRMSprop(model, lr=1e-3, **options)
        lota.fuse_in_backward(optimizer)
        tiny.learn(model, optimizer)
        runs.append(list(model.parameters()))
    for a, b, before in zip(*runs, start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-4)  # sums on a GPU may change their order
        assert not torch.equal(a, before)
