"""torch.compile for each transformer block, in place: the model's names and its state stay as they are.

Blocks of one kind share their code, which is compiled for any number of rows and tokens. A block is compiled
whole or not at all; where that fails, all blocks run as they did before, and a warning says why.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from lota.models.roles import block_numbers, is_conv1d
from lota.optim.compact_linear import compact_of, in_transform
from lota.optim.in_graph import Carrier, Place, running

logger = logging.getLogger(__name__)
BACKEND = "inductor"
# Ways in which the blocks of one class may be compiled: with or without gradients, of the input too or not,
# with a mask of attention or without, one row or several; times different blocks, such as sliding windows.
MOST_GRAPHS = 64


def compile_blocks(model: nn.Module) -> CompiledBlocks:
    """Compile each transformer block of `model` when it runs next, with compact gradients if it has them.

    A block that is given a cache, or runs in inference mode, runs as it is: there each length would be
    another graph. torch's compiler does not support create_graph=True and retain_graph=True; and
    `torch.autograd.grad` of a weight with compact gradients raises RuntimeError. Raises ValueError for a
    model without blocks.
    """
    return CompiledBlocks([model.get_submodule(name) for name in block_numbers(model)])


class CompiledBlocks:
    """Blocks whose forward is compiled. reason: why no longer, in a sentence; None if it is."""

    def __init__(self, blocks: list[nn.Module]):
        self.reason: str | None = None
        self.blocks = [block for block in blocks if "forward" not in vars(block)]
        code = {kind: _compiled(_own_code(kind.__name__)) for kind in {type(block) for block in self.blocks}}
        for block in self.blocks:
            layers = [layer for layer in block.modules() if type(layer) is nn.Linear or is_conv1d(layer)]
            for index, layer in enumerate(layers):
                layer.place = index
            block.forward = self._forward(block, layers, code[type(block)])

    def undo(self) -> None:
        """Run the blocks as they were."""
        for block in self.blocks:
            del block.forward
            for module in block.modules():
                vars(module).pop("place", None)
        self.blocks = []

    def _forward(
        self, block: nn.Module, layers: list[nn.Module], compiled: Callable[..., Any]
    ) -> Callable[..., Any]:
        """A forward bound to the block; a deep copy's runs as its class does."""

        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self_ is not block or self.reason is not None or _runs_as_it_is(args, kwargs):
                return type(self_).forward(self_, *args, **kwargs)
            running.places = _places(layers)
            try:
                with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                    return compiled(block, args, kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self._give_up(block, error)
            finally:
                running.places = None
            return type(self_).forward(self_, *args, **kwargs)

        return MethodType(forward, block)

    def _give_up(self, block: nn.Module, error: Exception) -> None:
        self.reason = f"torch.compile cannot compile {type(block).__name__}: {_first_words(error)}"
        logger.warning("the transformer blocks run uncompiled: %s", self.reason)


def _own_code(name: str) -> Callable[..., Any]:
    """A function that runs a block, with code of its own, since graphs are stored and counted by code."""

    def run(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return type(block).forward(block, *args, **kwargs)

    code: CodeType = run.__code__
    return FunctionType(code.replace(co_name=f"run_{name}"), globals())


def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` compiled as one graph for all sizes, so that no length of a batch needs another."""
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit["recompile_limit"] = MOST_GRAPHS
    else:
        torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(run, backend=BACKEND, fullgraph=True, dynamic=True, **limit)


def _places(layers: list[nn.Module]) -> list[Place | None]:
    """A carrier for each layer with a compact gradient, in the order of `place`."""
    places: list[Place | None] = []
    for layer in layers:
        compact = compact_of(layer) if torch.is_grad_enabled() else None
        if compact is None or torch.is_autocast_enabled(compact.device.type):
            places.append(None)
        else:
            carrier = Carrier.apply(compact.weight, compact.kept, compact.put_aside)
            places.append(Place(carrier, compact.number, compact.needed))
    return places


def _runs_as_it_is(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block is generating, or is being transformed or traced by somebody else."""
    if torch.is_inference_mode_enabled() or torch.compiler.is_compiling() or in_transform():
        return True
    return any("Cache" in type(value).__name__ for value in (*args, *kwargs.values()))


def _first_words(error: BaseException) -> str:
    """What went wrong first, on one line."""
    while (cause := error.__cause__ or getattr(error, "inner_exception", None)) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
