"""Gradients of a model on some data, summed per entry: what the saliencies gradient, fisher and snip read.

    collected = lota.collect_gradients(model, loss_of, batches)
    masks = lota.extract("base/", score="snip", collected=collected)

Batches stream through the model; each parameter's gradient joins its sum as soon as it is complete in the
backward pass and is freed. So beyond weights and activations there is one sum per scoped entry and one
parameter's gradient, and neither an optimizer nor a tuned model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from lota.models.scope import find_scope
from lota.rounding import add_by_lot_

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Batch = TypeVar("Batch")
KINDS = ("sum", "squares")


class Collected:
    """Sums per entry, a source that saliencies are computed from.

    values: name -> sums, of the parameter's shape, on any device. kind: `sum` (of the gradients) or `squares`
    (of the batches' gradients). meta: plain values that a mask made of them records.
    """

    def __init__(self, values: Mapping[str, Tensor], kind: str, meta: Mapping[str, Any] | None = None):
        self.values, self.kind, self.meta = dict(values), kind, dict(meta or {})
        self.id = f"the collected gradients ({kind})"

    def dtype(self, name: str) -> torch.dtype:
        return self.values[name].dtype

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Tensor:
        """Entries [start, stop) of the flattened parameter on the CPU; not to be written to."""
        return self.values[name].view(-1)[start:stop].cpu()

    def check(self, shapes: Mapping[str, tuple[int, ...]], kind: str) -> None:
        """Raise ValueError unless this holds sums of the kind for all these parameters (name -> shape)."""
        if self.kind != kind:
            raise ValueError(
                f"the collected gradients are of kind={self.kind!r}, but the saliency reads {kind}: "
                f"collect them with kind={kind!r}"
            )
        for name, shape in shapes.items():
            found = tuple(self.values[name].shape) if name in self.values else "nothing"
            if found != shape:
                raise ValueError(
                    f"gradients of {name}: {shape} is in the scope, {found} was collected; collect "
                    "with the model and the scope that the mask is for"
                )


def collect_gradients(
    model: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    names: Iterable[str] | None = None,
    kind: str = "sum",
    dtype: torch.dtype = torch.float32,
    meta: Mapping[str, Any] | None = None,
) -> Collected:
    """Returns the gradients of `loss_of(batch)`, a scalar, summed over the batches.

    names: parameters to sum for, by default the attention and MLP weights; no other requires a gradient
    meanwhile. kind: `sum` adds gradients, `squares` the squares of each batch's gradient (with one example
    per batch: the diagonal of the empirical Fisher information). dtype: of the sums; in bfloat16 (2 bytes
    per entry) each sum is rounded up or down by lot, a function of parameter name, batch and position, so
    that small gradients add up on average.
    Activation checkpointing must be the non-reentrant kind. Of a sharded model (FSDP2) each process has the
    sums of its parts. Raises ValueError for unknown names or kinds, no
    batches, a loss that is not finite, or a model whose parameters hold gradients already.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    parameters = dict(model.named_parameters())
    wanted = list(find_scope(model) if names is None else names)
    _check_parameters(parameters, wanted)
    sums = {
        name: torch.zeros_like(_own(parameters[name]), dtype=dtype, requires_grad=False) for name in wanted
    }
    n_batches = 0
    with _hooked(parameters, sums, kind):
        for batch in batches:
            loss = loss_of(batch)
            if not loss.isfinite():
                raise ValueError(
                    f"the loss of batch {n_batches} is {loss.item()}: a saliency needs finite gradients"
                )
            loss.backward()
            n_batches += 1
    if n_batches == 0:
        raise ValueError("no batches: there is nothing to take gradients of")
    return Collected(sums, kind, {"batches": n_batches, **(meta or {})})


def _own(tensor: Tensor) -> Tensor:
    """Of a sharded model's parameter the part that this process holds."""
    return cast("DTensor", tensor.detach()).to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _check_parameters(parameters: Mapping[str, nn.Parameter], wanted: list[str]) -> None:
    unknown = [name for name in wanted if name not in parameters]
    if unknown:
        near = difflib.get_close_matches(unknown[0], parameters, 1, 0)
        raise ValueError(f"the model has no parameter {unknown[0]}; the nearest is {', '.join(near)}")
    holding = next((name for name, p in parameters.items() if p.grad is not None), None)
    if holding is not None:
        raise ValueError(f"{holding} holds a gradient already: call zero_grad() first")


@contextmanager
def _hooked(parameters: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], kind: str) -> Iterator[None]:
    """Each gradient of a parameter with a sum joins it once it is complete, and is freed.

    No other parameter requires a gradient meanwhile; all is undone afterwards.
    """

    def add_to(name: str, total: Tensor) -> Callable[[nn.Parameter], None]:
        added = 0  # batches

        @torch.no_grad()
        def add(p: nn.Parameter) -> None:
            nonlocal added
            grad, p.grad = p.grad, None
            assert grad is not None  # the hook runs once it is complete
            grad = _own(grad)
            if total.dtype == torch.bfloat16:
                added += 1
                add_by_lot_(total, grad, f"{name}/{added}", squared=kind == "squares")
            else:  # float() gives an fp32 gradient itself: nobody else needs it, so it is squared in place
                total.add_(grad.float().square_() if kind == "squares" else grad)

        return add

    before = {p: p.requires_grad for p in parameters.values()}
    for name, p in parameters.items():
        p.requires_grad_(name in sums)
    handles = [
        parameters[name].register_post_accumulate_grad_hook(add_to(name, total))
        for name, total in sums.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, required in before.items():
            p.grad = None
            p.requires_grad_(required)
