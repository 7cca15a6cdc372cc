"""Fusing a masked optimizer into the backward pass: each gradient is used and freed once it is complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lota.optim.compact_experts import use_compact_experts
from lota.optim.compact_linear import use_compact_gradients
from lota.optim.masked import MaskedOptimizer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def fuse_in_backward(
    optimizer: MaskedOptimizer,
    gradient_accumulation_steps: int = 1,
    compact_linear: bool = True,
    parts: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> Callable[[], None]:
    """Update each parameter once its gradient is complete during `loss.backward()`, then free the gradient.

    gradient_accumulation_steps: backward passes per update; their compact gradients are *summed*, as `p.grad`
    would be, so divide the loss as in any PyTorch loop. Call `optimizer.step()` once per update all the
    same (a scheduler or a Hugging Face trainer does): it finishes `global` clipping and sets `grad_norm`.
    compact_linear: linear layers and stacks of experts compute the gradient of their kept entries only, on a
    CPU, or if whole rows, columns or blocks are kept (compact_linear.py, compact_experts.py).
    parts: of a sharded model, each of its parameters and the part of it that the optimizer trains.

    The step is that of a dense optimizer on the same loss with the frozen entries' gradient set to zero,
    whatever else uses the weights; `torch.autograd.grad`, and `backward(inputs=...)` without a weight, do not
    train it. Activation checkpointing must be the non-reentrant kind (`use_reentrant=False`): the reentrant
    kind runs a backward pass per block. A GradScaler scales the loss, and the update has used the scaled
    gradients when `scaler.step` is called, which raises RuntimeError: use bf16 instead of fp16.
    DistributedDataParallel sums gradients after the update has used them: a forward pass of the optimizer's
    model inside of it raises RuntimeError.

    Returns a function that removes what it attached; until then the parameters' hooks hold the optimizer, and
    neither is freed. Raises ValueError for an optimizer that is fused
    already.
    """
    if optimizer.fused:
        raise ValueError("this optimizer is fused into the backward pass already")
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps}: must be at least 1")

    if parts is None:
        handles = [p.register_post_accumulate_grad_hook(optimizer.receive) for p in optimizer.names]
    else:
        handles = _hooks_of_parts(optimizer, parts)
    undo: list[Callable[[], None]] = []
    if optimizer.model is not None:
        handles.append(optimizer.model.register_forward_pre_hook(_refuse_data_parallel))
        if compact_linear:
            undo = [use(optimizer.model, optimizer) for use in (use_compact_gradients, use_compact_experts)]
    optimizer.fused, optimizer._accumulation = True, gradient_accumulation_steps

    def unfuse() -> None:
        for handle in handles:
            handle.remove()
        for each in undo:
            each()
        optimizer.fused, optimizer._accumulation = False, 1
        optimizer.forget_gradients()

    return unfuse


def _hooks_of_parts(
    optimizer: MaskedOptimizer, parts: Mapping[nn.Parameter, nn.Parameter]
) -> list[RemovableHandle]:
    """FSDP2 runs a parameter's hooks once it has reduced the gradient, of which each process has its part."""

    def receive(whole: nn.Parameter) -> None:
        part, grad = parts[whole], cast("DTensor", whole.grad)
        whole.grad, part.grad = None, grad.to_local()
        optimizer.receive(part)

    for whole, part in parts.items():
        whole.requires_grad_(part in optimizer.names)
    trained = [whole for whole, part in parts.items() if part in optimizer.names]
    return [whole.register_post_accumulate_grad_hook(receive) for whole in trained]


def _refuse_data_parallel(module: nn.Module, inputs: object) -> None:
    if DistributedDataParallel._active_ddp_module is not None:
        raise RuntimeError(
            "DistributedDataParallel sums gradients after the fused optimizer has used them, so each process "
            "would train a model of its own: leave out lota.fuse_in_backward or DistributedDataParallel"
        )


apply_mask_in_backward = fuse_in_backward
