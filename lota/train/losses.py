"""Log-probabilities of responses and the SFT loss, as pure functions: tensors in, tensors out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lota.data.batches import IGNORED, Batch, next_tokens

CHUNK_ENTRIES = 1 << 24  # logits handled at a time: 64 MiB in fp32
# Gives the context that a model's forward pass runs in: autocast, or nothing.
Precision = Callable[[], contextlib.AbstractContextManager[object]]


class TokenLogProbs(torch.autograd.Function):
    """log softmax(logits)[target] in fp32 from logits of any dtype; 0 if the target is -100.

    logits: (tokens, vocabulary); targets: (tokens,). Beyond the logits and their gradient it needs one
    chunk of memory; log_softmax and its gradient would each need another copy of all logits in fp32:
    with 128k words and 4,096 tokens, 2 GiB apiece.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logps = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
        normalizers = torch.zeros_like(logps)  # (tokens,): log of the sum of exp(logits), kept for backward
        spans = _counted_spans(targets)
        for rows in _chunks(spans, logits.shape[1]):
            values = logits[rows].float()  # (rows, vocabulary): the only fp32 copy, one chunk at a time
            normalizers[rows] = values.logsumexp(dim=-1)
            logps[rows] = values.gather(1, targets[rows, None]).squeeze(1) - normalizers[rows]
        ctx.save_for_backward(logits, targets, normalizers)
        ctx.spans = spans
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        grad = torch.empty_like(logits)
        end = 0
        for start, stop in [*ctx.spans, (len(targets), len(targets))]:
            grad[end:start] = 0  # tokens between the spans do not count
            end = stop
        for rows in _chunks(ctx.spans, logits.shape[1]):
            # d logp / d logit = 1[target] - softmax, times the gradient that arrives for each token
            values = (logits[rows].float() - normalizers[rows, None]).exp_().mul_(-grad_logps[rows, None])
            values.scatter_add_(1, targets[rows, None], grad_logps[rows, None])
            grad[rows] = values
        return grad, None


