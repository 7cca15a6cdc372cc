"""Which steps of masked optimizers go to the kernels of lota/optim/kernels.py, and the tables these read.

    during the backward pass   gather and measure, sum, update: three launches per parameter
    after it                   the same three for all parameters together, once per kind: per device, dtype,
                               way of addressing (lota/optim/kept.py) and position type

A parameter is served if it lies on a device of DEVICES, Triton works there, its state is fp32 and its update
rule has a kernel. Everything else takes the plain path of lota/optim/masked.py, which computes the same up to
the rounding of fp32. No table is read back, so that nothing waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lota.optim.kept import Entries, Everything, Kept, Stretch

logger = logging.getLogger(__name__)

DEVICES = {"cuda"}  # types of devices; empty it to compute everything without kernels


class Rule(NamedTuple):
    """An update rule that has a kernel, with the numbers of a step."""

    name: str  # of the constant in lota/optim/kernels.py
    buffers: tuple[str, ...]  # keys of the state
    numbers: tuple[float, ...]


class _Line(NamedTuple):
    """A stretch of a parameter in a launch."""

    stretch: Stretch
    number: int  # of the parameter
    slot: int  # of its partial sums
    addresses: tuple[int, ...]  # whole, compact, master, two buffers; 0: there is none
    group: int = 0  # line of the rule's numbers


def usable(device: torch.device) -> bool:
    """Whether kernels run on tensors of the device."""
    return device.type in DEVICES and _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether Triton is there and compiles for the device: it also needs a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        whole = torch.tensor([1.0, 2.0, 3.0], device=device)
        entries = Entries(torch.tensor([0, 2]), 3, device)
        (compact,), squares = gather([entries], [whole])
        return compact.tolist() == [1.0, 3.0] and squares.tolist() == [10.0]
    except Exception as error:  # whatever it is, the plain path computes the same
        logger.warning("no Triton kernels on %s, steps take the plain path: %s", device, error)
        return False


def _kernels() -> ModuleType:
    """lota/optim/kernels.py, which imports Triton: only where a device may use it."""
    from lota.optim import kernels

    return kernels


def serves(p: nn.Parameter, kept: Kept, state: Mapping[str, Any]) -> bool:
    """Whether kernels can update a parameter: they use raw memory, so all must be as they expect."""
    if not usable(p.device) or type(p) is not nn.Parameter or not p.is_contiguous():
        return False
    if ("master" in state) == (p.dtype == torch.float32) or not p.is_floating_point() or p.itemsize > 4:
        return False
    own = [value for key, value in state.items() if torch.is_tensor(value) and key not in kept.state]
    return all(_is_compact(value, p.device, kept.count) for value in own) and all(
        stretch.places is None or stretch.places.device == p.device for stretch in kept.stretches
    )


def _is_compact(value: Tensor, device: torch.device, count: int) -> bool:
    fits = value.dtype == torch.float32 and value.device == device and value.shape == (count,)
    return fits and value.is_contiguous()


# Gradients


def gather(
    kept: list[Kept], wholes: list[Tensor], squares: Tensor | None = None, store: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Compact gradients (kept,) in fp32 of whole ones, and the squares of their norms, fp32 (parameters,).

    All on one device. Contiguous fp32 gradients of which all entries are kept are not copied. squares: where
    these go, if not into memory of their own. store: False for gradients that are compact, which are only
    measured.
    """
    kernels, device = _kernels(), wholes[0].device
    wholes = [whole.contiguous() for whole in wholes]
    pairs = list(zip(kept, wholes, strict=True))
    copied = [store and not (isinstance(k, Everything) and w.dtype == torch.float32) for k, w in pairs]
    sizes = [k.count if copy else 0 for k, copy in zip(kept, copied, strict=True)]
    made = torch.empty(sum(sizes), dtype=torch.float32, device=device).split(sizes)
    compact = [new if copy else w.view(-1) for new, copy, w in zip(made, copied, wholes, strict=True)]

    programs = _programs(max(stretch.count for k in kept for stretch in k.stretches), kernels)
    most = max(len(k.stretches) for k in kept)
    filled = all(len(k.stretches) == most for k in kept)  # then the kernel writes every partial sum
    partials = (torch.empty if filled else torch.zeros)(len(kept), most * programs, device=device)
    kinds = defaultdict(list)
    for number, (k, whole, to, copy) in enumerate(zip(kept, wholes, compact, copied, strict=True)):
        for slot, stretch in enumerate(k.stretches):
            addresses = whole.data_ptr(), to.data_ptr(), 0, 0, 0
            kind = whole.dtype, _mode(stretch, kernels), k.long, copy
            kinds[kind].append(_Line(stretch, number, slot * programs, addresses))
    for (dtype, mode, long, copy), lines in kinds.items():
        _launch(
            kernels._gather_kernel, (programs, len(lines)), _table(lines, device), partials,
            partials.shape[1], DTYPE=kernels.DTYPES[dtype], MODE=mode, LONG=long, STORE=copy,
            BLOCK=kernels.BLOCK, num_warps=kernels.WARPS,
        )  # fmt: skip
    return compact, torch.sum(partials, 1, out=squares)


def squares_of(compact: list[Tensor], squares: Tensor | None = None) -> Tensor:
    """Squares of the norms of compact fp32 gradients on one device, (gradients,); into `squares` if given."""
    return gather([Everything(grad.shape) for grad in compact], compact, squares, store=False)[1]


# Updates


