"""Ways to score a task: by the completions of its prompts, by log-likelihoods of choices, by perplexity."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from lota.data.prompts import FewShot, Fitted, Prompter
from lota.data.task import Row, Task
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import Engine
from lota.evaluate.estimates import Estimate, corpus_perplexity, mean, perplexity
from lota.evaluate.generation import prompt_bound
from lota.evaluate.loglik import Request, choice_requests, text_requests

Records = Mapping[int, Row]  # predictions by example number
Store = Callable[[int, Row], None]


@dataclass(frozen=True)
class TaskRequest:
    """What is scored of a task, and how. Raises ValueError for no rows or a scoring that the task lacks."""

    task: Task
    rows: Sequence[Row]  # all rows of the split
    decoding: Decoding
    chosen: Sequence[int] | None = None  # numbers of the rows that are scored; None: all
    scoring: str | None = None  # a name of `SCORERS`; None: the task's first
    few_shot: FewShot | None = None

    def __post_init__(self) -> None:
        _ = self.scorer
        if not self.numbers:
            raise ValueError(f"task {self.task.name}: no examples, nothing to score")

    @property
    def numbers(self) -> Sequence[int]:
        return range(len(self.rows)) if self.chosen is None else self.chosen

    @property
    def scorer(self) -> type[Scorer]:
        return find_scorer(self.task, self.scoring)


class Scorer:
    """Makes predictions of a task's rows, and numbers of predictions."""

    name: ClassVar[str]
    draws: ClassVar[bool] = False  # whether predictions depend on a seed, so that several runs differ
    reads: ClassVar[bool] = True  # whether it needs log-likelihoods, which not every engine can tell
    suffix: ClassVar[str] = ""  # of the task's name in the names of files

    def __init__(self, engine: Engine, prompter: Prompter, request: TaskRequest) -> None:
        self.engine, self.prompter, self.request = engine, prompter, request
        self.task, self.rows = request.task, request.rows
        self.tokenizer = prompter.tokenizer
        self.stem = self.task.name + self.suffix  # of the names of its files

    @property
    def settings(self) -> dict[str, Any]:
        """What predictions depend on, beside model, data, template and seed."""
        few_shot = self.request.few_shot
        found = {"scoring": self.name, "num_fewshot": few_shot.n if few_shot else 0}
        limits = self.prompter.limits if self.prompts_alone else None
        return {**found, "prompt_limits": asdict(limits)} if limits else found

    @property
    def prompts_alone(self) -> bool:
        """Whether the model reads prompts as in training: without examples in front."""
        return self.request.few_shot is None

    def prepare(self) -> int:
        """Make the prompts of the request; returns how many of them lost something to fit the context."""
        raise NotImplementedError

    def run(self, numbers: Sequence[int], seed: int, store: Store) -> None:
        """Hand the prediction of each numbered row to `store`, in any order."""
        raise NotImplementedError

    @staticmethod
    def metrics(task: Task) -> list[str]:
        """Names of the metrics, the one that counts as the score first."""
        assert task.metric is not None  # find_scorer refuses others
        return [task.metric, *task.more_metrics]

    @classmethod
    def estimates(cls, task: Task, runs: Sequence[Records]) -> dict[str, Estimate]:
        """Each metric over the examples of one or several runs; one that no example has is left out.

        More runs over the same examples are no new examples: errors are over the examples' means.
        """
        names, found = cls.metrics(task), dict[str, Estimate]()
        for name in names:
            scores = {}
            for i in runs[0]:
                values = [_value(records[i], name, names) for records in runs]
                known = [value for value in values if value is not None]
                if len(known) == len(runs):
                    scores[i] = statistics.fmean(known)
            if scores:
                found[name] = mean(scores)
        return found

    def _fit(self, i: int, bound: int | None) -> Fitted:
        """The prompt of a row, with its examples in front."""
        few_shot, row = self.request.few_shot, self.rows[i]
        examples = [] if few_shot is None else few_shot.examples(self.task, row, i)
        return self.prompter.fit(self.task, row, examples, bound)


def _value(record: Row, name: str, names: Sequence[str]) -> float | None:
    return record["score"] if name == names[0] else record["metrics"].get(name)


class Generation(Scorer):
    """What the task extracts from the completion of each prompt, and makes of it."""

    name = "generation"
    draws = True
    reads = False

    @property
    def settings(self) -> dict[str, Any]:
        decoding = asdict(self.request.decoding)
        del decoding["seed"]  # it has a place of its own
        return {**decoding, **super().settings}

    def prepare(self) -> int:
        bound = prompt_bound(self.engine.context, self.request.decoding.max_new_tokens)
        self.prompts = {i: self._fit(i, bound) for i in self.request.numbers}
        return sum(fitted.shortened for fitted in self.prompts.values())

    def run(self, numbers: Sequence[int], seed: int, store: Store) -> None:
        self.engine.complete(
            [self.prompts[i].ids for i in numbers],
            replace(self.request.decoding, seed=seed),
            indices=numbers,
            on_done=lambda at, text: store(numbers[at], self._prediction(numbers[at], text)),
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
            "score": 0.0 if extracted is None else float(found[self.metrics(task)[0]]),
        }
        return {**prediction, "metrics": found} if task.more_metrics else prediction


