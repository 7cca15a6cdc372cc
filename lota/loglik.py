"""Log-likelihoods of texts after prompts: for choices, and for held-out text (perplexity)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lota.generation import _accepted, _in_batches
from lota.prompting import Prompt

UNLIMITED = 2048  # tokens of a window where the model sets no limit
Request = tuple[list[int], list[int]]  # token ids of a context, at least one, and of what follows it


def logliks(
    model: Any,
    requests: Sequence[Request],
    *,
    batch_size: int,
    on_done: Callable[[int, float], None] | None = None,
) -> list[float]:
    """log p(continuation | context) of each request, in nats, summed over its tokens.

    The scores are computed in the model's dtype and normalised in fp32. on_done(i, value) is called when the
    batch of requests[i] is done. Running out of memory halves the batch for the rest.
    """
    done = [0.0] * len(requests)

    def run(numbers: list[int]) -> None:
        logits = _last_logits(model, [requests[i] for i in numbers])
        sums = [_sum_of(logits[at], requests[i][1]) for at, i in enumerate(numbers)]
        for i, value in zip(numbers, sums, strict=True):  # only now: a batch that fails is run again whole
            done[i] = value
            if on_done is not None:
                on_done(i, value)

    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _in_batches(order, batch_size, run)
    finally:
        model.train(training)
    return done


def _last_logits(model: Any, requests: Sequence[Request]) -> torch.Tensor:
    """Scores of the next token at the last positions of each row, (rows, longest continuation, vocabulary).

    Rows are padded on the left, so that all continuations end together: the scores of the positions before
    them, which a large vocabulary makes large, are not computed where the model can leave them out.
    """
    inputs = [(context + continuation)[:-1] for context, continuation in requests]
    width, kept = max(map(len, inputs)), max(len(continuation) for _, continuation in requests)
    device = next(model.parameters()).device
    # any valid id does as padding under the attention mask
    ids = torch.tensor([[0] * (width - len(row)) + row for row in inputs], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in inputs], device=device)
    extra: dict[str, Any] = {}
    accepts = _accepted(model)
    if "position_ids" in accepts:
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepts:
        extra["logits_to_keep"] = kept
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits[:, -kept:]


def _sum_of(logits: torch.Tensor, continuation: list[int]) -> float:
    """log p of a continuation from the scores of the next token, of which the last belong to it."""
    scores = logits[-len(continuation) :].float().log_softmax(-1)
    chosen = torch.tensor(continuation, device=scores.device)[:, None]
    value = scores.gather(-1, chosen).double().sum().item()
    if math.isnan(value):
        raise ValueError("the model's scores are not numbers (NaN): its weights or its dtype are broken")
    return value


def choice_requests(
    tokenizer: Any, prompt: Prompt, choices: Sequence[str], context: int | None
) -> tuple[list[Request], bool]:
    """A request per choice, tokenised as lm-evaluation-harness does; whether the prompt had to be cut.

    Prompt and choice are tokenised together, so that a choice gets the tokens it has in running text, and
    blanks at the prompt's end count as the choice's first ones.
    """
    stripped = prompt.stripped()
    before = stripped.ids(tokenizer)
    texts = [Prompt(prompt.text + choice, templated=prompt.templated) for choice in choices]
    after = [text.ids(tokenizer)[len(before) :] for text in texts]
    room = None if context is None else context + 1 - max(map(len, after))  # the last token is no input
    if room is None or len(before) <= room:
        return [(before, ids) for ids in after], False
    if room < 1:
        raise ValueError(
            f"a choice of {context + 1 - room} tokens does not fit the model's context, {context}"
        )
    return [(stripped.ids(tokenizer, room), ids) for ids in after], True


def windows(tokens: list[int], first: int, context: int | None) -> list[Request]:
    """Requests that predict every token once, after `first`, in stretches of the model's context.

    A stretch starts anew after one token of the one before it; the last one is preceded by as many tokens as
    fit.
    """
    width = context or UNLIMITED
    requests = []
    for start in range(0, len(tokens), width):
        end = min(start + width, len(tokens))
        before = tokens[max(end - width - 1, 0) : start] if start else [first]
        requests.append((before, tokens[start:end]))
    return requests


def text_requests(tokenizer: Any, text: str, context: int | None) -> list[Request]:
    """Windows over a text, which follows the token for the beginning (else the end) of text."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("perplexity needs a tokenizer with a token for the beginning or end of text")
    return windows(tokenizer(text, add_special_tokens=False).input_ids, first, context)
