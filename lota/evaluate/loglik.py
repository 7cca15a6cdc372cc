"""Log-likelihoods of texts after prompts: for choices, and for held-out text (perplexity)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.data.batches import IGNORED, Prompt
from lota.evaluate.batching import (
    Forward,
    can_drop_rows,
    first_token,
    in_batches,
    padded,
    reading_only,
)
from lota.models.head import token_logps

UNLIMITED = 2048  # tokens of a window if the model sets no limit
WORTH_SHARING = 0.2  # share of a batch's tokens that reading contexts once must save; it costs a second pass
Request = tuple[list[int], list[int]]  # token ids of a context, at least one, and of what follows it


def logliks(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    on_done: Callable[[int, float], object] | None = None,
) -> list[float]:
    """log p(continuation | context) of each request, in nats, summed over its tokens.

    A long context that several requests of a batch share is read once. on_done(i, value) is called when the
    batch of requests[i] is done. Running out of memory halves the batch for the rest.
    """
    done = [0.0] * len(requests)
    reader = _Reader(model)

    def run(numbers: Sequence[int]) -> None:
        batch = [requests[i] for i in numbers]
        sums = [_sum_of(found) for found in reader.logps(batch)]
        for i, value in zip(numbers, sums, strict=True):  # only now: a batch that fails is run again whole
            done[i] = value
            if on_done is not None:
                on_done(i, value)

    with reading_only(model):
        in_batches(request_order(requests), batch_size, run)
    return done


def request_order(requests: Sequence[Request]) -> list[int]:
    """Numbers of the requests, longest first, those with the same context side by side."""
    longest: dict[tuple[int, ...], int] = {}
    for context, after in requests:
        key = tuple(context)
        longest[key] = max(longest.get(key, 0), len(context) + len(after))

    def key_of(i: int) -> tuple[int, list[int], int]:
        context, after = requests[i]
        return -longest[tuple(context)], context, -len(after)

    return sorted(range(len(requests)), key=key_of)


class _Reader:
    """Log-probabilities of the tokens of continuations."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.forward = Forward(model)
        self.device = self.forward.device
        self.can_share = {"past_key_values", "position_ids"} <= self.forward.accepts

    def logps(self, batch: Sequence[Request]) -> list[Tensor]:
        """Of each request, (tokens of the continuation,) in nats, fp32."""
        rows: dict[tuple[int, ...], int] = {}  # of the contexts
        row_of = [rows.setdefault(tuple(context), len(rows)) for context, _ in batch]
        tokens = sum(len(context) + len(after) for context, after in batch)
        saved = sum(len(context) for context, _ in batch) - sum(map(len, rows))
        if self.can_share and saved >= WORTH_SHARING * tokens:
            found = self._after_shared(list(rows), row_of, [after for _, after in batch])
            if found is not None:
                return found
            self.can_share = False
        return self._whole(batch)

    def _whole(self, batch: Sequence[Request]) -> list[Tensor]:
        ids, mask = padded([(context + after)[:-1] for context, after in batch], self.device, left=True)
        targets = torch.full_like(ids, IGNORED)
        for row, (_, after) in zip(targets, batch, strict=True):
            row[-len(after) :] = torch.tensor(after)
        logps = token_logps(self.forward.model, self.forward.inputs(ids, mask, use_cache=False), targets)
        return [row[-len(after) :] for row, (_, after) in zip(logps, batch, strict=True)]

    def _after_shared(
        self, contexts: Sequence[Sequence[int]], row_of: Sequence[int], continuations: Sequence[list[int]]
    ) -> list[Tensor] | None:
        """The same after contexts[row_of[i]], read once each; None if the model's cache cannot be shared."""
        ids, mask = padded(contexts, self.device, left=True)
        output = self.forward(ids, mask, 1, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None or not can_drop_rows(cache):
            return None
        first = output.logits[:, -1].float().log_softmax(-1)  # (contexts, vocabulary)
        found = [first[row, after[:1]] for row, after in zip(row_of, continuations, strict=True)]
        longer = [i for i, after in enumerate(continuations) if len(after) > 1]
        if not longer:
            return found
        rows = torch.tensor([row_of[i] for i in longer], device=self.device)
        cache.batch_select_indices(rows)
        more, counts = padded([continuations[i][:-1] for i in longer], self.device, left=False)
        targets, _ = padded([continuations[i][1:] for i in longer], self.device, left=False)
        targets.masked_fill_(counts == 0, IGNORED)
        mask = torch.cat([mask[rows], counts], 1)
        inputs = self.forward.inputs(more, mask, use_cache=True, past_key_values=cache)
        logps = token_logps(self.forward.model, inputs, targets)
        for row, i in zip(logps, longer, strict=True):
            found[i] = torch.cat([found[i], row[: len(continuations[i]) - 1]])
        return found


def _sum_of(logps: Tensor) -> float:
    """The sum of log-probabilities (tokens,)."""
    value = logps.double().sum().item()
    if math.isnan(value):
        raise ValueError("the model's scores are not numbers (NaN): its weights or its dtype are broken")
    return value


def choice_requests(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    choices: Sequence[str],
    context: int | None,
    limit: int | None = None,
) -> tuple[list[Request], bool]:
    """A request per choice, tokenised as lm-evaluation-harness does; whether the prompt had to be cut.

    Prompt and choice are tokenised together, so that a choice gets the tokens it has in running text, and
    blanks at the prompt's end count as the choice's first ones. limit: the most tokens of the prompt, if
    there is one besides the model's context.
    """
    stripped = prompt.stripped()
    before = stripped.ids(tokenizer)
    texts = [Prompt(prompt.text + choice, templated=prompt.templated) for choice in choices]
    after = [text.ids(tokenizer)[len(before) :] for text in texts]
    longest = max(map(len, after))
    if context is not None and longest > context:
        raise ValueError(f"a choice of {longest} tokens does not fit the model's context, {context}")
    most = None if context is None else context + 1 - longest  # the last token is no input
    room = min(n for n in (len(before), limit, most) if n is not None)
    return [(stripped.ids(tokenizer, room), ids) for ids in after], room < len(before)


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


def text_requests(tokenizer: PreTrainedTokenizerBase, text: str, context: int | None) -> list[Request]:
    """Windows over a text, which follows the token for the beginning (else the end) of text."""
    first = first_token(tokenizer, "perplexity")
    return windows(tokenizer(text, add_special_tokens=False).input_ids, first, context)
