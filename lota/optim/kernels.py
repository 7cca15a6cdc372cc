"""Triton kernels of the masked optimizers: gather and measure, update and write back, products of blocks.

The kernels of gradients and updates work on any number of parameters at once. A table has a line per stretch
of kept entries (`lota.optim.kept.Stretch`) with the addresses of everything that belongs to it, so that the
number of launches does not depend on the number of parameters. lota/optim/launches.py fills the tables.

Importing this module needs Triton. Under TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns of the table, int64, a line per stretch. Addresses are of the first entry of the whole tensor.
COUNT = tl.constexpr(0)  # entries of the stretch
FIRST = tl.constexpr(1)  # entries of its parameter before it: where it starts in compact tensors
WHOLE = tl.constexpr(2)  # address of the parameter, or of its whole gradient
COMPACT = tl.constexpr(3)  # address of the compact gradient, fp32
MASTER = tl.constexpr(4)  # address of the masters, fp32
BUFFER_1 = tl.constexpr(5)  # addresses of the rule's buffers, fp32
BUFFER_2 = tl.constexpr(6)
PLACES = tl.constexpr(7)  # address of the positions, or of the tiles' first positions
AREA = tl.constexpr(8)  # entries of a tile
WIDE = tl.constexpr(9)  # entries of a line of a tile
WIDTH = tl.constexpr(10)  # entries of a line of the matrix
NUMBER = tl.constexpr(11)  # of the parameter in this launch
SLOT = tl.constexpr(12)  # of its partial sums, the first one of this stretch
GROUP = tl.constexpr(13)  # line of the numbers of the update rule
COLUMNS = tl.constexpr(14)

# How the entries of a stretch lie in the whole tensor
ALL = tl.constexpr(0)  # one after the other
ENTRIES = tl.constexpr(1)  # at positions
TILES = tl.constexpr(2)  # tile after tile, each line after line

# Update rules, and the numbers of each (fp32), which lota/optim/launches.py computes
RMSPROP = tl.constexpr(0)  # lr, alpha, 1 - alpha, eps, weight decay, momentum
RMSPROP_MOMENTUM = tl.constexpr(1)
ADAMW = tl.constexpr(2)  # 1 - lr decay, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, lr/(1 - beta1^t)
SGD = tl.constexpr(3)  # lr, weight decay, momentum
SGD_MOMENTUM = tl.constexpr(4)
NUMBERS = tl.constexpr(8)  # columns of the numbers; the last one is the limit of the norm

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

BLOCK = 2048  # entries that a program takes at a time
PROGRAMS = 1024  # at most, for a stretch: about what fills a large GPU
WARPS = 8
_CLIP_EPS = tl.constexpr(1e-6)  # the constant of torch.nn.utils.clip_grad_norm_


@triton.jit
def _whole_offsets(line, entry, inside, MODE: tl.constexpr, LONG: tl.constexpr):
    """Flat positions in the whole tensor, int64, of the entries of a stretch."""
    INDEX: tl.constexpr = tl.int64 if LONG else tl.int32
    if MODE == ALL:
        return entry.to(tl.int64)
    if MODE == ENTRIES:
        positions = tl.load(line + PLACES).to(tl.pointer_type(INDEX))
        return tl.load(positions + entry, mask=inside, other=0).to(tl.int64)
    area, wide = tl.load(line + AREA).to(INDEX), tl.load(line + WIDE).to(INDEX)
    tile = entry // area
    rest = entry - tile * area  # in the tile
    row = rest // wide
    starts = tl.load(line + PLACES).to(tl.pointer_type(tl.int64))
    start = tl.load(starts + tile, mask=inside, other=0)
    return start + row.to(tl.int64) * tl.load(line + WIDTH) + (rest - row * wide).to(tl.int64)


@triton.jit
def _gather_kernel(
    table,
    partials,
    slots,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    LONG: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Kept entries of whole gradients into compact ones, and the partial sums of their squares.

    partials: fp32 (parameters, slots); each program writes one. Grid: (programs, stretches).
    """
    INDEX: tl.constexpr = tl.int64 if LONG else tl.int32
    line = table + tl.program_id(1) * COLUMNS
    count = tl.load(line + COUNT).to(INDEX)
    whole = tl.load(line + WHOLE).to(tl.pointer_type(DTYPE))
    compact = tl.load(line + COMPACT).to(tl.pointer_type(tl.float32)) + tl.load(line + FIRST)
    squares = tl.zeros((BLOCK,), tl.float32)
    program = tl.program_id(0).to(INDEX)
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < count
        gradient = tl.load(whole + _whole_offsets(line, entry, inside, MODE, LONG), mask=inside, other=0)
        gradient = gradient.to(tl.float32)
        if STORE:
            tl.store(compact + entry, gradient, mask=inside)
        squares += gradient * gradient
    slot = tl.load(line + NUMBER) * slots + tl.load(line + SLOT) + program
    tl.store(partials + slot, tl.sum(squares))  # 0 from a program that is left without entries


