"""Training written out in torch: rows one by one, gradients masked and clipped tensor by tensor, RMSprop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lota.data.batches import epoch_batches
from lota.masks import Mask


def logp(model, tokenizer, prompt: str, response: str) -> torch.Tensor:
    """Log-probability of one response by the model's own log-softmax, without padding or attention mask."""
    before = tokenizer(prompt).input_ids
    after = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(after)[:, None]).sum()


def train_plainly(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[Any], torch.Tensor],
    rows: Sequence[Any],
    rates: Sequence[float],
    mask: Mask | None = None,
) -> None:
    """A step per learning rate, each on the mean loss of 8 rows, in the order of an epoch under seed 0.

    eps=1 is as large as the gradients are: under the default 1e-8, rounding of an entry whose gradient is
    almost zero moves it by a whole step, either way.
    """
    optimizer = torch.optim.RMSprop(parameters.values(), alpha=0.99, eps=1.0, foreach=False)
    for rate, numbers in zip(rates, epoch_batches(len(rows), 8, seed=0, epoch=0), strict=False):
        optimizer.zero_grad()
        (sum(loss_of(rows[i]) for i in numbers) / len(numbers)).backward()
        for name, p in parameters.items():
            p.grad *= 1 if mask is None else mask.dense(name)
            nn.utils.clip_grad_norm_([p], 10.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
