"""What a run minimises: how its examples become a batch, the loss of that batch, and what is logged of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import Config
from lota.data.batches import Batch, Example, collate, encoder
from lota.data.packed import pack
from lota.evaluate.decoding import Decoding
from lota.evaluate.generation import generate
from lota.models.loading import choose_pad_token_id
from lota.train.losses import (
    ChosenRejected,
    Precision,
    log_ratios,
    preference_loss,
    response_logps,
    reward_sums,
    sft_loss,
)
from lota.train.reference import LoadedTrainer, Reference, make_reference
from lota.train.runlog import Meter

Sums = dict[str, Tensor]  # what the meter adds up, detached, each summed over the examples of a batch


class Objective:
    """A loss with all that the training loop needs of it; the loop itself calls `backward()`."""

    headline: tuple[str, ...]  # metrics that the console shows of an evaluation

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        precision: Precision = contextlib.nullcontext,
    ):
        self.config, self.tokenizer, self.model, self.precision = config, tokenizer, model, precision
        self.pad_token_id = choose_pad_token_id(tokenizer, model.config)
        self.rows = encoder(config, tokenizer)

    def start(self, trainer: LoadedTrainer) -> None:
        """Called once, when model and optimizer are as training starts or continues from them."""

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The examples as tensors on the model's device: the first row of each, then the second of each."""
        rows = [row for rank in zip(*map(self.rows, examples), strict=True) for row in rank]
        batch = pack(rows) if self.config.packing else collate(rows, self.pad_token_id)
        return replace(batch.to(self.model.device), examples=examples)

    def losses(self, batch: Batch) -> tuple[Tensor, Sums]:
        """(loss per example, (examples,), with its gradient; what the meter adds up)."""
        raise NotImplementedError

    def metrics(self, meter: Meter, split: str) -> dict[str, float]:
        """Means of what `losses` gave, under the keys of metrics.jsonl. split: `train` or `eval`."""
        raise NotImplementedError

    def logps(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(log-probability of each row's response in nats, its number of tokens), both (rows,)."""
        return response_logps(self.model, batch, self.precision())

    def complete(self, examples: Sequence[Example], stop: tuple[str, ...]) -> list[dict[str, str]]:
        """Greedy completions of the examples' prompts, as rows of samples.jsonl."""
        encoded = [self.rows(example)[0] for example in examples]
        completions = generate(
            self.model,
            self.tokenizer,
            [row.input_ids[: row.prompt_length] for row in encoded],
            Decoding(self.config.max_length - self.config.max_prompt_length, stop=stop),
            batch_size=self.config.eval_batch_size,
        )
        both = zip(examples, completions, strict=True)
        return [{"prompt": e.prompt.text, "completion": text, "target": e.response} for e, text in both]


class SFTObjective(Objective):
    """Negative log-likelihood of the response."""

    headline = ("loss/eval", "nats_per_token/eval")

    def losses(self, batch: Batch) -> tuple[Tensor, Sums]:
        logps, counted = self.logps(batch)
        losses = sft_loss(logps, counted, bool(self.config.loss.average_log_prob))
        return losses, {"loss": losses.detach().sum(), "nll": -logps.detach().sum(), "counted": counted.sum()}

    def metrics(self, meter: Meter, split: str) -> dict[str, float]:
        nats = meter.total("nll") / max(meter.total("counted"), 1.0)
        perplexity = {"ppl": math.exp(min(nats, 700.0))} if split == "eval" else {}
        return {f"loss/{split}": meter.mean("loss"), **perplexity, f"nats_per_token/{split}": nats}


class PreferenceObjective(Objective):
    """DPO and its relatives on preferences, both responses in one forward pass."""

    headline = ("loss/eval", "rewards_eval/margins", "rewards_eval/accuracies")
    reference: Reference | None = None  # before `start` the policy itself, at its start

    def start(self, trainer: LoadedTrainer) -> None:
        if not self.config.loss.reference_free:
            self.reference = make_reference(trainer, self)

    def losses(self, batch: Batch) -> tuple[Tensor, Sums]:
        loss = self.config.loss
        assert loss.beta is not None  # filled in by the configuration
        # the reference first: what it needs is free again before the policy's activations are there
        of_reference = None if self.reference is None else self.reference(batch)
        of_policy, counted = self.logps(batch)
        if of_reference is None and not loss.reference_free:
            of_reference = of_policy.detach()
        policy, n_tokens = ChosenRejected.split(of_policy), ChosenRejected.split(counted)
        reference = None if of_reference is None else ChosenRejected.split(of_reference)
        losses = preference_loss(
            policy,
            reference,
            n_tokens,
            beta=loss.beta,
            sft_reg=loss.sft_reg or 0.0,
            importance_correction=bool(loss.importance_correction),
            ipo=bool(loss.ipo),
            ipo_sum=bool(loss.ipo_sum),
            robust_eps=loss.robust_eps or 0.0,
        )
        rewards = reward_sums(log_ratios(policy, reference), loss.beta)
        sums = {"loss": losses.detach().sum()} | {f"rewards/{name}": value for name, value in rewards.items()}
        for name, logps in (("logps", policy), ("logps_ref", reference)):
            if logps is not None:
                sums[f"{name}/chosen"], sums[f"{name}/rejected"] = (v.detach().sum() for v in logps)
        return losses, sums

    def metrics(self, meter: Meter, split: str) -> dict[str, float]:
        means = {f"loss/{split}": meter.mean("loss")}
        for name in meter.sums:
            kind, _, which = name.partition("/")
            if which:
                means[f"{kind}_{split}/{which}"] = meter.mean(name)
        return means


OBJECTIVES: dict[str, type[Objective]] = {"sft": SFTObjective, "dpo": PreferenceObjective}