@triton.jit
def _rmsprop(value, gradient, line, here, inside, numbers, MOMENTUM: tl.constexpr):
    """`lota.optim.optimizers.rmsprop_update_`, entry by entry; returns the new values."""
    lr, alpha, rest = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    eps, decay = tl.load(numbers + 3), tl.load(numbers + 4)
    gradient += decay * value
    averages = tl.load(line + BUFFER_1).to(tl.pointer_type(tl.float32)) + here
    average = tl.load(averages, mask=inside, other=0) * alpha + rest * gradient * gradient
    tl.store(averages, average, mask=inside)
    change = tl.div_rn(gradient, tl.sqrt_rn(average) + eps)
    if MOMENTUM:
        momenta = tl.load(line + BUFFER_2).to(tl.pointer_type(tl.float32)) + here
        change += tl.load(momenta, mask=inside, other=0) * tl.load(numbers + 5)
        tl.store(momenta, change, mask=inside)
    return value - lr * change


@triton.jit
def _adamw(value, gradient, line, here, inside, numbers):
    """`lota.optim.optimizers.adamw_update_`, entry by entry; returns the new values."""
    shrink, rest_1 = tl.load(numbers), tl.load(numbers + 1)
    beta_2, rest_2 = tl.load(numbers + 2), tl.load(numbers + 3)
    correction, eps, size = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    value *= shrink
    averages = tl.load(line + BUFFER_1).to(tl.pointer_type(tl.float32)) + here
    average = tl.load(averages, mask=inside, other=0)
    average += rest_1 * (gradient - average)
    tl.store(averages, average, mask=inside)
    squares = tl.load(line + BUFFER_2).to(tl.pointer_type(tl.float32)) + here
    square = tl.load(squares, mask=inside, other=0) * beta_2 + rest_2 * gradient * gradient
    tl.store(squares, square, mask=inside)
    return value - size * tl.div_rn(average, tl.div_rn(tl.sqrt_rn(square), correction) + eps)


@triton.jit
def _sgd(value, gradient, line, here, inside, numbers, MOMENTUM: tl.constexpr):
    """`lota.optim.optimizers.sgd_update_`, entry by entry; returns the new values."""
    gradient += tl.load(numbers + 1) * value
    if MOMENTUM:
        momenta = tl.load(line + BUFFER_1).to(tl.pointer_type(tl.float32)) + here
        gradient += tl.load(momenta, mask=inside, other=0) * tl.load(numbers + 2)
        tl.store(momenta, gradient, mask=inside)
    return value - tl.load(numbers) * gradient


