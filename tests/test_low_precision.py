"""Weights without masters, and optimizer state below fp32: what they compute, hold and warn of."""

from __future__ import annotations

import copy
import math
import re
import warnings

import pytest
import tiny
import torch
from memory import needs_proc, printed
from torch import nn

import lota
from lota import rounding
from lota.masks import Mask
from lota.models.scope import find_scope
from lota.optim.low_precision import SwallowedUpdatesWarning
from lota.optim.optimizers import OPTIMIZERS

BF16 = torch.bfloat16
SR = {"stochastic_rounding": True}
RULES = {  # with an eps of the size of the gradients: rounding of state and gradient stays in proportion
    "RMSprop": {"lr": 1e-4, "alpha": 0.9, "eps": 0.3, "weight_decay": 0.01},
    "RMSprop with momentum": {"lr": 1e-4, "alpha": 0.9, "eps": 0.3, "momentum": 0.5},
    "AdamW": {"lr": 1e-4, "betas": (0.8, 0.95), "eps": 0.3, "weight_decay": 0.1},
    "SGD": {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.01},
}


def optimizer_of(rule: str, p: nn.Parameter, mask: Mask | None = None, **options) -> lota.MaskedRMSprop:
    return OPTIMIZERS[rule.split()[0]]([("w", p)], mask, **RULES[rule], **options)


def parameter(shape: tuple[int, ...], dtype: torch.dtype = BF16) -> nn.Parameter:
    """Values of 0.5 to 1, where bf16 is 2^-8 apart: far more than a step."""
    values = 0.55 + 0.4 * torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(values.to(dtype))


