"""How well a model knows texts: nats per byte, which models with different tokenizers share."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.evaluate.batching import context_length
from lota.evaluate.estimates import Estimate, ratio
from lota.evaluate.loglik import Request, logliks, text_requests

Text = tuple[str, str]  # what stands before, perhaps nothing, and the text that counts


def nats_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    batch_size: int = 8,
    reach: int | None = None,
) -> Estimate:
    """Loss summed over all texts, in nats, over their bytes (UTF-8); its error is over texts.

    A text with nothing before it goes through the model in stretches of `reach` tokens, None: of the model's
    context; one with a question has to fit.
    """
    context = reach or context_length(model.config)
    requests: list[Request] = []
    owners: list[int] = []
    for number, (question, text) in enumerate(texts):
        if question:
            found = [(tokenizer(question).input_ids, tokenizer(text, add_special_tokens=False).input_ids)]
        else:
            found = text_requests(tokenizer, text, context)
        requests += found
        owners += [number] * len(found)
    nats = dict.fromkeys(range(len(texts)), 0.0)
    for number, value in zip(owners, logliks(model, requests, batch_size=batch_size), strict=True):
        nats[number] -= value
    return ratio(nats, {number: len(text.encode()) for number, (_, text) in enumerate(texts)})