@triton.jit
def _update_kernel(
    table,
    numbers,
    squares,
    square_stride,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    LONG: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clip compact gradients, update the values and buffers, write the values back into the parameters.

    squares: fp32, the square of the norm by which a parameter is clipped, at its number times square_stride.
    Parameters that are not fp32 have masters; one that is no longer its parameter's value rounded becomes
    that value first. Grid: (programs, stretches).
    """
    INDEX: tl.constexpr = tl.int64 if LONG else tl.int32
    EXACT: tl.constexpr = tl.float32 == DTYPE  # the parameter itself: there are no masters
    line = table + tl.program_id(1) * COLUMNS
    count = tl.load(line + COUNT).to(INDEX)
    first = tl.load(line + FIRST)
    numbers += tl.load(line + GROUP) * NUMBERS
    norm = tl.sqrt_rn(tl.load(squares + tl.load(line + NUMBER) * square_stride))
    limit = tl.load(numbers + NUMBERS - 1)
    scale = tl.div_rn(limit, norm + _CLIP_EPS)
    scale = tl.where((scale > 1) | (limit == float("inf")), 1.0, scale)  # a norm that is NaN stays one
    whole = tl.load(line + WHOLE).to(tl.pointer_type(DTYPE))
    compact = tl.load(line + COMPACT).to(tl.pointer_type(tl.float32))
    for start in range(tl.program_id(0).to(INDEX) * BLOCK, count, tl.num_programs(0) * BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < count
        here = first + entry  # in compact tensors
        there = whole + _whole_offsets(line, entry, inside, MODE, LONG)
        value = tl.load(there, mask=inside, other=0)
        if not EXACT:  # what `_current_values` of lota/optim/masked.py does
            masters = tl.load(line + MASTER).to(tl.pointer_type(tl.float32)) + here
            master = tl.load(masters, mask=inside, other=0)
            current = value.to(tl.float32)
            value = tl.where(master.to(DTYPE).to(tl.float32) == current, master, current)
        gradient = tl.load(compact + here, mask=inside, other=0) * scale
        if RULE <= RMSPROP_MOMENTUM:
            value = _rmsprop(value, gradient, line, here, inside, numbers, RULE == RMSPROP_MOMENTUM)
        elif RULE == ADAMW:
            value = _adamw(value, gradient, line, here, inside, numbers)
        else:
            value = _sgd(value, gradient, line, here, inside, numbers, RULE == SGD_MOMENTUM)
        if not EXACT:
            tl.store(masters, value, mask=inside)
        tl.store(there, value.to(DTYPE), mask=inside)


@triton.jit
def _blocks_kernel(
    a,
    b,
    blocks,
    out,
    tokens,
    a_token,
    a_column,
    b_token,
    b_column,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    ACROSS: tl.constexpr,
    TOKENS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a^T b at blocks: a program computes (TALL, WIDE) entries of one block.

    a: (tokens, height), b: (tokens, width), by their strides. blocks: int64 (blocks, 5), see
    lota/optim/launches.py.
    out: fp32 (kept,). ALIGN: what lines, columns and sides of all blocks are multiples of. Grid: (blocks,
    parts of a block), ACROSS of which lie side by side.
    """
    block = blocks + tl.program_id(0) * 5
    line, column = tl.multiple_of(tl.load(block), ALIGN), tl.multiple_of(tl.load(block + 1), ALIGN)
    tall, wide = tl.multiple_of(tl.load(block + 2), ALIGN), tl.multiple_of(tl.load(block + 3), ALIGN)
    rows = (tl.program_id(1) // ACROSS) * TALL + tl.arange(0, TALL)  # (TALL,) in the block
    columns = (tl.program_id(1) % ACROSS) * WIDE + tl.arange(0, WIDE)  # (WIDE,)
    of_a = a + (line + rows) * a_column
    of_b = b + (column + columns) * b_column
    total = tl.zeros((TALL, WIDE), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = tl.arange(0, TOKENS).to(tl.int64) + start
        here = token < tokens
        inside_a = (rows < tall)[:, None] & here[None, :]  # (TALL, TOKENS)
        inside_b = here[:, None] & (columns < wide)[None, :]  # (TOKENS, WIDE)
        part_a = tl.load(of_a[:, None] + (token * a_token)[None, :], mask=inside_a, other=0)
        part_b = tl.load(of_b[None, :] + (token * b_token)[:, None], mask=inside_b, other=0)
        total = tl.dot(part_a, part_b, total, input_precision=PRECISION)
    where = tl.load(block + 4) + rows[:, None] * wide + columns[None, :]
    tl.store(out + where, total, mask=(rows < tall)[:, None] & (columns < wide)[None, :])
