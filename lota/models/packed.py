"""Examples end to end in one row: attention that stays inside each, and whether a model keeps them apart.

A packed row has position ids that start at 0 in every example. Each example is attended to by itself, with
the attention function and the mask that it would have alone, so that the work grows with the squares of the
examples, not of the row. Models whose attention cannot be exchanged read the position ids themselves and make
a mask of (tokens, tokens), if they keep examples apart at all.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from lota.models.causal import plain_ids
from lota.models.damaged import one_line

# What a model attends with -> the name, in transformers' table, of the same inside each example.
ATTENTION = {"sdpa": "lota_packed", "eager": "lota_packed_eager"}
# Where the examples of the row begin that a model is computing, and the end of the last; None: no packed row.
_BOUNDS: ContextVar[list[int] | None] = ContextVar("bounds", default=None)
PROBE = (7, 9, 6)  # tokens of the examples that a model is tried with
logger = logging.getLogger(__name__)


# Attention


@dataclass(frozen=True)
class PackedMask:
    """The masks of the examples of a row, in place of one of (tokens, tokens)."""

    bounds: list[int]  # where each example begins, and the end of the last: examples + 1
    offsets: Tensor  # the same, int32, on the model's device
    masks: list[
        Tensor | None
    ]  # of each example, as its attention takes it; None: every token sees all before it

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(end - start for start, end in pairwise(self.bounds))


def _note_bounds(outermost: bool, _: torch.nn.Module, __: Any, inputs: dict[str, Any]) -> None:
    """Before a forward pass: note where its row is to be cut; outermost: or that it is no packed one."""
    positions = inputs.get("position_ids")
    if positions is None or positions.ndim != 2:  # (rows, tokens)
        if outermost:
            _BOUNDS.set(None)
        return
    starts = (positions == 0).nonzero()[:, 1].tolist() if len(positions) == 1 else []
    packed = len(starts) > 1 and inputs.get("attention_mask") is None
    _BOUNDS.set([*starts, positions.shape[1]] if packed else None)


def _mask_of(
    make: Any, *, mask_function: Any, use_vmap: bool = False, device: Any = "cpu", **options: Any
) -> PackedMask | Tensor | None:
    """transformers' interface for masks: of a packed row those of its examples, else what `make` makes.

    make: `sdpa_mask` or `eager_mask`. mask_function: (batch, head, query, key) -> True if attended, of places
    in the row; sliding windows depend on the distance of places only, chunks are moved by transformers.
    """
    shared = {"mask_function": mask_function, "use_vmap": use_vmap, "device": device}
    bounds = _BOUNDS.get()
    if bounds is None:
        return make(**shared, **options)
    # a mask of the model's own (vmap) is always made, else only where an example is as long as a window
    options |= {"allow_is_causal_skip": not use_vmap, "attention_mask": None, "batch_size": 1}
    masks = []
    for start, end in pairwise(bounds):
        place = {"q_length": end - start, "kv_length": end - start, "q_offset": start, "kv_offset": start}
        masks.append(make(**shared, **(options | place)))
    return PackedMask(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), masks)


def _attend(
    eager: bool,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """transformers' interface for attention: of each example by itself, else as the model always does.

    query: (1, heads, tokens, d); key, value: (1, key heads, tokens, d). The output is (1, tokens, heads, d).
    eager: the function that the model's own module has, which knows of caps and sinks; else `sdpa`.
    """
    plain = sys.modules[type(module).__module__].eager_attention_forward if eager else sdpa_attention_forward
    if not isinstance(attention_mask, PackedMask):
        return plain(module, query, key, value, attention_mask, **options)
    return _inside_examples(eager, plain, module, query, key, value, attention_mask, options), None


@torch.compiler.disable  # a graph would be one of these lengths only
def _inside_examples(
    eager: bool,
    plain: Any,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    options: dict[str, Any],
) -> Tensor:
    if key.shape[2] != query.shape[2] or options.get("position_bias") is not None:
        raise NotImplementedError("attention of this kind cannot be cut into examples")
    if not eager and _kernel_fits(module, query, key, value, mask, options):
        return _by_kernel(query, key, value, mask, options.get("scaling"))
    return _one_by_one(plain, module, query, key, value, mask, options)


def _one_by_one(
    plain: Any,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    options: dict[str, Any],
) -> Tensor:
    outputs = []
    for (start, end), own in zip(pairwise(mask.bounds), mask.masks, strict=True):
        parts = (tensor[:, :, start:end] for tensor in (query, key, value))
        outputs.append(plain(module, *parts, own, **options)[0])  # (1, n, heads, d)
    return torch.cat(outputs, dim=1)


def _kernel_fits(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    options: dict[str, Any],
) -> bool:
    """Whether torch's variable-length attention computes this: plainly causal, in 16 bits, on a GPU."""
    causal = options.get("is_causal")
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not options.get("dropout")
        and options.get("softcap") is None
        and all(own is None for own in mask.masks)
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and varlen_kernel() is not None
    )


