"""Updates of weights without fp32 masters, and of optimizer state below fp32, in pieces widened to fp32.

    optimizer_state  buffers of the update rule            bytes per entry of a matrix
    float32          fp32                                  4 per buffer
    bfloat16         bf16, rounded by lot                  2 per buffer
    factored         the square average as means of its    2 per other buffer
                     rows and columns, the others in bf16

The factored average of a matrix is R C^T / mean(R), where R and C are running means of the squared gradient
over each row and each column. Source: Adafactor, Shazeer & Stern, arXiv 1804.04235, section 3.

An update widens a piece of the parameter at a time (lota/rounding.py), so that beside the gradient it needs
a piece of each fp32 tensor, however large the parameter is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lota.config import OPTIMIZER_STATES
from lota.optim.kept import Everything, Kept
from lota.optim.pull import ANCHOR, PULL, with_pull
from lota.rounding import Lots, piece_size, pieces

Rows = tuple[int, slice]  # some rows of a matrix of a stack, and which matrix
ROWS, COLUMNS = "_rows", "_columns"  # what is appended to the key of a factored square average
_WATCHED = 10  # first updates of each parameter in which swallowed ones are counted
_WORTH_TELLING = 0.01  # share of swallowed updates from which on a warning is given


class SwallowedUpdatesWarning(UserWarning):
    """Weights are trained in a dtype too coarse for their updates."""


class Rule(Protocol):
    """What an optimizer class defines of its update rule."""

    square_average: str | None  # key of the running mean of squared gradients; None: the rule has none

    def _update(self, values: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None: ...

    def _squared(self, values: Tensor, grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        """What is squared and averaged, and the decay of the average."""
        ...

    def _step_by(
        self, values: Tensor, grad: Tensor, square: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """The rest of an update, with a square average that includes this gradient."""
        ...


@dataclass
class Precision:
    """How an optimizer holds what it trains."""

    masters: bool = True  # fp32 copies of kept entries whose parameter is narrower
    stochastic_rounding: bool = False  # of weights without masters
    optimizer_state: str = "float32"
    seed: int = 0  # of all that is rounded by lot
    swallowed: Swallowed = field(default_factory=lambda: Swallowed())

    def check(self, rule: str, square_average: str | None, dtypes: set[torch.dtype]) -> None:
        """Raise ValueError for settings that cannot be honoured. dtypes: of the parameters that train."""
        problems = []
        if self.optimizer_state not in OPTIMIZER_STATES:
            choices = ", ".join(OPTIMIZER_STATES)
            problems.append(f"optimizer_state={self.optimizer_state!r}: choose one of {choices}")
        elif self.optimizer_state == "factored" and square_average is None:
            problems.append(f"optimizer_state='factored': {rule} has no square average; choose 'bfloat16'")
        if self.stochastic_rounding and torch.float16 in dtypes:
            problems.append("stochastic_rounding=True rounds to bfloat16, but there are float16 parameters")
        elif self.stochastic_rounding and torch.bfloat16 not in dtypes:
            problems.append("stochastic_rounding=True: no parameter that trains is bfloat16; cast the model")
        if problems:
            raise ValueError("; ".join(problems))

    def has_master(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float32 and self.masters and not self.stochastic_rounding

    def in_pieces(self, dtype: torch.dtype) -> bool:
        """Whether parameters of this dtype are updated by `update_in_pieces`."""
        bare = dtype != torch.float32 and not self.has_master(dtype)
        return bare or self.optimizer_state != "float32"

    def buffer(
        self, key: str, kept: Kept, name: str, is_square: bool, device: torch.device
    ) -> dict[str, Tensor]:
        """State of a rule's buffer at the start. name: of the parameter."""
        if self.optimizer_state == "factored" and is_square:
            if not isinstance(kept, Everything):
                raise ValueError(
                    f"optimizer_state='factored' needs whole matrices, and the mask keeps {kept.count:,} "
                    f"entries of {name}: choose 'bfloat16' or 'float32'"
                )
            stack = factored_shape(kept.shape)
            if stack is None:
                return {key: torch.zeros(kept.count, device=device)}
            n, height, width = stack
            rows, columns = (torch.zeros(n, side, device=device) for side in (height, width))
            return {key + ROWS: rows, key + COLUMNS: columns}
        dtype = torch.float32 if self.optimizer_state == "float32" else torch.bfloat16
        return {key: torch.zeros(kept.count, dtype=dtype, device=device)}


def factored_shape(shape: torch.Size) -> tuple[int, int, int] | None:
    """(matrices, height, width) of a parameter whose average is factored; None if that saves nothing."""
    if len(shape) < 2:
        return None
    height, width = shape[-2:]
    return (math.prod(shape[:-2]), height, width) if height + width < height * width else None


def norm_of(grad: Tensor) -> Tensor:
    """Norm of a gradient (kept,), fp32 (), summed in fp32 without a wide copy of it."""
    if grad.dtype == torch.float32:
        return torch.linalg.vector_norm(grad)
    cuts = list(pieces(len(grad), grad.device))
    norms = torch.empty(
        len(cuts), device=grad.device
    )  # one tensor: small ones would stand between the pieces
    for norm, piece in zip(norms, cuts, strict=True):
        norm.copy_(torch.linalg.vector_norm(grad[piece].float()))
    return torch.linalg.vector_norm(norms)


