"""Ways to score a task: by the completions of its prompts, by log-likelihoods of choices, by perplexity."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from lota.data.prompts import FewShot, Prompter, Row
from lota.evaluate.decoding import Decoding
from lota.evaluate.estimates import Estimate, corpus_perplexity, mean, perplexity
from lota.evaluate.generation import context_length, generate, prompt_bound
from lota.evaluate.loglik import choice_requests, logliks, text_requests

Records = Mapping[int, Row]  # predictions by example number
Store = Callable[[int, Row], None]


class Scorer:
    """Makes predictions of a task's rows, and numbers of predictions.

    draws: whether predictions depend on a seed; suffix: of the names of its files.
    """

    name: ClassVar[str]
    draws: ClassVar[bool] = False
    suffix: ClassVar[str] = ""

    def __init__(
        self,
        model: Any,
        prompter: Prompter,
        task: Any,
        rows: Sequence[Row],
        *,
        decoding: Decoding,
        few_shot: FewShot | None = None,
        batch_size: int = 16,
    ) -> None:
        self.model, self.prompter, self.task, self.rows = model, prompter, task, rows
        self.decoding, self.few_shot, self.batch_size = decoding, few_shot, batch_size
        self.tokenizer = prompter.tokenizer

    @property
    def settings(self) -> dict[str, Any]:
        """What predictions depend on, beside model, data, template and seed."""
        found = {"scoring": self.name, "num_fewshot": self.few_shot.n if self.few_shot else 0}
        limits = self.prompter.limits if self.prompts_alone else None
        return {**found, "prompt_limits": asdict(limits)} if limits else found

    @property
    def prompts_alone(self) -> bool:
        """Whether the model reads prompts as in training: without examples in front."""
        return self.few_shot is None

    def prepare(self, chosen: Sequence[int]) -> int:
        """Make the prompts of the chosen rows; how many of them lost something to fit the context."""
        raise NotImplementedError

    def run(self, numbers: Sequence[int], seed: int, store: Store) -> None:
        """Hand the prediction of each numbered row to `store`, in any order."""
        raise NotImplementedError

    @staticmethod
    def metrics(task: Any) -> list[str]:
        """Names of the metrics, the one that counts as the score first."""
        return [task.metric, *task.more_metrics]

    @classmethod
    def estimates(cls, task: Any, runs: Sequence[Records]) -> dict[str, Estimate]:
        """Each metric over the examples of one or several runs; one that no example has is left out.

        More runs over the same examples are no new examples: errors are over the examples' means.
        """
        names, found = cls.metrics(task), {}
        for name in names:
            scores = {
                i: statistics.fmean(_value(records[i], name, names) for records in runs)
                for i in runs[0]
                if all(_value(records[i], name, names) is not None for records in runs)
            }
            if scores:
                found[name] = mean(scores)
        return found

    def _examples(self, i: int) -> list[Row]:
        return [] if self.few_shot is None else self.few_shot.examples(self.task, self.rows[i], i)


def _value(record: Row, name: str, names: Sequence[str]) -> float | None:
    return record["score"] if name == names[0] else record["metrics"].get(name)


class Generation(Scorer):
    """What the task extracts from the completion of each prompt, and makes of it."""

    name = "generation"
    draws = True

    @property
    def settings(self) -> dict[str, Any]:
        decoding = asdict(self.decoding)
        del decoding["seed"]  # it has a place of its own
        return {**decoding, **super().settings}

    def prepare(self, chosen: Sequence[int]) -> int:
        bound = prompt_bound(self.model.config, self.decoding.max_new_tokens)
        self.prompts = {
            i: self.prompter.fit(self.task, self.rows[i], self._examples(i), bound) for i in chosen
        }
        return sum(fitted.shortened for fitted in self.prompts.values())

    def run(self, numbers: Sequence[int], seed: int, store: Store) -> None:
        def done(at: int, completion: str) -> None:
            store(numbers[at], self._prediction(numbers[at], completion))

        generate(
            self.model,
            self.tokenizer,
            [self.prompts[i].ids for i in numbers],
            batch_size=self.batch_size,
            indices=numbers,
            on_done=done,
            **{**asdict(self.decoding), "seed": seed},
        )

    def _prediction(self, i: int, completion: str) -> Row:
        task, row = self.task, self.rows[i]
        found = task.metrics(row, completion)
        extracted = task.extract(completion)
        prediction = {
            "prompt": self.prompts[i].prompt.text,
            "completion": completion,
            "extracted": extracted,
            "gold": task.gold(row),
            # no answer scores 0 whatever a task's own score makes of it
            "score": 0.0 if extracted is None else float(found[task.metric]),
        }
        return {**prediction, "metrics": found} if task.more_metrics else prediction


class Loglik(Scorer):
    """The likeliest of the row's choices after the prompt; normalised: per character of the choice.

    Equal choices: the first one counts.
    """

    name = "loglik"
    suffix = "_loglik"

    @staticmethod
    def metrics(task: Any) -> list[str]:
        return ["accuracy_loglik", "accuracy_loglik_norm"]

    def prepare(self, chosen: Sequence[int]) -> int:
        context = context_length(self.model.config)
        self.prompts, self.requests, n_cut = {}, {}, 0
        for i in chosen:
            choices = self.task.choices(self.rows[i])
            longest = max(len(self.tokenizer(choice).input_ids) for choice in choices)
            bound = None if context is None else context - longest
            fitted = self.prompter.fit(self.task, self.rows[i], self._examples(i), bound)
            self.prompts[i] = fitted.prompt
            self.requests[i], cut = choice_requests(
                self.tokenizer, fitted.prompt, choices, context, fitted.limit
            )
            n_cut += cut or fitted.lost > 0
        return n_cut

    def run(self, numbers: Sequence[int], seed: int, store: Store) -> None:
        places = [(i, place) for i in numbers for place in range(len(self.requests[i]))]
        values: dict[int, dict[int, float]] = {i: {} for i in numbers}

        def done(at: int, value: float) -> None:
            i, place = places[at]
            values[i][place] = value
            if len(values[i]) == len(self.requests[i]):
                store(i, self._prediction(i, [values[i][k] for k in range(len(values[i]))]))

        requests = [self.requests[i][place] for i, place in places]
        logliks(self.model, requests, batch_size=self.batch_size, on_done=done)

    def _prediction(self, i: int, values: list[float]) -> Row:
        choices, right = self.task.choices(self.rows[i]), self.task.choice(self.rows[i])
        normal = values.index(max(values))
        per_character = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        normalised = per_character.index(max(per_character))
        scores = dict(
            zip(self.metrics(self.task), (float(normal == right), float(normalised == right)), strict=True)
        )
        return {
            "prompt": self.prompts[i].text,
            "completion": choices[normal],
            "extracted": choices[normal],
            "gold": choices[right],
            "score": scores["accuracy_loglik"],
            "metrics": scores,
            "logliks": values,
        }


class Perplexity(Scorer):
    """Perplexity of the rows' texts over all of them, per word or token; a row's own is no mean's part."""

    name = "perplexity"
    prompts_alone = False  # it reads texts
    counts: ClassVar[dict[str, str]] = {"word_perplexity": "words", "token_perplexity": "tokens"}

    def prepare(self, chosen: Sequence[int]) -> int:
        context = context_length(self.model.config)
        self.requests = {
            i: text_requests(self.tokenizer, self.task.target(self.rows[i]), context) for i in chosen
        }
        return 0

    def run(self, numbers: Sequence[int], seed: int, store: Store) -> None:
        places = [i for i in numbers for _ in self.requests[i]]
        values: dict[int, list[float]] = {i: [] for i in numbers}

        def done(at: int, value: float) -> None:
            i = places[at]
            values[i].append(value)
            if len(values[i]) == len(self.requests[i]):
                store(i, self._prediction(i, -sum(values[i])))

        requests = [request for i in numbers for request in self.requests[i]]
        logliks(self.model, requests, batch_size=self.batch_size, on_done=done)

    def _prediction(self, i: int, nats: float) -> Row:
        counted = {
            "words": self.task.n_words(self.rows[i]),
            "tokens": sum(len(after) for _, after in self.requests[i]),
        }
        text = self.task.target(self.rows[i])
        score = perplexity(nats, counted[self.counts[self.task.metric]])
        prediction = {"prompt": "", "completion": text, "extracted": None, "gold": None, "score": score}
        return {**prediction, "nats": nats, **counted}

    @classmethod
    def estimates(cls, task: Any, runs: Sequence[Records]) -> dict[str, Estimate]:
        records = runs[0]  # nothing is drawn: every run is the same
        nats = {i: record["nats"] for i, record in records.items()}
        counts = {name: cls.counts[name] for name in cls.metrics(task)}
        return {
            name: corpus_perplexity(nats, {i: record[count] for i, record in records.items()})
            for name, count in counts.items()
        }


SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (Generation, Loglik, Perplexity)}


def scorer_of(task: Any, name: str | None) -> type[Scorer]:
    """The way to score a task; None: the task's own. ValueError for one that the task does not offer."""
    if task.metric is None:
        raise ValueError(
            f"task {task.name} has no score; generate_samples.py writes completions of its prompts"
        )
    name = name or task.scoring[0]
    if name not in task.scoring:
        raise ValueError(f"task {task.name} cannot be scored by {name}, only by {', '.join(task.scoring)}")
    return SCORERS[name]
