"""Kernels against the plain path, in the interpreter of Triton on CPU tensors.

tests/test_kernels.py runs this file in a process of its own: Triton reads TRITON_INTERPRET when imported.
"""

from __future__ import annotations

import collections
import os

import numpy as np
import pytest
import torch
import triton.language as tl
from tolerance import assert_same, rounding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import lota
from lota.masks import Mask
from lota.optim import launches
from lota.optim.kept import Entries, Everything, Tiles, kept_entries
from lota.optim.products import Tiled

assert os.environ["TRITON_INTERPRET"] == "1"
CPU = torch.device("cpu")
RULES = {
    "RMSprop": (lota.MaskedRMSprop, {"eps": 1e-3, "weight_decay": 0.1}),
    "RMSprop with momentum": (lota.MaskedRMSprop, {"eps": 1e-3, "momentum": 0.9}),
    "AdamW": (lota.MaskedAdamW, {"eps": 1e-3, "weight_decay": 0.1}),
    "SGD": (lota.MaskedSGD, {"weight_decay": 0.1}),
    "SGD with momentum": (lota.MaskedSGD, {"momentum": 0.9, "weight_decay": 0.1}),
}
# Terms that a value of an update is made of; a norm of 10^4 entries adds its own rounding
TERMS = 100


def convert(data, source, target, rounding_mode):
    """What a GPU computes between fp32 and bf16. The interpreter of Triton 3.7 cuts bits off instead."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
    return as_it_is(data, source, target, rounding_mode)


def dot(builder, a, b, total, *options):
    """The interpreter multiplies the bits of bf16 as if they were integers."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (builder.cast_impl(x, tl.float32) for x in (a, b))
    return interpreter.TensorHandle(
        np.matmul(a.data, b.data, dtype=np.float32) + total.data, total.dtype.scalar
    )


as_it_is = interpreter._convert_float


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(launches, "DEVICES", {"cpu"})
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    assert launches.usable(CPU)  # which tries it once


