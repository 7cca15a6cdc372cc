"""Log-probabilities of responses and the SFT loss, as pure functions: tensors in, tensors out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lota.data.batches import IGNORED, Batch
from lota.models.head import token_logps

# Gives the context that a model's forward pass runs in: autocast, or nothing.
Precision = Callable[[], contextlib.AbstractContextManager[object]]


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
