"""Contestants for single operations on a GPU: the update of a scattered mask, the gradient of blocks.

A part of benchmarks/gpu.py; times are those of one weight of the MLP of the shape, in bf16.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lota
from benchmarks.step import SHAPES, synchronize
from lota.masks import Mask
from lota.optim import launches
from lota.optim.kept import Tiles, kept_entries
from lota.optim.products import Tiled

TOKENS = 4096
Contestants = dict[str, Callable[[], object]]


def milliseconds(call: Callable[[], object], device: str, rounds: int = 10) -> float:
    """Median of several calls, the device idle before each, after two to warm up."""
    seconds = []
    for number in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def compare(contestants: Contestants, device: str) -> dict[str, float | str]:
    """Milliseconds of each, or what went wrong."""
    found: dict[str, float | str] = {}
    for name, call in contestants.items():
        try:
            found[name] = milliseconds(call, device)
        except Exception as error:  # of this contestant alone
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


# The update of a scattered mask


def pure_update(
    whole: Tensor, positions: Tensor, p: Tensor, master: Tensor, square_avg: Tensor, lr: Tensor
) -> None:
    """Gather, clip, RMSprop, write back as one pure function of tensors, for torch.compile."""
    grad = whole.view(-1).index_select(0, positions).float()
    grad = grad * (10.0 / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)
    values = p.view(-1).index_select(0, positions)
    master.copy_(torch.where(master.to(p.dtype) != values, values.float(), master))
    square_avg.mul_(0.99).addcmul_(grad, grad, value=0.01)
    master.sub_(lr * grad / (square_avg.sqrt() + 1e-8))
    p.view(-1).scatter_(0, positions.long(), master.to(p.dtype))


def updates(shape: tuple[int, int], sparsity: float, device: str) -> dict[str, float | str]:
    """One parameter's update from its whole gradient."""
    numel = shape[0] * shape[1]
    stride = round(1 / (1 - sparsity))
    positions = torch.arange(0, numel, stride)
    mask = Mask.from_positions({"w": positions}, {"w": shape})
    p = nn.Parameter(torch.randn(shape, device=device).bfloat16())
    optimizer = lota.MaskedRMSprop([("w", p)], mask, lr=1e-5, grad_norm_strategy="even", max_grad_norm=10.0)
    lota.fuse_in_backward(optimizer)
    whole = torch.randn(shape, device=device).bfloat16()
    state, lr = optimizer.state[p], torch.tensor(1e-5, device=device)
    compiled = torch.compile(pure_update, dynamic=True)

    def own(devices: set[str]) -> None:
        before, launches.DEVICES = launches.DEVICES, devices
        try:
            p.grad = whole
            optimizer.receive(p)
            optimizer._square_norms, optimizer._free = [], optimizer._free[:0]
        finally:
            launches.DEVICES = before

    kept = optimizer.kept[p].positions()
    held = (whole, kept, p.detach(), state["master"], state["square_avg"], lr)
    return compare(
        {
            "plain": lambda: own(set()),
            "kernels": lambda: own({"cuda"}),
            "torch.compile": lambda: torch.no_grad()(compiled)(*held),
        },
        device,
    )


# The gradient of blocks


def grouped(a: Tensor, b: Tensor, tiles: Tiles, side: int) -> Callable[[], Tensor]:
    """torch's grouped product: a group per row of blocks, for which b's columns are copied."""
    (part,) = tiles.parts
    first = part.first_columns[:, None] + torch.arange(side, device=a.device)
    ends = torch.bincount(part.row, minlength=a.shape[1] // side).cumsum(0) * side

    def call() -> Tensor:
        rows = a.t().view(-1, side, len(a))  # (rows of blocks, side, tokens)
        return F.grouped_mm(rows, b.index_select(1, first.view(-1)), offs=ends.to(torch.int32))

    return call


def blocks(shape: tuple[int, int], sparsity: float, side: int, device: str) -> dict[str, float | str]:
    """a^T b at random blocks of a weight."""
    grid = torch.rand(shape[0] // side, shape[1] // side, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(grid.numel(), dtype=torch.bool)
    chosen[grid.view(-1).argsort()[: max(1, round((1 - sparsity) * grid.numel()))]] = True
    flags = chosen.view(grid.shape).repeat_interleave(side, 0).repeat_interleave(side, 1)
    tiles = kept_entries(Mask.from_dense({"w": flags.contiguous()}), "w", torch.device(device))
    assert isinstance(tiles, Tiles)
    tokens = TOKENS if device == "cuda" else 64
    a, b = (torch.randn(tokens, n, device=device).bfloat16() for n in flags.shape)
    product = Tiled(tiles)

    def own(devices: set[str]) -> Tensor:
        before, launches.DEVICES = launches.DEVICES, devices
        try:
            return product(a, b)
        finally:
            launches.DEVICES = before

    return compare(
        {
            "whole": lambda: a.t() @ b,
            "plain": lambda: own(set()),
            "kernel": lambda: own({"cuda"}),
            "grouped_mm": grouped(a, b, tiles, side),
        },
        device,
    )


def kernel_times(shape: str, device: str) -> dict[str, dict[str, float | str]]:
    """Milliseconds by operation and contestant."""
    _, hidden, intermediate, *_ = SHAPES[shape]
    weight = intermediate, hidden
    found = {f"update s={s}": updates(weight, s, device) for s in (0.9, 0.99)}
    for side in (64, 128):
        if min(weight) >= 2 * side:
            found[f"{side}-blocks s=0.9"] = blocks(weight, 0.9, side, device)
    if device == "cpu":
        found["16-blocks s=0.9"] = blocks(weight, 0.9, 16, device)
    return found