class Update(NamedTuple):
    """What one parameter's update reads and writes."""

    p: nn.Parameter
    kept: Kept
    state: dict[str, Any]
    grad: Tensor  # compact, fp32 (kept,), before clipping
    rule: Rule
    limit: float  # of the norm; infinite: the gradient is not clipped


def update(updates: list[Update], squares: Tensor) -> None:
    """Clip, update values and buffers, write back; all on one device.

    squares: fp32 (updates,), of the norms that the limits are for; or (1,), of one norm for all.
    """
    kernels, device = _kernels(), updates[0].p.device
    kinds = defaultdict(list)
    groups: dict[tuple[float, ...], int] = {}  # numbers -> their line
    for number, (p, kept, state, grad, rule, limit) in enumerate(updates):
        group = groups.setdefault(_numbers(rule, limit, kernels), len(groups))
        names = ("master", *rule.buffers, "", "")[:3]
        held = (state[name].data_ptr() if name in state else 0 for name in names)
        addresses = p.data_ptr(), grad.data_ptr(), *held
        for stretch in kept.stretches:
            kind = p.dtype, _mode(stretch, kernels), kept.long, rule.name
            kinds[kind].append(_Line(stretch, number, 0, addresses, group))
    numbers = _on_device(tuple(chain(*groups)), torch.float32, device, _stream(device))
    for (dtype, mode, long, name), lines in kinds.items():
        programs = _programs(max(line.stretch.count for line in lines), kernels)
        _launch(
            kernels._update_kernel, (programs, len(lines)), _table(lines, device), numbers, squares,
            int(squares.numel() > 1), DTYPE=kernels.DTYPES[dtype], MODE=mode, LONG=long,
            RULE=getattr(kernels, name).value, BLOCK=kernels.BLOCK, num_warps=kernels.WARPS,
        )  # fmt: skip


def _numbers(rule: Rule, limit: float, kernels: ModuleType) -> tuple[float, ...]:
    """A line of the rule's numbers; the limit is the last one."""
    unused = kernels.NUMBERS.value - 1 - len(rule.numbers)
    return (*map(float, rule.numbers), *[0.0] * unused, limit)


# Products


@dataclass(frozen=True)
class Blocks:
    """Blocks of a matrix, for `multiplied`."""

    table: Tensor  # int64 (blocks, 5): first line, first column, lines, columns, and where its values start
    tall: int  # lines of the largest
    wide: int  # columns of it
    align: int  # largest power of two up to 16 that divides the first four numbers of all blocks
    count: int  # of the values


def block_table(parts: list[tuple[int, int, Tensor, Tensor]]) -> Blocks:
    """parts: (tall, wide, first lines, first columns) of blocks of one size each, in the order of values."""
    tables, count = [], 0
    for tall, wide, lines, columns in parts:
        sizes = torch.tensor([tall, wide], device=lines.device).expand(len(lines), 2)
        starts = count + torch.arange(len(lines), device=lines.device) * (tall * wide)
        tables.append(torch.cat([lines[:, None], columns[:, None], sizes, starts[:, None]], 1))
        count += len(lines) * tall * wide
    table = torch.cat(tables)
    align = math.gcd(16, *table[:, :4].unique().tolist())
    return Blocks(table, max(part[0] for part in parts), max(part[1] for part in parts), align, count)


def multiplied(a: Tensor, b: Tensor, blocks: Blocks) -> Tensor:
    """a^T b at the blocks, fp32 (kept,), by one launch. a: (tokens, height), b: (tokens, width)."""
    kernels, narrow = _kernels(), a.element_size() == 2
    out = torch.empty(blocks.count, dtype=torch.float32, device=a.device)
    tall, wide = (min(128, max(16, 1 << (side - 1).bit_length())) for side in (blocks.tall, blocks.wide))
    down, across = -(-blocks.tall // tall), -(-blocks.wide // wide)
    exact = narrow or torch.get_float32_matmul_precision() == "highest"
    _launch(
        kernels._blocks_kernel, (len(blocks.table), down * across), a, b, blocks.table, out,
        len(a), a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        TALL=tall, WIDE=wide, ACROSS=across, TOKENS=64 if narrow else 32, ALIGN=blocks.align,
        PRECISION="ieee" if exact else "tf32", num_warps=8 if tall * wide > 8192 else 4,
    )  # fmt: skip
    return out


# Tables and launches


def _table(lines: list[_Line], device: torch.device) -> Tensor:
    """The table of a launch on the device, int64 (lines, columns)."""
    values: list[int] = []
    for s, number, slot, addresses, group in lines:
        where = 0 if s.places is None else s.places.data_ptr()
        values += s.count, s.first, *addresses, where, s.area, s.wide, s.width, number, slot, group
    return _on_device(tuple(values), torch.int64, device, _stream(device))


@functools.lru_cache(maxsize=1024)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """Values as a tensor that nobody writes to. Those of the last launches are there already: addresses and
    learning rates rarely change. stream: on which the copy was made.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """The one place where kernels are started. The first argument is a tensor on the device."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def _programs(count: int, kernels: ModuleType) -> int:
    """Programs for a stretch of so many entries."""
    return min(kernels.PROGRAMS, -(-count // kernels.BLOCK))


def _mode(stretch: Stretch, kernels: ModuleType) -> int:
    if stretch.places is None:
        return kernels.ALL.value
    return kernels.TILES.value if stretch.area else kernels.ENTRIES.value
