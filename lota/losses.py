"""Log-probabilities of responses and the SFT loss, as pure functions: tensors in, tensors out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lota.data import IGNORED, Batch

CHUNK_ENTRIES = 1 << 24  # logits handled at a time: 64 MiB in fp32


class TokenLogProbs(torch.autograd.Function):
    """log softmax(logits)[target] in fp32 from logits of any dtype; 0 where the target is -100.

    logits: (tokens, vocabulary); targets: (tokens,). Beyond the logits and their gradient it needs one
    chunk of memory, where log_softmax and its gradient would each need another copy of all logits in fp32:
    with 128k words and 4,096 tokens, 2 GiB apiece.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logps = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
        normalizers = torch.zeros_like(logps)
        runs = _runs(targets)
        for rows in _chunks(runs, logits.shape[1]):
            values = logits[rows].float()
            normalizers[rows] = values.logsumexp(dim=-1)
            logps[rows] = values.gather(1, targets[rows, None]).squeeze(1) - normalizers[rows]
        ctx.save_for_backward(logits, targets, normalizers)
        ctx.runs = runs
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        grad = torch.empty_like(logits)
        end = 0
        for start, stop in [*ctx.runs, (len(targets), len(targets))]:
            grad[end:start] = 0  # what lies between the runs does not count
            end = stop
        for rows in _chunks(ctx.runs, logits.shape[1]):
            values = (logits[rows].float() - normalizers[rows, None]).exp_().mul_(-grad_logps[rows, None])
            values.scatter_add_(1, targets[rows, None], grad_logps[rows, None])
            grad[rows] = values
        return grad, None


def _runs(targets: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every stretch of targets that count."""
    counted = (targets != IGNORED).int()
    edges = torch.diff(counted, prepend=counted.new_zeros(1), append=counted.new_zeros(1)).nonzero()
    flat = edges.flatten().tolist()
    return list(zip(flat[::2], flat[1::2], strict=True))


def _chunks(runs: list[tuple[int, int]], vocabulary: int) -> Iterator[slice]:
    """The runs, cut so that each piece holds at most CHUNK_ENTRIES logits: slices, which need no copy."""
    size = max(1, CHUNK_ENTRIES // vocabulary)
    for start, stop in runs:
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))


def sequence_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's labelled tokens.

    logits: (batch, length, vocabulary); labels: (batch, length), -100 where a token does not count.
    Returns (sum of log-probabilities in nats, number of counted tokens), both (batch,) and fp32.
    The logits at position t predict the label at t + 1.
    """
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    logps = TokenLogProbs.apply(logits.flatten(0, 1), targets.flatten()).view(targets.shape)
    return logps.sum(dim=1), (targets != IGNORED).sum(dim=1).float()


def response_logps(
    model: nn.Module, batch: Batch, precision: contextlib.AbstractContextManager
) -> tuple[Tensor, Tensor]:
    """(log-probability of each row's response in nats, its number of tokens), both (rows,) and fp32.

    precision: context of the forward pass (autocast or nothing).
    """
    with precision:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return sequence_logps(logits, batch.labels)


def sft_loss(logps: Tensor, n_tokens: Tensor, average_log_prob: bool = False) -> Tensor:
    """Negative log-likelihood per example, (batch,) in nats: the sum over its tokens, or their mean.

    The published learning rates of the method were chosen for the sum (arXiv 2406.16797).
    """
    return -logps / n_tokens.clamp(min=1) if average_log_prob else -logps
