"""torch.compile for each transformer block, in place: the model's names and its state stay as they are.

Blocks of one kind share their code, compiled for any number of rows and tokens. A block is one graph;
only around attention to packed examples and compact stacks of experts, whose sizes come from the data, it is
several. Where torch cannot make them, all blocks run as they did before, and a warning says why.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
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
_Run = Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any]


def compile_blocks(model: nn.Module) -> CompiledBlocks:
    """Compile each transformer block of `model` when it runs next, with compact gradients if it has them:
    call it after `lota.fuse_in_backward`.

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
        kinds = {type(block) for block in self.blocks}
        graphs = {(kind, whole): _compiled(kind, whole) for kind in kinds for whole in (True, False)}
        for block in self.blocks:
            layers = [layer for layer in block.modules() if type(layer) is nn.Linear or is_conv1d(layer)]
            for index, layer in enumerate(layers):
                vars(layer)["place"] = index
            in_parts = any(_is_no_graph(vars(module).get("forward")) for module in block.modules())
            whole, parts = (graphs[type(block), each] for each in (not in_parts, False))
            block.forward = self._forward(block, layers, whole, parts)

    def undo(self) -> None:
        """Run the blocks as they were."""
        for block in self.blocks:
            del block.forward
            for module in block.modules():
                vars(module).pop("place", None)
        self.blocks = []

    def _forward(
        self, block: nn.Module, layers: list[nn.Module], whole: _Run, parts: _Run
    ) -> Callable[..., Any]:
        """A forward bound to the block; a deep copy's runs as its class does.

        whole, parts: the compiled code as one graph and as several.
        """

        def compute(run: _Run, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            running.places = _places(layers)
            try:
                with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                    return run(plain, block, args, kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self._give_up(block, error)
            finally:
                running.places = None
            return plain(block, *args, **kwargs)

        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            plain: Callable[..., Any] = type(self_).forward
            if self_ is not block or self.reason is not None or _runs_as_it_is(args, kwargs):
                return plain(self_, *args, **kwargs)
            run = parts if any(type(value).__name__ == "PackedMask" for value in kwargs.values()) else whole
            if run is parts and _recomputes(block):  # which no part does: it is done around them
                compute_again: Any = partial(compute, run, plain.__wrapped__, **kwargs)  # type: ignore[attr-defined]
                return block._gradient_checkpointing_func(compute_again, *args)  # type: ignore[operator]
            return compute(run, plain, *args, **kwargs)

        return MethodType(forward, block)

    def _give_up(self, block: nn.Module, error: Exception) -> None:
        self.reason = f"torch.compile cannot compile {type(block).__name__}: {_first_words(error)}"
        logger.warning("the transformer blocks run uncompiled: %s", self.reason)


def _compiled(kind: type[nn.Module], whole: bool) -> _Run:
    """What runs a block of a kind, compiled for all sizes, so that no length of a batch needs another graph.

    It has code of its own, since torch stores and counts graphs by code.
    """

    def run(
        plain: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return plain(block, *args, **kwargs)

    code: CodeType = run.__code__
    own = FunctionType(code.replace(co_name=f"run_{kind.__name__}"), globals())
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit["recompile_limit"] = MOST_GRAPHS
    else:
        torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(own, backend=BACKEND, fullgraph=whole, dynamic=True, **limit)


def _is_no_graph(forward: Any) -> bool:
    """Whether a forward is one of ours that torch.compiler.disable keeps out of graphs."""
    return getattr(forward, "_torchdynamo_disable", False)


def _recomputes(block: nn.Module) -> bool:
    """Whether the forward of the block's class recomputes its activations in the backward pass.

    transformers before 5.23 does that around the block's forward, where it is no part of what is compiled.
    """
    wraps = getattr(type(block).forward, "__code__", None)
    on = getattr(block, "gradient_checkpointing", False) and block.training
    return bool(on) and wraps is not None and wraps.co_name == "forward_with_checkpointing"


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