@cache
def varlen_kernel() -> Any:
    """torch.nn.attention.varlen.varlen_attn as torch 2.13 has it; None in a torch where it takes less."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= set(takes) else None


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scaling: float | None) -> Tensor:
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, heads, d)
    output = varlen_kernel()(
        query,
        key,
        value,
        mask.offsets,
        mask.offsets,
        mask.longest,
        mask.longest,
        scale=scaling,
        window_size=(-1, 0),  # all tokens before it, none after it
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


# Models


def pack_attention(model: PreTrainedModel, source: str | Path) -> None:
    """Give the model an attention that keeps packed examples apart: ours, or its own with a mask.

    Which one is decided by trying: a few examples packed have to give the logits that each gives alone.
    Raises ValueError if neither does, as with recurrent layers and models without position ids.
    """
    chunks = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if chunks and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # before 5.23
        raise _refusal(model, source, "this transformers counts chunks of attention over the whole row")
    examples = _probe(model)
    with torch.no_grad():
        alone = torch.cat([_logits(model, [example]) for example in examples])  # (tokens, vocabulary)
    before = model.config._attn_implementation
    hooks = _exchange_attention(model)
    if hooks and _difference(model, examples, alone) is None:
        return
    if hooks:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    problem = _difference(model, examples, alone)
    if problem is not None:
        raise _refusal(model, source, problem)
    logger.info("packing: attention with a mask of all tokens of a batch, which grows with their square")


def _refusal(model: PreTrainedModel, source: str | Path, problem: str) -> ValueError:
    return ValueError(
        f"packing=true: {source}: {type(model).__name__} does not keep the examples of a row apart "
        f"({problem}); set packing=false"
    )


def _exchange_attention(model: PreTrainedModel) -> list[RemovableHandle]:
    """Let all attention of the model be `_attend`; returns the hooks that it needs, none if it cannot be."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    kind = model.config._attn_implementation
    same = {model.config.get_text_config()._attn_implementation, kind} == {kind}
    if not (same and kind in ATTENTION and all(part._can_set_attn_implementation() for part in parts)):
        return []
    for name, make in ("sdpa", sdpa_mask), ("eager", eager_mask):
        AttentionInterface.register(ATTENTION[name], partial(_attend, name == "eager"))
        AttentionMaskInterface.register(ATTENTION[name], partial(_mask_of, make))
    model.set_attn_implementation(ATTENTION[kind])
    return [
        part.register_forward_pre_hook(partial(_note_bounds, part is model), with_kwargs=True)
        for part in parts
    ]


def _probe(model: PreTrainedModel) -> list[Tensor]:
    """A few short examples, (1, n) each, of the ids that have no meaning of their own."""
    ids = iter(cycle(plain_ids(model)))
    return [torch.tensor([list(islice(ids, n))], device=model.device) for n in PROBE]


def packed_inputs(input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """What a model is given of a packed row, (1, tokens) both."""
    return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}


def _logits(model: PreTrainedModel, examples: Sequence[Tensor]) -> Tensor:
    """(tokens, vocabulary) in fp32 of the examples packed; of one example as it is given without packing."""
    if len(examples) == 1:
        inputs = {"input_ids": examples[0], "attention_mask": torch.ones_like(examples[0])}
        return model(**inputs, use_cache=False).logits[0].float()
    positions = torch.cat([torch.arange(e.shape[1], device=e.device)[None] for e in examples], dim=1)
    return model(**packed_inputs(torch.cat(list(examples), dim=1), positions)).logits[0].float()


@torch.no_grad()
def _difference(model: PreTrainedModel, examples: Sequence[Tensor], alone: Tensor) -> str | None:
    """In what the packed examples are not what they are alone; None if they are the same.

    A quarter of the positions may differ: an expert that is chosen by a hair may change at some. What an
    example owes to the one before it shows in two rows of one shape, which hardly differ in rounding; it may
    be little in a model that has not learnt yet.
    """
    try:
        packed = _logits(model, examples)
        other = _logits(model, [examples[0].flip(1), *examples[1:]])
    except torch.OutOfMemoryError:  # says what it is
        raise
    except Exception as error:
        return one_line(error)
    first = examples[0].shape[1]
    spread, eps = (alone[1:] - alone[:-1]).abs().amax(), torch.finfo(model.dtype).eps
    if _share_above(other[first:] - packed[first:], max(5e-6, 8 * eps) * spread) > 0.25:
        return "an example depends on the one before it"
    if _share_above(packed - alone, max(2e-4, 8 * eps) * spread) > 0.25:
        return "its positions do not begin anew with each example"
    return None


def _share_above(differences: Tensor, allowed: Tensor) -> float:
    """Share of the positions, (tokens, vocabulary), at which a logit differs by more (or is not a number)."""
    return 1 - (differences.abs().amax(dim=1) <= allowed).float().mean().item()