def update_in_pieces(
    rule: Rule,
    values: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    *,
    precision: Precision,
    name: str,
    kept: Kept,
    scale: Tensor | None,
) -> None:
    """One update of a parameter, in place.

    values: its kept entries, (kept,), bf16, or fp32 (masters, or an fp32 parameter's). grad: (kept,) in any
    dtype, left as it is if that is not fp32. scale: what clipping multiplies the gradient with. state["step"]
    counts this update already.
    """
    if scale is not None and grad.dtype == torch.float32:
        grad, scale = grad.mul_(scale), None
    square = rule.square_average
    factored = isinstance(kept, Everything) and f"{square}{ROWS}" in state
    stack = factored_shape(kept.shape) if isinstance(kept, Everything) and factored else None
    cuts: Iterable[tuple[slice, Rows | None]]
    if stack is not None:
        _average_factors(rule, values, grad, state, group, scale, stack)
        cuts = _row_pieces(stack, values.device)
    else:
        cuts = ((piece, None) for piece in pieces(len(values), values.device))
    buffers = [key for key in rule_buffers(state) if not key.endswith((ROWS, COLUMNS))]
    for piece, rows in cuts:
        wide = values[piece].float()  # itself if it is fp32
        scaled = with_pull(_scaled(grad[piece], scale), wide, state, piece)
        part: dict[str, Any] = {key: state[key][piece].float() for key in buffers} | {"step": state["step"]}
        if rows is None:
            rule._update(wide, scaled, part, group)
        else:
            rule._step_by(wide, scaled, _factored_average(state, f"{square}", rows), part, group)
        key, first = f"{precision.seed}/{name}/{state['step']}", kept.before + piece.start
        lots = Lots(key, first, len(wide), wide.device)
        for buffer in sorted(buffers):
            if state[buffer].dtype == torch.bfloat16:
                state[buffer][piece] = lots.rounded(part[buffer])
        if values.dtype == torch.bfloat16 and precision.stochastic_rounding:
            values[piece] = lots.rounded(wide)
        elif values.dtype != torch.float32:
            rounded = wide.to(values.dtype)
            if state["step"] <= _WATCHED:
                precision.swallowed.count(values[piece], wide, rounded)
            values[piece] = rounded


def rule_buffers(state: dict[str, Any]) -> Iterator[str]:
    """Keys of the buffers of the update rule in a parameter's state."""
    others = ("positions", "tiles", "tile_shape", "master", "step", ANCHOR, PULL)
    return (key for key in state if key not in others)


def _scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    """In fp32."""
    return grad.float() if scale is None else grad.float().mul_(scale)


def _row_pieces(stack: tuple[int, int, int], device: torch.device) -> Iterator[tuple[slice, Rows]]:
    """Pieces of a stack that are whole rows of one matrix: where they lie flat, and (matrix, its rows)."""
    n, height, width = stack
    many = max(1, piece_size(device) // width)
    for matrix in range(n):
        for first in range(0, height, many):
            last = min(first + many, height)
            start = (matrix * height + first) * width
            yield slice(start, start + (last - first) * width), (matrix, slice(first, last))


def _factored_average(state: dict[str, Any], square: str, rows: Rows) -> Tensor:
    """R C^T / mean(R) in some rows of a matrix, (rows x width,)."""
    matrix, lines = rows
    row_means = state[square + ROWS][matrix]
    # R is divided first: a product of two small squares is 0
    shares = row_means[lines] / row_means.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.outer(shares, state[square + COLUMNS][matrix]).view(-1)


def _average_factors(
    rule: Rule,
    values: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    scale: Tensor | None,
    stack: tuple[int, int, int],
) -> None:
    """R <- d R + (1 - d) mean of g^2 over each row, and C likewise over each column; d: the decay."""
    assert rule.square_average is not None
    rows, columns = (state[rule.square_average + end] for end in (ROWS, COLUMNS))
    row_means, column_sums = torch.empty_like(rows), torch.zeros_like(columns)
    decay = 0.0
    for piece, (matrix, lines) in _row_pieces(stack, values.device):
        wide = values[piece].float()
        scaled = with_pull(_scaled(grad[piece], scale), wide, state, piece)
        squared, decay = rule._squared(wide, scaled, group)
        squares = squared.square().view(-1, stack[2])  # (lines, width)
        row_means[matrix, lines] = squares.mean(1)
        column_sums[matrix] += squares.sum(0)
    rows.mul_(decay).add_(row_means, alpha=1 - decay)
    columns.mul_(decay).add_(column_sums, alpha=(1 - decay) / stack[1])


@dataclass
class Swallowed:
    """Counts updates that rounding to the nearest value of a narrow dtype undoes, and warns of them once."""

    # on each device: entries whose fp32 value changed, and of them those that stayed as they were, int64 (2,)
    counts: dict[torch.device, Tensor] = field(default_factory=dict)
    told: bool = False

    def count(self, before: Tensor, wide: Tensor, rounded: Tensor) -> None:
        """before, rounded: values in the narrow dtype; wide: what was rounded, fp32."""
        changed = wide != before.float()
        found = torch.stack([changed.sum(), (changed & (rounded == before)).sum()])
        counts = self.counts.setdefault(found.device, torch.zeros_like(found))
        counts.add_(found)

    def warn(self, updates: int, dtype: torch.dtype, lr: float) -> None:
        """Warn if enough were lost, once the first updates are made. updates: made so far."""
        if self.told or updates < _WATCHED or not self.counts:
            return
        made, lost = (sum(each) for each in zip(*(c.tolist() for c in self.counts.values()), strict=True))
        self.told, self.counts = True, {}
        if made and lost / made >= _WORTH_TELLING:
            warnings.warn(
                f"{lost / made:.1%} of the updates of the first {_WATCHED} steps, lr={lr:g}, were lost: "
                f"rounding {dtype} weights without masters undoes steps below about |w|/256: train with "
                "masters=True (4 bytes more per trained entry) or with stochastic_rounding=True",
                SwallowedUpdatesWarning,
                stacklevel=5,
            )
