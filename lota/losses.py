"""Losses as pure functions: tensors in, tensors out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lota.data import IGNORED


def sequence_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's labelled tokens.

    logits: (batch, length, vocabulary); labels: (batch, length), -100 where a token does not count.
    Returns (sum of log-probabilities in nats, number of counted tokens), both (batch,) and fp32.
    The logits at position t predict the label at t + 1.
    """
    targets = labels[:, 1:]
    nll = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -nll.view(targets.shape).sum(dim=1), (targets != IGNORED).sum(dim=1).float()


def sft_loss(logps: Tensor, n_tokens: Tensor, average_log_prob: bool = False) -> Tensor:
    """Negative log-likelihood per example, (batch,) in nats: the sum over its tokens, or their mean.

    The published learning rates of the method were chosen for the sum (arXiv 2406.16797).
    """
    return -logps / n_tokens.clamp(min=1) if average_log_prob else -logps