def gradients(shape: tuple[int, ...], n: int, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    """Of about 1, so that all entries go down: what is lost does not cancel."""
    generator = torch.Generator().manual_seed(1)
    return [(0.5 + torch.rand(shape, generator=generator)).to(dtype) for _ in range(n)]


def steps(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[torch.Tensor]) -> None:
    for grad in grads:
        p.grad = grad.to(p.dtype)
        optimizer.step()
        p.grad = None


# What they compute


@pytest.mark.parametrize("rule", RULES)
def test_bf16_weights_and_state_follow_fp64(rule):
    """100 steps of a fortieth of bf16's last place: the mean over the entries goes as far as fp64's does."""
    shape, n = (64, 128), 100
    p = parameter(shape)
    start, exact = p.detach().double(), nn.Parameter(p.detach().double())
    steps(optimizer_of(rule, p, **SR, optimizer_state="bfloat16"), p, gradients(shape, n))
    theirs = getattr(torch.optim, rule.split()[0])([exact], foreach=False, **RULES[rule])
    steps(theirs, exact, gradients(shape, n))
    moved, wanted = p.detach().double() - start, exact.detach() - start
    assert wanted.max() < -2 * 2**-9  # further than half of the last place, in steps of a tenth of that
    assert (wanted / n).abs().max() < 2**-9 / 2
    # each step goes down by 2^-8 in a share s of the entries: variance s (1 - s) 2^-16 < |step| 2^-8
    sigma = math.sqrt(wanted.abs().max().item() * 2**-8)
    assert (moved - wanted).abs().max() < 7 * sigma
    # the averages, rounded by lot, are right on average; what is nonlinear in their noise is of second order
    assert moved.mean().item() == pytest.approx(
        wanted.mean().item(), abs=5 * sigma / 64 / math.sqrt(2), rel=1e-3
    )
    nearest = parameter(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SwallowedUpdatesWarning)
        steps(optimizer_of(rule, nearest, masters=False), nearest, gradients(shape, n))
    assert torch.equal(nearest.detach().double(), start)  # to the nearest value nothing moves


@pytest.mark.parametrize(("rule", "key"), [("RMSprop", "square_avg"), ("AdamW", "exp_avg_sq")])
def test_a_bf16_square_average_arrives(rule, key):
    """Gradients of 1 bring the average to 1 - decay^n. To the nearest value it stops where a hundredth of
    what is missing is below half of bf16's last place: at 0.72 to 0.83 for a decay of 0.99.
    """
    p = parameter((64, 128), torch.float32)
    decay = {"RMSprop": {"alpha": 0.99}, "AdamW": {"betas": (0.9, 0.99)}}[rule]
    optimizer = OPTIMIZERS[rule]([("w", p)], lr=1e-6, optimizer_state="bfloat16", **decay)
    steps(optimizer, p, [torch.ones(64, 128)] * 600)
    average = optimizer.state[p][key]
    assert average.dtype == BF16
    nearest = torch.zeros((), dtype=BF16)
    for _ in range(600):
        nearest = (0.99 * nearest.float() + 0.01).bfloat16()
    assert nearest < 0.84
    assert average.double().mean().item() == pytest.approx(1 - 0.99**600, rel=2e-3)


@pytest.mark.parametrize("shape", [(48, 20), (3, 16, 40)])
def test_the_factored_average_is_adafactors(shape, monkeypatch):
    """After one step torch.optim.Adafactor holds the means of the squared gradient, where ours holds them
    times 1 - decay; the step goes by R C^T / mean(R).
    """
    monkeypatch.setattr(rounding, "CPU_PIECE", 130)  # some rows at a time
    p, theirs = parameter(shape, torch.float32), parameter(shape, torch.float32)
    (grad,) = gradients(shape, 1, torch.float32)
    grad = grad * torch.linspace(0.01, 3, shape[-1]) * torch.linspace(1, 9, shape[-2])[:, None]
    start = p.detach().double()
    optimizer = lota.MaskedRMSprop([("w", p)], lr=0.1, alpha=0.75, eps=1e-8, optimizer_state="factored")
    adafactor = torch.optim.Adafactor([theirs])
    steps(optimizer, p, [grad])
    steps(adafactor, theirs, [grad])
    rows, columns = (adafactor.state[theirs][key].double() for key in ("row_var", "col_var"))
    ours = optimizer.state[p]
    torch.testing.assert_close(
        ours["square_avg_rows"].double() * 4, rows.view(-1, shape[-2]), rtol=1e-5, atol=0
    )
    found = ours["square_avg_columns"].double() * 4
    torch.testing.assert_close(found, columns.view(-1, shape[-1]), rtol=1e-5, atol=0)
    average = rows @ columns / rows.mean(-2, keepdim=True) / 4
    expected = start - 0.1 * grad.double() / (average.sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", ["RMSprop", "RMSprop with momentum", "AdamW"])
def test_the_rules_with_a_factored_average(rule):
    """Three steps written out in fp64, clipping and weight decay included."""
    shape, settings = (24, 40), RULES[rule] | {"weight_decay": 0.1, "lr": 1e-2}
    p = parameter(shape, torch.float32)
    grads = gradients(shape, 3, torch.float32)
    clip = {"grad_norm_strategy": "even", "max_grad_norm": 20.0}
    kind = OPTIMIZERS[rule.split()[0]]
    optimizer = kind([("w", p)], **settings, **clip, optimizer_state="factored")
    w, m = p.detach().double(), torch.zeros(shape, dtype=torch.float64)
    rows, columns = torch.zeros(24, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    adamw = rule == "AdamW"
    decay = settings["betas"][1] if adamw else settings["alpha"]
    for step, grad in enumerate(grads, 1):
        g = grad.double()
        assert g.norm() > 20
        g = g * 20 / (g.norm() + 1e-6)
        if adamw:
            w = w * (1 - settings["lr"] * 0.1)
        else:
            g = g + 0.1 * w
        rows = decay * rows + (1 - decay) * (g**2).mean(1)
        columns = decay * columns + (1 - decay) * (g**2).mean(0)
        v = torch.outer(rows, columns) / rows.mean()
        if adamw:
            m = 0.8 * m + 0.2 * g
            w = w - settings["lr"] * m / (1 - 0.8**step) / ((v / (1 - decay**step)).sqrt() + settings["eps"])
        else:
            m = settings.get("momentum", 0) * m + g / (v.sqrt() + settings["eps"])
            w = w - settings["lr"] * m
    steps(optimizer, p, grads)
    # other buffers are bf16: momentum is off by 2^-8 of itself at most, each step
    slack = 3 * settings["lr"] * 2**-8 * m.abs().max().item() if adamw or "momentum" in settings else 0
    assert (p.detach().double() - w).abs().max().item() <= 1e-6 + 2 * slack
    assert (p.detach().double() - parameter(shape, torch.float32).double()).abs().min() > 10 * slack + 1e-3


def test_vectors_and_thin_matrices_are_not_factored():
    """Row and column means of a matrix of one row are more than the matrix."""
    for shape in ((40,), (1, 40), (7, 1, 4), (2, 2)):
        p = parameter(shape, torch.float32)
        optimizer = lota.MaskedRMSprop([("w", p)], optimizer_state="factored")
        assert optimizer.state[p]["square_avg"].dtype == torch.float32
        assert optimizer.state_bytes() == 4 * p.numel()
        steps(optimizer, p, gradients(shape, 1, torch.float32))


@pytest.mark.parametrize("state", ["bfloat16", "factored"])
def test_a_parameter_without_a_gradient_for_a_while_stays_finite(state):
    """Rows of an embedding that no token of the batch has, or a whole gradient of zeros."""
    p = parameter((8, 16))
    optimizer = lota.MaskedRMSprop([("w", p)], lr=1e-2, eps=1e-20, **SR, optimizer_state=state)
    before = p.detach().clone()
    steps(optimizer, p, [torch.zeros(8, 16)] * 2)
    assert torch.equal(p.detach(), before)
    one_row = torch.zeros(8, 16)
    one_row[3] = 1e-12  # whose squares' product is below what fp32 holds
    steps(optimizer, p, [one_row] * 2)
    moved = (p.detach() != before).any(1)
    assert moved.tolist() == [i == 3 for i in range(8)]


# Lots


def run(rule: str, state: str, seed: int = 0, name: str = "w", n: int = 4) -> tuple[nn.Parameter, dict]:
    p = parameter((40, 30))
    optimizer = OPTIMIZERS[rule.split()[0]](
        [(name, p)], None, **RULES[rule], **SR, optimizer_state=state, seed=seed
    )
    steps(optimizer, p, gradients((40, 30), n))
    return p, optimizer.state_dict()


@pytest.mark.parametrize("rule", RULES)
def test_lots_are_a_function_of_seed_name_step_and_position(rule, monkeypatch):
    state = "bfloat16"
    one, state_one = run(rule, state)
    torch.manual_seed(99)  # nothing is drawn from torch's generators
    again, state_again = run(rule, state)
    assert torch.equal(one, again) and tiny.same_state(state_one, state_again)
    monkeypatch.setattr(rounding, "CPU_PIECE", 64)
    cut, state_cut = run(rule, state)
    assert torch.equal(one, cut) and tiny.same_state(state_one, state_cut)
    assert not torch.equal(one, run(rule, state, seed=1)[0])
    assert not torch.equal(one, run(rule, state, name="v")[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state", ["bfloat16", "factored"])
def test_continued_from_a_checkpoint_bit_for_bit(rule, state, tmp_path):
    if rule == "SGD" and state == "factored":
        return
    whole, expected = run(rule, state, n=6)
    p, saved = run(rule, state, n=3)
    torch.save(saved, tmp_path / "state.pt")
    optimizer = optimizer_of(rule, p, **SR, optimizer_state=state)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(optimizer, p, gradients((40, 30), 6)[3:])
    assert torch.equal(p, whole) and tiny.same_state(optimizer.state_dict(), expected)


def test_state_of_another_precision_is_refused():
    p = parameter((8, 16))
    states = {
        name: lota.MaskedRMSprop([("w", p)], **options)
        for name, options in {
            "masters": {},
            "bare": SR,
            "bfloat16": SR | {"optimizer_state": "bfloat16"},
            "factored": SR | {"optimizer_state": "factored"},
        }.items()
    }
    for name, optimizer in states.items():
        for other, source in states.items():
            if name != other:
                with pytest.raises(ValueError, match="optimizer state of w"):
                    optimizer.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="another optimizer_state"):
        states["bare"].load_state_dict(states["bfloat16"].state_dict())


# Models and masks


@pytest.mark.parametrize("strategy", ["even", "global"])
@pytest.mark.parametrize("kind", ["scattered", "block", "dense"])
@pytest.mark.parametrize("rule", ["RMSprop", "AdamW"])
def test_masks_fused_and_deferred(rule, kind, strategy):
    model = tiny.make("llama", dtype=BF16)
    mask = {
        "scattered": tiny.random_mask,
        "block": lambda m: tiny.line_mask(m, "block"),
        "dense": lambda m: None,
    }[kind](model)
    trained = []
    for fused in (False, True):
        mine = copy.deepcopy(model)
        optimizer = OPTIMIZERS[rule](
            mine,
            mask,
            lr=1e-3,
            **SR,
            optimizer_state="bfloat16",
            grad_norm_strategy=strategy,
            max_grad_norm=0.1,
        )
        if fused:
            lota.fuse_in_backward(optimizer, compact_linear=False)
        tiny.learn(mine, optimizer)
        trained.append(mine)
        n = optimizer.n_trained
        buffers = 1 if rule == "RMSprop" else 2
        assert sum(
            v.nbytes for s in optimizer.state.values() for k, v in s.items() if k.startswith(("sq", "exp"))
        ) == (2 * buffers * n)
        assert not any("master" in state for state in optimizer.state.values())
        if mask is not None:
            assert tiny.count_moved(mine, model, mask) > 0.2 * n
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in trained), strict=True))


def test_masters_with_bf16_state():
    """Weights as exact as with fp32 state, but for the noise of the average."""
    p, exact = parameter((40, 50)), parameter((40, 50), torch.float64)
    mask = Mask.from_dense({"w": torch.rand(40, 50) < 0.3})
    optimizer = optimizer_of("RMSprop", p, mask, optimizer_state="bfloat16")
    exact.data.copy_(p.detach())
    steps(optimizer, p, gradients((40, 50), 20))
    steps(torch.optim.RMSprop([exact], foreach=False, **RULES["RMSprop"]), exact, gradients((40, 50), 20))
    ((_, positions, values),) = optimizer.kept_values()
    assert values.dtype == torch.float32
    moved = 20 * 1e-4 * 1.5
    assert (values.double() - exact.detach().view(-1)[positions.long()]).abs().max() < moved * 2**-7
    assert optimizer.state_bytes() == (4 + 4 + 2) * mask.n_kept


def test_accumulated_gradients_are_summed_in_fp32():
    """1 + 2^-9, 256 times: in bf16 each term but the first would be lost."""
    p = parameter((16, 16))
    optimizer = lota.MaskedSGD([("w", p)], lr=1.0, **SR)
    lota.fuse_in_backward(optimizer, 256)
    start = p.detach().double()
    for factor in [1.0] + [2**-9] * 255:
        (p * factor).sum().backward()
    moved = start - p.detach().double()
    assert moved.mean().item() == pytest.approx(1 + 255 * 2**-9, abs=5 * 2**-8 / 16)


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_of_a_caller_stays_as_it_was(fused):
    for dtype in (BF16, torch.float32):
        p = parameter((16, 16), dtype)
        optimizer = lota.MaskedRMSprop(
            [("w", p)], lr=0.1, optimizer_state="bfloat16", grad_norm_strategy="even", max_grad_norm=0.1
        )
        grad = torch.ones_like(p)
        p.grad = grad
        optimizer.step()
        assert torch.equal(grad, torch.ones_like(p))


# Memory


def test_bytes_per_entry():
    p = parameter((256, 512))
    for options, wanted in (
        ({}, (4 + 4) * p.numel()),
        (SR, 4 * p.numel()),
        (SR | {"optimizer_state": "bfloat16"}, 2 * p.numel()),
        (SR | {"optimizer_state": "factored"}, 4 * (256 + 512)),
    ):
        optimizer = lota.MaskedRMSprop([("w", p)], **options)
        steps(optimizer, p, gradients((256, 512), 1))
        assert optimizer.state_bytes() == wanted
    adamw = lota.MaskedAdamW([("w", p)], **SR, optimizer_state="factored")
    assert adamw.state_bytes() == 2 * p.numel() + 4 * (256 + 512)


def test_weights_and_state_of_8b():
    """Llama 3's shape on the meta device: 14.96 GiB of weights, as much again of a bf16 average."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(BF16)
    n = sum(p.numel() for p in model.parameters())
    assert n == 8_030_261_248
    for state, gib in (("bfloat16", 14.96), ("factored", 0.01174)):
        optimizer = lota.MaskedRMSprop(model, **SR, optimizer_state=state)
        assert optimizer.state_bytes() / 2**30 == pytest.approx(gib, rel=1e-3)
    assert lota.MaskedRMSprop(model).state_bytes() == 8 * n  # masters and an fp32 average: 59.8 GiB


UPDATE = """
import torch, lota
state = sys.argv[1]
p = torch.nn.Parameter(torch.ones(16384, 2048, dtype=torch.bfloat16))  # 64 MiB
options = {"stochastic_rounding": True, "optimizer_state": state}
small = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
for q in (small, p):
    optimizer = lota.MaskedRMSprop(
        [("w", q)], lr=1e-3, grad_norm_strategy="even", max_grad_norm=10.0, **options
    )
    lota.fuse_in_backward(optimizer)
    q.grad = torch.ones_like(q)
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    optimizer.receive(q)
print(memory("VmHWM") - before)
"""


@needs_proc
@pytest.mark.parametrize("state", ["bfloat16", "factored"])
def test_an_update_takes_a_piece_beside_the_gradient(state):
    """32M entries in bf16: one fp32 tensor of them is 128 MiB, the gradient itself 64, a piece 1."""
    (above,) = printed(UPDATE, state, OMP_NUM_THREADS="1")
    assert above < 24 * 2**20 + (64 * 2**20 if state == "bfloat16" else 0)  # state's pages are touched now


# Refused


@pytest.mark.parametrize(
    ("rule", "dtype", "options", "message"),
    [
        ("RMSprop", BF16, {"optimizer_state": "int8"}, "optimizer_state='int8': choose one of float32"),
        ("SGD", BF16, {"optimizer_state": "factored"}, "has no square average; choose 'bfloat16'"),
        ("RMSprop", torch.float32, SR, "no parameter that trains is bfloat16"),
        ("RMSprop", torch.float16, SR, "there are float16 parameters"),
    ],
)
def test_settings_that_cannot_be_had(rule, dtype, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer_of(rule, parameter((4, 8), dtype), **options)


def test_a_factored_average_needs_whole_matrices():
    model = tiny.make("llama", dtype=BF16)
    with pytest.raises(ValueError, match=r"needs whole matrices, and the mask keeps .* entries of model"):
        lota.MaskedRMSprop(model, tiny.random_mask(model), optimizer_state="factored")
    whole = Mask.from_dense({n: torch.ones(t.shape, dtype=torch.bool) for n, t in find_scope(model).items()})
    lota.MaskedRMSprop(model, whole, optimizer_state="factored")


def test_a_cast_after_construction_is_told():
    p = parameter((4, 8))
    optimizer = lota.MaskedRMSprop([("w", p)], **SR)
    p.data = p.data.float()
    with pytest.raises(RuntimeError, match=r"w has become torch\.float32"):
        steps(optimizer, p, gradients((4, 8), 1, torch.float32))


# The warning


def half_swallowed(dtype: torch.dtype, **options) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """Steps of 1e-3: 40 entries of 1 lose them, 20 of 2^-10 do not, and 40 have no gradient."""
    p = nn.Parameter(torch.tensor([1.0] * 40 + [2**-10] * 20 + [1.0] * 40, dtype=dtype))
    return p, lota.MaskedSGD([("w", p)], lr=1e-3, **options)


GRADIENT = torch.tensor([1.0] * 60 + [0.0] * 40)


@pytest.mark.parametrize("fused", [False, True])
def test_swallowed_updates_are_told_once_with_their_share(fused):
    p, optimizer = half_swallowed(BF16, masters=False)
    if fused:
        lota.fuse_in_backward(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(30):
            (p * GRADIENT).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert len(caught) == (step >= 9)
    (warning,) = caught
    assert warning.category is lota.SwallowedUpdatesWarning
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith("66.7% of the updates of the first 10 steps, lr=0.001, were lost")
    assert "masters=True" in text and "stochastic_rounding=True" in text
    assert p[0] == 1.0  # it is true


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(BF16, {}), (BF16, SR), (torch.float32, {"masters": False}), (torch.float16, {"masters": False})],
)
def test_no_warning_where_nothing_is_lost(dtype, options):
    """fp16 has three bits more: a step of 1e-3 is two of its last places."""
    p, optimizer = half_swallowed(dtype, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizer, p, [GRADIENT] * 12)
