"""Whether a loaded model predicts each token from those before it alone, as training and scores assume."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lota.models.damaged import one_line
from lota.models.opening import embedding_rows

_TOKENS = 9
# Settings with which transformers makes a decoder of an encoder: BERT and its kin, XLM.
_SWITCHES = ("is_decoder", "causal")


def refuse_not_causal(model: PreTrainedModel, source: str | Path) -> None:
    """Raise ValueError if logits depend on what comes later, or if the model does not run on token ids alone.

    source: what the error names. The logits of a few tokens alone are compared with those of the same tokens
    before another one, and before padding. All positions have to differ, by more than rounding does: an
    expert that is chosen by a hair may change at some.
    """
    ids = probe_ids(model)
    batch = ids.repeat(2, 1)
    real = torch.ones_like(batch)
    real[1, -1] = 0
    try:
        with torch.no_grad():
            longer = _logits(model, batch, real)  # (2, tokens, vocabulary)
            alone = _logits(model, ids[:, :-1], real[:1, :-1])  # (1, tokens - 1, vocabulary)
    except torch.OutOfMemoryError:  # says what it is
        raise
    except Exception as error:
        raise ValueError(
            f"{source}: {type(model).__name__} does not run on batches of token ids alone, so that it cannot"
            f" be trained or scored on text: {one_line(error)}"
        ) from error
    differences = (longer[:, :-1] - alone).abs().amax(dim=(0, 2))  # (tokens - 1,)
    spread = (longer[0, 1:] - longer[0, :-1]).abs().amax()
    if differences.min() > max(2e-4, 8 * torch.finfo(model.dtype).eps) * spread:
        off = [key for key in _SWITCHES if getattr(model.config, key, True) is False]
        remedy = f"set {off[0]} to true in its config.json" if off else "give a causal model"
        raise ValueError(
            f"{source}: {type(model).__name__} lets a token depend on what comes after it, which it would"
            f" learn to copy instead of to predict: {remedy}"
        )


def probe_ids(model: PreTrainedModel) -> Tensor:
    """A few tokens to ask a model with, (1, tokens), on its device."""
    return torch.tensor([list(islice(cycle(plain_ids(model)), _TOKENS))], device=model.device)


def plain_ids(model: PreTrainedModel) -> list[int]:
    """Ids of tokens to which the config gives no meaning such as that of an image; 0 to 3 often have one."""
    rows = min(embedding_rows(model), 1000)
    special = set(_token_ids(model.config.to_dict()))
    return [i for i in range(4, rows) if i not in special] or list(range(rows))


def _token_ids(content: dict[str, Any]) -> Iterator[int]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif "token" in str(key):
            yield from (i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))


def _logits(model: PreTrainedModel, ids: Tensor, real: Tensor) -> Tensor:
    """Of rows of ids (rows, length), of which `real` says what is no padding; in fp32."""
    return model(input_ids=ids, attention_mask=real, use_cache=False).logits.float()
