"""Losses on preference pairs as pure functions.

A pair is a prompt x with a chosen response y_w and a rejected one y_l; pi is the policy, ref the reference,
b is beta, s the logistic function. Log-probabilities are summed over a response's tokens, in nats; tensors
have the shape (pairs,).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """A value of every pair's two responses, (pairs,) each."""

    chosen: Tensor
    rejected: Tensor

    @classmethod
    def split(cls, rows: Tensor) -> Pairs:
        """From (2 * pairs,): all chosen responses, then all rejected ones."""
        return cls(*rows.chunk(2))


def log_ratios(policy: Pairs, reference: Pairs | None) -> Pairs:
    """log pi(y|x) - log ref(y|x) of both responses; without a reference (`reference_free`) log pi(y|x)."""
    if reference is None:
        return policy
    return Pairs(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def rewards(ratios: Pairs, beta: float) -> Pairs:
    """The rewards that DPO assumes, b times the log-ratio, without a gradient. arXiv 2305.18290, eq. 5."""
    return Pairs(beta * ratios.chosen.detach(), beta * ratios.rejected.detach())


def dpo_loss(ratios: Pairs, beta: float, robust_eps: float = 0.0) -> Tensor:
    """-(1 - e) log s(b D) - e log s(-b D), where D is the chosen log-ratio minus the rejected one.

    e = 0 is DPO (arXiv 2305.18290, eq. 7); e > 0 its conservative form, which takes a share e of the labels
    for wrong (https://ericmitchell.ai/cdpo.pdf, eq. 3) and has its minimum at s(b D) = 1 - e.
    """
    difference = beta * (ratios.chosen - ratios.rejected)
    return -(1 - robust_eps) * F.logsigmoid(difference) - robust_eps * F.logsigmoid(-difference)


def ipo_loss(ratios: Pairs, beta: float, n_tokens: Pairs | None = None) -> Tensor:
    """(D - 1 / (2 b))^2, arXiv 2310.12036, eq. 17, where b is called tau.

    n_tokens: of each response; D is then the difference of log-ratios per token, as its authors used it. None
    takes the summed log-ratios (`ipo_sum`).
    """
    if n_tokens is not None:
        lengths = Pairs(n_tokens.chosen.clamp(min=1), n_tokens.rejected.clamp(min=1))
        ratios = Pairs(ratios.chosen / lengths.chosen, ratios.rejected / lengths.rejected)
    return (ratios.chosen - ratios.rejected - 1 / (2 * beta)).square()


def importance_weight(ratios: Pairs) -> Tensor:
    """pi(y_l|x) / ref(y_l|x), without a gradient: how likely the policy still writes the rejected response.

    A pair sampled from the reference counts as if the rejected response had been sampled from the policy.
    """
    return ratios.rejected.detach().exp()


def preference_loss(
    policy: Pairs,
    reference: Pairs | None,
    n_tokens: Pairs,
    *,
    beta: float,
    sft_reg: float = 0.0,
    importance_correction: bool = False,
    ipo: bool = False,
    ipo_sum: bool = False,
    robust_eps: float = 0.0,
) -> Tensor:
    """Loss of each pair, (pairs,): w L - r log pi(y_w|x).

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


def reward_sums(ratios: Pairs, beta: float) -> dict[str, Tensor]:
    """Rewards of both responses, their difference, and in how many pairs the chosen one has more: sums over
    pairs.
    """
    reward = rewards(ratios, beta)
    margins = reward.chosen - reward.rejected
    values = {
        "chosen": reward.chosen,
        "rejected": reward.rejected,
        "margins": margins,
        "accuracies": (margins > 0).float(),
    }
    return {name: torch.sum(value) for name, value in values.items()}
