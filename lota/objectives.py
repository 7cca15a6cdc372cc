"""What a run minimises: how its examples become a batch, the loss of that batch, and what the log tells."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lota.config import Config
from lota.data import Batch, Encoded, Example, collate
from lota.losses import sequence_logps, sft_loss
from lota.models import choose_pad_token_id
from lota.runlog import Meter
from lota.training_data import encoder

Sums = dict[str, Tensor]  # what the meter adds up, detached, each summed over the examples of a batch


class Objective:
    """A loss with all that the training loop needs of it; the loop itself calls `backward()`.

    precision: gives the context that the model's forward pass runs in (autocast or nothing).
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        model: PreTrainedModel,
        precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.config, self.tokenizer, self.model, self.precision = config, tokenizer, model, precision
        self.pad_token_id = choose_pad_token_id(tokenizer, model.config)
        self.encode: Callable[[Example], Encoded] = encoder(config, tokenizer)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The examples as tensors on the model's device."""
        return collate([self.encode(e) for e in examples], self.pad_token_id).to(self.model.device)

    def losses(self, batch: Batch) -> tuple[Tensor, Sums]:
        """(loss per example, (examples,), with its gradient; what the meter adds up)."""
        raise NotImplementedError

    def metrics(self, meter: Meter, split: str) -> dict[str, float]:
        """Means of what `losses` gave, under the keys of metrics.jsonl. split: `train` or `eval`."""
        raise NotImplementedError

    def logps(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(log-probability of each row's response in nats, its number of tokens), both (rows,)."""
        with self.precision():
            logits = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        return sequence_logps(logits, batch.labels)


class SFTObjective(Objective):
    """Negative log-likelihood of the response."""

    def losses(self, batch: Batch) -> tuple[Tensor, Sums]:
        logps, counted = self.logps(batch)
        losses = sft_loss(logps, counted, self.config.loss.average_log_prob)
        return losses, {"loss": losses.detach().sum(), "nll": -logps.detach().sum(), "counted": counted.sum()}

    def metrics(self, meter: Meter, split: str) -> dict[str, float]:
        nats = meter.total("nll") / max(meter.total("counted"), 1.0)
        perplexity = {"ppl": math.exp(min(nats, 700.0))} if split == "eval" else {}
        return {f"loss/{split}": meter.mean("loss"), **perplexity, f"nats_per_token/{split}": nats}


OBJECTIVES: dict[str, type[Objective]] = {"sft": SFTObjective}