class _LoglikScorer(Scorer):
    """Reads log-likelihoods, several of each row."""

    requests: dict[int, list[Request]]  # by example number

    def run(self, numbers: Sequence[int], seed: int, store: Store) -> None:
        places = [(i, place) for i in numbers for place in range(len(self.requests[i]))]
        values: dict[int, dict[int, float]] = {i: {} for i in numbers}

        def done(at: int, value: float) -> None:
            i, place = places[at]
            values[i][place] = value
            if len(values[i]) == len(self.requests[i]):
                store(i, self._prediction(i, [values[i][k] for k in range(len(values[i]))]))

        requests = [self.requests[i][place] for i, place in places]
        self.engine.logliks(requests, on_done=done)

    def _prediction(self, i: int, values: list[float]) -> Row:
        """values: the log-likelihoods of the row's requests, in nats."""
        raise NotImplementedError


class Loglik(_LoglikScorer):
    """The likeliest of the row's choices after the prompt; normalised: per character of the choice.

    Equal choices: the first one counts.
    """

    name = "loglik"
    suffix = "_loglik"

    @staticmethod
    def metrics(task: Task) -> list[str]:
        return ["accuracy_loglik", "accuracy_loglik_norm"]

    def prepare(self) -> int:
        context = self.engine.readable
        self.prompts, self.requests, n_cut = {}, {}, 0
        for i in self.request.numbers:
            choices = self.task.choices(self.rows[i])
            longest = max(len(self.tokenizer(choice).input_ids) for choice in choices)
            fitted = self._fit(i, None if context is None else context - longest)
            self.prompts[i] = fitted.prompt
            self.requests[i], cut = choice_requests(
                self.tokenizer, fitted.prompt, choices, context, fitted.limit
            )
            n_cut += cut or fitted.lost > 0
        return n_cut

    def _prediction(self, i: int, values: list[float]) -> Row:
        choices, right = self.task.choices(self.rows[i]), self.task.choice(self.rows[i])
        normal = values.index(max(values))
        per_character = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        normalised = per_character.index(max(per_character))
        scores = {
            "accuracy_loglik": float(normal == right),
            "accuracy_loglik_norm": float(normalised == right),
        }
        return {
            "prompt": self.prompts[i].text,
            "completion": choices[normal],
            "extracted": choices[normal],
            "gold": choices[right],
            "score": scores["accuracy_loglik"],
            "metrics": scores,
            "logliks": values,
        }


class Perplexity(_LoglikScorer):
    """Perplexity of the rows' texts, per word or token: over all texts; that of each row is not averaged."""

    name = "perplexity"
    prompts_alone = False  # it reads texts
    counts: ClassVar[dict[str, str]] = {"word_perplexity": "words", "token_perplexity": "tokens"}

    def prepare(self) -> int:
        context = self.engine.readable
        self.requests = {
            i: text_requests(self.tokenizer, self.task.target(self.rows[i]), context)
            for i in self.request.numbers
        }
        return 0

    def _prediction(self, i: int, values: list[float]) -> Row:
        nats = -sum(values)
        counted = {
            "words": self.task.n_words(self.rows[i]),
            "tokens": sum(len(after) for _, after in self.requests[i]),
        }
        text = self.task.target(self.rows[i])
        score = perplexity(nats, counted[self.counts[self.metrics(self.task)[0]]])
        prediction = {"prompt": "", "completion": text, "extracted": None, "gold": None, "score": score}
        return {**prediction, "nats": nats, **counted}

    @classmethod
    def estimates(cls, task: Task, runs: Sequence[Records]) -> dict[str, Estimate]:
        records = runs[0]  # nothing is drawn: every run is the same
        nats = {i: record["nats"] for i, record in records.items()}
        counts = {name: cls.counts[name] for name in cls.metrics(task)}
        return {
            name: corpus_perplexity(nats, {i: record[count] for i, record in records.items()})
            for name, count in counts.items()
        }


SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (Generation, Loglik, Perplexity)}


def find_scorer(task: Task, name: str | None) -> type[Scorer]:
    """The way to score a task; None: the task's own. ValueError for one that the task does not offer."""
    if task.metric is None:
        raise ValueError(
            f"task {task.name} has no score; generate_samples.py writes completions of its prompts"
        )
    name = name or task.scoring[0]
    if name not in task.scoring:
        raise ValueError(f"task {task.name} cannot be scored by {name}, only by {', '.join(task.scoring)}")
    return SCORERS[name]
