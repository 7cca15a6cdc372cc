"""Batches of sequences through a model: halved when memory runs out, padded, with the arguments it knows."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Subclasses carry more state (linear attention, quantised blocks), and selecting rows may leave that behind.
SELECTABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def reading_only(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode and without autograd; its own mode comes back afterwards.

    torch.inference_mode also keeps no version counters and views: a small model's step takes a tenth less.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def in_batches(rows: Sequence[int], size: int, run: Callable[[Sequence[int]], None]) -> None:
    """Call `run` on consecutive slices; from one that does not fit in memory on, slices are half as long."""
    start = 0
    while start < len(rows):
        batch = rows[start : start + size]
        problem = None
        try:
            run(batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error) or len(batch) == 1:
                raise
            problem = str(error).partition("\n")[0]
        if problem is None:
            start += len(batch)
            continue
        # out of the except block, because the exception's traceback holds the tensors that did not fit
        size = len(batch) // 2
        logger.warning(
            "out of memory with %d sequences in a batch, going on with %d (%s)", len(batch), size, problem
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def longest_first(rows: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the rows in the order in which they are batched; equal lengths keep their order."""
    return sorted(range(len(rows)), key=lambda row: -len(rows[row]))


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Forward:
    """A model's forward pass over padded rows, with those arguments that the model knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, next(model.parameters()).device
        inner = getattr(model, "get_base_model", lambda: model)()  # a wrapper hides the arguments
        self.accepts = set(inspect.signature(inner.forward).parameters)
        self.context = context_length(model.config)

    def __call__(self, ids: Tensor, mask: Tensor, kept: int, **more: Any) -> Any:
        """The model's output. kept: positions at the end whose scores are needed; else as for `inputs`."""
        known = {"logits_to_keep": kept} if "logits_to_keep" in self.accepts else {}
        return self.model(**self.inputs(ids, mask, **more), **known)

    def inputs(self, ids: Tensor, mask: Tensor, **more: Any) -> dict[str, Any]:
        """Keyword arguments of the model.

        ids: (rows, width), what the cache has not read; mask: (rows, cached tokens + width), 1 for tokens
        that count; more: the cache.
        """
        positions = (mask.cumsum(-1) - 1).clamp(0, self.context and self.context - 1)[:, -ids.shape[1] :]
        known = {"position_ids": positions} if "position_ids" in self.accepts else {}
        return {"input_ids": ids, "attention_mask": mask, **known, **more}


def context_length(config: PretrainedConfig) -> int | None:
    """How many positions a model has, prompt and completion together; None if it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def can_drop_rows(cache: object) -> bool:
    """Whether single rows of a model's cache can be kept; None, no cache yet, has nothing to drop."""
    layers = getattr(cache, "layers", [None])
    return cache is None or all(type(layer) in SELECTABLE_LAYERS for layer in layers)


def padded(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and a mask that is 1 where they count, both (rows, longest row), padded on one side.

    The padding is token 0: any valid id does under the mask.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


def first_token(tokenizer: PreTrainedTokenizerBase, purpose: str) -> int:
    """The token that an empty text starts with; ValueError for a tokenizer without one."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError(f"{purpose} needs a tokenizer with a token for the beginning or end of text")
    return first