def _counted_spans(targets: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every stretch of targets that count."""
    counted = (targets != IGNORED).int()
    # +1 where a stretch begins, -1 one behind its end: the nonzero places alternate between start and stop
    edges = torch.diff(counted, prepend=counted.new_zeros(1), append=counted.new_zeros(1)).nonzero()
    flat = edges.flatten().tolist()
    return list(zip(flat[::2], flat[1::2], strict=True))


def _chunks(spans: list[tuple[int, int]], vocabulary: int) -> Iterator[slice]:
    """The spans, cut so that each piece holds at most CHUNK_ENTRIES logits: slices, which need no copy."""
    size = max(1, CHUNK_ENTRIES // vocabulary)
    for start, stop in spans:
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability in nats of each target, (rows, length) fp32; 0 where it is -100.

    logits: (rows, length, vocabulary); targets: (rows, length), the token predicted AT a position.
    """
    return TokenLogProbs.apply(logits.flatten(0, 1), targets.flatten()).view(targets.shape)


def sequence_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's labelled tokens.

    logits: (batch, length, vocabulary); labels: (batch, length), -100 if a token does not count.
    Returns (sum of log-probabilities in nats, number of counted tokens), both (batch,) and fp32.
    The logits at position t predict the label at t + 1.
    """
    targets = next_tokens(labels)
    return target_logps(logits, targets).sum(dim=1), (targets != IGNORED).sum(dim=1).float()


def token_logps(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Log-probability in nats that `model` gives each target, (rows, length) fp32; 0 where it is -100.

    inputs: keyword arguments of the model, of rows of `length` tokens; targets: (rows, length), the token
    predicted AT a position.
    """
    return target_logps(model(**inputs).logits, targets)


def response_logps(
    model: nn.Module, batch: Batch, precision: contextlib.AbstractContextManager[object]
) -> tuple[Tensor, Tensor]:
    """(log-probability of each row's response in nats, its number of tokens), both (rows,) and fp32.

    precision: context of the forward pass (autocast or nothing).
    """
    with precision:
        logps = token_logps(model, batch.inputs, batch.targets)
    return batch.row_sums(logps), batch.row_sums((batch.targets != IGNORED).float())


def sft_loss(logps: Tensor, n_tokens: Tensor, average_log_prob: bool = False) -> Tensor:
    """Negative log-likelihood per example, (batch,) in nats: the sum over its tokens, or their mean.

    The published learning rates of the method were chosen for the sum (arXiv 2406.16797).
    """
    return -logps / n_tokens.clamp(min=1) if average_log_prob else -logps


class ChosenRejected(NamedTuple):
    """A value of both responses of every preference."""

    chosen: Tensor  # (preferences,)
    rejected: Tensor  # (preferences,)

    @classmethod
    def split(cls, rows: Tensor) -> ChosenRejected:
        """From (2 * preferences,): all chosen responses, then all rejected ones."""
        return cls(*rows.chunk(2))


def log_ratios(policy: ChosenRejected, reference: ChosenRejected | None) -> ChosenRejected:
    """log pi(y|x) - log ref(y|x) of both responses; without a reference (`reference_free`) log pi(y|x)."""
    if reference is None:
        return policy
    return ChosenRejected(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def dpo_loss(ratios: ChosenRejected, beta: float, robust_eps: float = 0.0) -> Tensor:
    """-(1 - e) log s(b D) - e log s(-b D), where D is the chosen log-ratio minus the rejected one.

    e = 0 is DPO (arXiv 2305.18290, eq. 7); e > 0 its conservative form, which takes a share e of the labels
    for wrong (https://ericmitchell.ai/cdpo.pdf, eq. 3) and has its minimum at s(b D) = 1 - e.
    """
    difference = beta * (ratios.chosen - ratios.rejected)
    return -(1 - robust_eps) * F.logsigmoid(difference) - robust_eps * F.logsigmoid(-difference)


def ipo_loss(ratios: ChosenRejected, beta: float, n_tokens: ChosenRejected | None = None) -> Tensor:
    """(D - 1 / (2 b))^2, arXiv 2310.12036, eq. 17, where b is called tau.

    n_tokens: of each response; D is then the difference of log-ratios per token, as its authors used it. None
    takes the summed log-ratios (`ipo_sum`).
    """
    if n_tokens is not None:
        lengths = ChosenRejected(n_tokens.chosen.clamp(min=1), n_tokens.rejected.clamp(min=1))
        ratios = ChosenRejected(ratios.chosen / lengths.chosen, ratios.rejected / lengths.rejected)
    return (ratios.chosen - ratios.rejected - 1 / (2 * beta)).square()


def importance_weight(ratios: ChosenRejected) -> Tensor:
    """pi(y_l|x) / ref(y_l|x), without a gradient: how likely the policy still writes the rejected response.

    A preference sampled from the reference counts as if its rejected response were one of the policy.
    """
    return ratios.rejected.detach().exp()


def preference_loss(
    policy: ChosenRejected,
    reference: ChosenRejected | None,
    n_tokens: ChosenRejected,
    *,
    beta: float,
    sft_reg: float = 0.0,
    importance_correction: bool = False,
    ipo: bool = False,
    ipo_sum: bool = False,
    robust_eps: float = 0.0,
) -> Tensor:
    """Loss of each preference, (preferences,): w L - r log pi(y_w|x).

    L is `ipo_loss` with `ipo`, else `dpo_loss`; w is `importance_weight` with `importance_correction`,
    else 1; r is `sft_reg`. reference: None for a loss without one; then importance_correction has no meaning.
    """
    ratios = log_ratios(policy, reference)
    if ipo:
        loss = ipo_loss(ratios, beta, None if ipo_sum else n_tokens)
    else:
        loss = dpo_loss(ratios, beta, robust_eps)
    if importance_correction:
        assert reference is not None
        loss = importance_weight(ratios) * loss
    return loss - sft_reg * policy.chosen if sft_reg else loss


def reward_sums(ratios: ChosenRejected, beta: float) -> dict[str, Tensor]:
    """Sums over preferences of both rewards, of their difference, and of how often the chosen one is higher.

    The reward that DPO assumes is b times the log-ratio. arXiv 2305.18290, eq. 5.
    """
    chosen, rejected = (beta * ratio.detach() for ratio in ratios)
    margins = chosen - rejected
    values = {"chosen": chosen, "rejected": rejected, "margins": margins, "accuracies": (margins > 0).float()}
    return {name: value.sum() for name, value in values.items()}