def flags(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "entries":
        return torch.rand(shape, generator=generator) < 0.2
    if kind == "one entry":
        return torch.arange(torch.Size(shape).numel()).view(shape) == seed + 5
    if kind == "all":
        return torch.ones(shape, dtype=torch.bool)
    sides = {"rows": (1, shape[-1]), "columns": (shape[-2], 1), "blocks": (16, 32)}[kind]
    grid = [-(-length // side) for length, side in zip(shape[-2:], sides, strict=True)]
    kept = torch.rand(*shape[:-2], *grid, generator=generator) < 0.4
    kept[..., -1, -1] = kept[..., 0, 0] = True  # a whole tile, and one that is cut off
    kept = kept.repeat_interleave(sides[0], -2).repeat_interleave(sides[1], -1)
    return kept[..., : shape[-2], : shape[-1]].contiguous()


SHAPES = [(70, 50), (2, 40, 35), (17, 19)]  # the last one is kept whole, and less than a program takes
KINDS = {"entries": Entries, "one entry": Entries, "rows": Tiles, "columns": Tiles, "blocks": Tiles}


class Case:
    """Parameters with a loss whose gradient is known, and a mask over them."""

    def __init__(self, kind: str, dtype: torch.dtype, shapes=SHAPES):
        generator = torch.Generator().manual_seed(1)
        self.start = {f"p{i}": torch.randn(s, generator=generator).to(dtype) for i, s in enumerate(shapes)}
        self.mask = None
        if kind != "dense":
            kinds = [kind] * (len(shapes) - 1) + ["all"]
            self.mask = Mask.from_dense(
                {f"p{i}": flags(k, s, i) for i, (k, s) in enumerate(zip(kinds, shapes, strict=True))}
            )
        self.slopes = [
            {name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in self.start.items()}
            for _ in range(3)
        ]

    def run(self, rule: str, *, kernels: bool, fused=True, accumulation=1, strategy="even", change=False):
        """Three passes; the parameters and the optimizer afterwards."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "DEVICES", {"cpu"} if kernels else set())
            parameters = {name: nn.Parameter(p.clone()) for name, p in self.start.items()}
            optimizer_class, settings = RULES[rule]
            optimizer = optimizer_class(
                parameters.items(),
                self.mask,
                lr=0.01,
                grad_norm_strategy=strategy,
                max_grad_norm=3.0,
                **settings,
            )
            if fused:
                lota.fuse_in_backward(optimizer, accumulation)
            for number, slopes in enumerate(self.slopes):
                sum((p * slopes[name]).sum() for name, p in parameters.items()).backward()
                if (number + 1) % accumulation == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                if change and number == 1:  # as a moving average would
                    with torch.no_grad():
                        for p in parameters.values():
                            p.view(-1)[::3] *= 0.5
                for group in optimizer.param_groups:
                    group["lr"] *= 0.9
        return parameters, optimizer

    def assert_same(self, rule: str, **options) -> None:
        want, plain = self.run(rule, kernels=False, **options)
        got, optimizer = self.run(rule, kernels=True, **options)
        assert optimizer.grad_norm == pytest.approx(plain.grad_norm, rel=rounding(torch.float32, 10_000))
        for name, p in got.items():
            mine, other = optimizer.state[p], plain.state[want[name]]
            assert mine.keys() == other.keys() and mine["step"] == other["step"]
            for key, value in other.items():
                if torch.is_tensor(value):
                    assert_same(mine[key].float(), value.float(), terms=TERMS, dtype=torch.float32, name=key)
            exact = optimizer.exact_values(p)
            assert_same(exact, plain.exact_values(want[name]), terms=TERMS, dtype=torch.float32, name=name)
            assert torch.equal(optimizer.working_values(p), exact.to(p.dtype))
            if self.mask is not None and not options.get("change"):  # frozen entries keep their bits
                frozen = ~self.mask.dense(name)
                assert torch.equal(p.detach()[frozen], self.start[name][frozen])
            assert not torch.equal(p.detach(), self.start[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["even", "global"])
def test_every_rule(rule, dtype, strategy):
    Case("entries", dtype).assert_same(rule, strategy=strategy)


@pytest.mark.parametrize("kind", [*KINDS, "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "deferred"])
def test_every_kind_of_kept_entries(kind, dtype, fused):
    case = Case(kind, dtype)
    case.assert_same("RMSprop", fused=fused)
    if case.mask is not None:
        kept = [kept_entries(case.mask, name, CPU) for name in case.mask.names]
        assert {type(k) for k in kept} >= {KINDS[kind], Everything}
        assert kind != "blocks" or max(len(k.stretches) for k in kept) > 1  # some tiles are cut off


@pytest.mark.parametrize("strategy", ["even", "proportional", "global", "none"])
@pytest.mark.parametrize("options", [{"accumulation": 2}, {"fused": False}], ids=str)
@pytest.mark.parametrize("kind", ["entries", "dense"])
def test_every_way_to_clip_and_to_accumulate(strategy, options, kind):
    Case(kind, torch.bfloat16).assert_same("AdamW", strategy=strategy, **options)


@pytest.mark.parametrize("kind", ["entries", "blocks", "dense"])
def test_an_entry_that_somebody_changed_becomes_its_master(kind):
    Case(kind, torch.bfloat16).assert_same("RMSprop", change=True)


def test_many_blocks_of_entries_per_program(monkeypatch):
    """Entries beyond what all programs take at once, and a last part that is not full."""
    kernels = launches._kernels()
    monkeypatch.setattr(kernels, "BLOCK", 256)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    for kind in ("entries", "blocks", "dense"):
        Case(kind, torch.float16, [(70, 51), (17, 19)]).assert_same("RMSprop", strategy="global")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("strategy", ["even", "none"])
def test_gradients_that_are_not_finite(value, strategy):
    case = Case("entries", torch.float32)
    case.slopes[2]["p0"].fill_(value)
    want, _ = case.run("SGD", kernels=False, strategy=strategy)
    got, _ = case.run("SGD", kernels=True, strategy=strategy)
    for name, p in got.items():
        torch.testing.assert_close(p, want[name], equal_nan=True)
    assert not got["p0"].isfinite().all() and got["p1"].isfinite().all()


def test_positions_beyond_int32():
    """A weight of more than 2^31 entries, of which the pages of four are touched."""
    size = 2**31 + 10
    places = [3, 2**31 - 1, 2**31, size - 1]
    kept = Entries(torch.tensor(places), size, CPU)
    assert kept.long and not Entries(torch.tensor([5]), 2**31 - 1 - 2**22, CPU).long
    whole = torch.empty(size, dtype=torch.bfloat16)
    for number, place in enumerate(places):
        whole[place] = number + 1
    (compact,), squares = launches.gather([kept], [whole])
    assert compact.tolist() == [1, 2, 3, 4] and squares.tolist() == [30]
    p = nn.Parameter(whole, requires_grad=False)
    state = {"master": compact.clone(), **kept.state}
    rule = launches.Rule("SGD", (), (0.5, 0.0, 0.0))
    assert launches.serves(p, kept, state)
    launches.update([launches.Update(p, kept, state, compact, rule, float("inf"))], squares)
    assert [p[place].item() for place in places] == state["master"].tolist() == [0.5, 1, 1.5, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape, tile",
    [((96, 160), (16, 16)), ((70, 101), (16, 32)), ((300, 520), (128, 256)), ((60, 90), (20, 17))],
    ids=str,
)
def test_products_of_blocks(dtype, shape, tile, monkeypatch):
    generator = torch.manual_seed(0)
    grid = torch.rand(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]), generator=generator) < 0.4
    grid[0, 1] = grid[-1, -1] = True
    grid[0, 0] = False
    kept = grid.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: shape[0], : shape[1]]
    tiles = kept_entries(Mask.from_dense({"w": kept.contiguous()}), "w", CPU)
    assert isinstance(tiles, Tiles)
    tokens = 75  # no multiple of what a program takes at a time
    a, b = (torch.randn(tokens, side, generator=generator).to(dtype) for side in shape)
    want = (a.double().t() @ b.double()).flatten()[tiles.positions()]
    started = collections.Counter()
    launch = launches._launch

    def counted(kernel, *arguments, **constants):
        started[kernel] += 1
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(launches, "_launch", counted)
    product = Tiled(tiles)
    got = product(a, b)
    assert got.dtype == torch.float32 and list(started.values()) == [1]
    assert_same(got, want.float(), terms=tokens)
    across = b.t().contiguous().t()  # other strides
    assert_same(product(a, across), want.float(), terms=tokens)
    # of the columns alone that tiles cover
    needed = product.needed(1)
    assert len(needed) < shape[1] or grid.any(0).all()
    assert_same(product.narrowed(1, needed)(a, b[:, needed]), want.float(), terms=tokens)


class Counted(TorchDispatchMode):
    """Counts what would run on the device: torch's operations that compute, and kernels, which do not run."""

    VIEWS = ("empty", "view", "detach", "alias", "select", "slice", "split", "reshape", "unsqueeze", "t")

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.kernels = 0, 0

        def counted(*arguments, **constants):
            self.kernels += 1

        monkeypatch.setattr(launches, "_launch", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += not name.startswith(self.VIEWS)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "strategy, fused, accumulation, kind",
    [
        ("global", True, 1, "entries"),
        ("global", False, 1, "blocks"),
        ("even", True, 1, "entries"),
        ("even", True, 2, "dense"),
        ("even", False, 1, "entries"),
    ],
)
def test_after_backward_launches_do_not_depend_on_the_number_of_parameters(
    strategy, fused, accumulation, kind, monkeypatch
):
    counts = {}
    for n in (10, 100):
        names = [f"p{i}" for i in range(n)]
        parameters = {name: nn.Parameter(torch.randn(20, 35)) for name in names}
        mask = None
        if kind != "dense":
            mask = Mask.from_dense({name: flags(kind, (20, 35), i) for i, name in enumerate(names)})
        optimizer = lota.MaskedRMSprop(
            parameters.items(), mask, grad_norm_strategy=strategy, max_grad_norm=1.0
        )
        if fused:
            lota.fuse_in_backward(optimizer, accumulation)
        for kept in optimizer.kept.values():
            assert kept.stretches  # found out once
        mode = Counted(monkeypatch)
        sum(p.square().sum() for p in parameters.values()).backward()  # a last batch that is short
        mode.kernels = 0
        launches._on_device.cache_clear()  # every table is uploaded
        with mode as counted:
            optimizer.step()
        waits = strategy == "global" or accumulation > 1 or not fused
        assert (counted.kernels > 0) == waits
        assert counted.kernels <= 5  # blocks: a few parameters keep all
        counts[n] = counted.count, counted.kernels
    assert counts[10] == counts[100]


def test_kernels_per_parameter_during_backward(monkeypatch):
    """Gather and measure, update; between them is one sum."""
    case = Case("entries", torch.bfloat16)
    parameters = {name: nn.Parameter(p.clone()) for name, p in case.start.items()}
    optimizer = lota.MaskedRMSprop(
        parameters.items(), case.mask, grad_norm_strategy="even", max_grad_norm=1.0
    )
    lota.fuse_in_backward(optimizer)
    with Counted(monkeypatch) as counted:
        sum(p.sum() for p in parameters.values()).backward()
    assert counted.kernels == 2 * len(parameters)


# Who takes the plain path


class OwnRule(lota.MaskedSGD):
    def _update(self, values, grad, state, group):
        values.add_(grad, alpha=group["lr"])


def test_what_kernels_do_not_know_takes_the_plain_path(monkeypatch):
    case = Case("entries", torch.bfloat16)

    def served(optimizer_class=lota.MaskedRMSprop, change=lambda p, state: None, dtype=torch.bfloat16):
        p = nn.Parameter(case.start["p0"].to(dtype))
        optimizer = optimizer_class([("p0", p)], Mask.from_dense({"p0": case.mask.dense("p0")}))
        change(p, optimizer.state[p])
        return optimizer._has_kernels(p)

    def narrow(p, state):
        state["square_avg"] = state["square_avg"].bfloat16()

    def without_master(p, state):
        del state["master"]

    def cast(p, state):
        p.data = p.data.float()

    def strided(p, state):
        p.data = p.data.t().contiguous().t()

    assert served()
    assert not served(dtype=torch.float64)
    assert not any(served(change=change) for change in (narrow, without_master, cast, strided))
    assert served(lota.MaskedSGD) and not served(OwnRule)
    monkeypatch.setattr(launches, "DEVICES", {"cuda"})
    assert not served()


def test_a_device_on_which_triton_fails_takes_the_plain_path(monkeypatch, caplog):
    launches._works.cache_clear()

    def broken(*arguments, **constants):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(launches, "_launch", broken)
    try:
        assert not launches.usable(CPU) and "no C compiler" in caplog.text
        case = Case("entries", torch.bfloat16)
        want, _ = case.run("RMSprop", kernels=False)
        got, _ = case.run("RMSprop", kernels=True)
        assert all(torch.equal(got[name], want[name]) for name in want)
        launches._works.cache_clear()
        monkeypatch.setattr(launches.importlib.util, "find_spec", lambda name: None)
        assert not launches.usable(CPU)
    finally:
        launches._works.cache_clear()
