"""Score a model on tasks: requests that are checked before it loads, predictions and results on disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lota.data.batches import seeded_sample
from lota.data.examples import held_out_rows, rows_of
from lota.data.prompts import FewShot, Prompter
from lota.data.task import FindTask, Row, Task
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import Engine
from lota.evaluate.journal import Journal
from lota.evaluate.results import Result, StoredRuns, now, read_stored_runs
from lota.evaluate.scorers import Records, Scorer, TaskRequest, find_scorer
from lota.places import fsync, holding
from lota.storage import atomic_path, content_key, cut, naming, whole_lines, write_json
from lota.utils import Problems

logger = logging.getLogger(__name__)


def result_file(out_dir: str | os.PathLike[str], request: TaskRequest) -> Path:
    """Where the result of a request is written; who holds it may write all files of that task."""
    return Path(out_dir) / "metrics" / f"{request.task.name}{request.scorer.suffix}.json"


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation asks of every task."""

    data_dir: str | os.PathLike[str]
    n_examples: int = 0  # a seeded sample of so many held-out rows; 0: all
    seed: int = 0
    scoring: str | None = None  # a name of `SCORERS`; None: each task's own
    num_fewshot: int = 0  # solved training rows in front of each prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings of `Decoding`; none: greedy
    max_new_tokens: int | None = None  # None: each task's own
    split: str | None = None  # validation; None: each task's held-out split
    validation_fraction: float = 0.0  # share of the training rows that is validation; 0: the task's own split
    compare: Path | None = None  # folder of another model's results

    def request(self, task: Task) -> TaskRequest:
        """What is scored of a task. Raises ValueError for settings or rows that cannot be."""
        # a text is always scored by its perplexity
        scoring = find_scorer(task, None if task.scoring == ("perplexity",) else self.scoring).name
        rows = held_out_rows(task, self.data_dir, self.split, self.validation_fraction)
        new_tokens = task.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return TaskRequest(
            task,
            rows,
            Decoding(new_tokens, seed=self.seed, stop=task.stop, **self.sampling),
            chosen=seeded_sample(range(len(rows)), self.n_examples or len(rows), self.seed),
            scoring=scoring,
            few_shot=self._few_shot(task, scoring) if self.num_fewshot else None,
        )

    def _few_shot(self, task: Task, scoring: str) -> FewShot:
        asked = f"num_fewshot={self.num_fewshot}: task {task.name}"
        if scoring == "perplexity":
            raise ValueError(f"{asked} scores texts, without prompts")
        if "train" not in task.splits:
            raise ValueError(f"{asked} has no train split to take examples from")
        rows = rows_of(task, "train", self.data_dir, self.validation_fraction)
        return FewShot(self.num_fewshot, self.seed, rows)


def prepare_requests(
    names: Iterable[str], find_task: FindTask, settings: EvaluationSettings
) -> list[tuple[TaskRequest, StoredRuns | None]]:
    """Returns what is scored of each task and, with `compare`, what the other model made of it.

    Raises one ValueError with the problems of all tasks.
    """

    def prepare(name: str) -> tuple[TaskRequest, StoredRuns | None]:
        request = settings.request(find_task(name))
        return request, read_stored_runs(settings.compare, request) if settings.compare else None

    problems = Problems()
    prepared = [problems.attempt(prepare, name) for name in names]
    problems.refuse()
    if not prepared:
        raise ValueError("the list of tasks names no task")
    return [found for found in prepared if found is not None]


class Evaluator:
    """A model that is scored on one task after another, with results in <out_dir>/metrics."""

    def __init__(
        self,
        engine: Engine,
        prompter: Prompter,
        *,
        model_name: str,
        out_dir: str | os.PathLike[str],
    ) -> None:
        self.engine, self.prompter, self.model_name = engine, prompter, model_name
        self.folder = Path(out_dir) / "metrics"

    def evaluate(
        self, request: TaskRequest, num_runs: int = 1, on_done: Callable[[Row], object] | None = None
    ) -> Result:
        """Score a request num_runs times: run k draws with seed + k; scoring that draws nothing has one run.

        Writes <task>.json (the result; with loglik all names start with <task>_loglik),
        <task>_predictions.jsonl (of run 0; _run1 ... for more), and appends a line per run to
        <task>_accuracy.txt, unless it has this result already. Predictions on disk are reused if weights,
        task version, data, seed, settings and template are the same; on_done is called with every prediction,
        old or new. Raises ValueError if another process scores this task into the same folder.
        """
        if num_runs < 1:
            raise ValueError(f"num_runs={num_runs}: must be at least 1")
        scorer = request.scorer(self.engine, self.prompter, request)
        n_cut = scorer.prepare()
        if n_cut:
            logger.warning("%s: %d of %d prompts cut to fit", scorer.stem, n_cut, len(request.numbers))
        key = self._key(scorer)
        file = result_file(self.folder.parent, request)
        with holding(file):
            runs = []
            for run in range(num_runs if scorer.draws else 1):
                runs.append(self._predict(scorer, run, key, on_done or (lambda prediction: None)))
                self._append_line(scorer, run, runs[-1])
            result = self._result(scorer, runs, key, n_cut)
            write_json(file, result.to_dict())
        return result

    def _key(self, scorer: Scorer) -> dict[str, Any]:
        """What decides the predictions, but for the seed."""
        task, few_shot = scorer.task, scorer.request.few_shot
        settings = {**scorer.settings, **self.engine.settings}
        key = {"task": task.name, "version": task.version, "data": content_key(list(scorer.rows))}
        key |= {**self.engine.key, "template": self.prompter.key, "settings": settings}
        return key | ({"few_shot": few_shot.key} if few_shot else {})

    def _predict(
        self, scorer: Scorer, run: int, key: Mapping[str, Any], on_done: Callable[[Row], object]
    ) -> Records:
        """The predictions of a run, those on disk and the missing ones."""
        decoding, numbers = scorer.request.decoding, scorer.request.numbers
        seed = decoding.seed + run
        # what draws nothing has the same predictions for every seed
        key = {**key, "seed": seed if scorer.draws and decoding.temperature > 0 else None}
        path = self.folder / f"{scorer.stem}_predictions{f'_run{run}' if run else ''}.jsonl"
        with Journal(path.with_suffix(".journal"), key, [path]) as journal:

            def store(i: int, prediction: Row) -> None:
                journal.add(i, prediction)
                on_done(prediction)

            missing = [i for i in numbers if i not in journal.records]
            for i in numbers:
                if i in journal.records:
                    on_done(journal.records[i])
            if missing:
                scorer.run(missing, seed, store)
        predictions = {i: journal.records[i] for i in numbers}
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(found, ensure_ascii=False) + "\n" for found in predictions.values())
        return predictions

    def _append_line(self, scorer: Scorer, run: int, records: Records) -> None:
        metric, found = next(iter(scorer.estimates(scorer.task, [records]).items()))
        line = f"{metric} {found.value} stderr {found.stderr} n {found.n}"
        line += f" seed {scorer.request.decoding.seed + run} version {scorer.task.version}"
        line = " ".join(f"{line} model {self.model_name}".split("\n"))
        path = self.folder / f"{scorer.stem}_accuracy.txt"
        if path.is_file():
            lines = list(whole_lines(path))
            if any(old.partition(b" ")[2] == line.encode() for _, old in lines):
                return  # an evaluation that was killed after it had written this, or is repeated
            cut(path, lines[-1][0] if lines else 0)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(f"{now()} {line}\n")
        fsync(path)  # the result that is written next lets nobody make this line again

    def _result(self, scorer: Scorer, runs: Sequence[Records], key: Mapping[str, Any], n_cut: int) -> Result:
        task = scorer.task
        estimates = scorer.estimates(task, runs)
        metric = next(iter(estimates))
        others = {name: value for name, value in key.items() if name not in ("task", "version", "settings")}
        return Result(
            task=task.name,
            version=task.version,
            scoring=scorer.name,
            seed=scorer.request.decoding.seed,
            settings={**key["settings"], **others, "batch_size": self.engine.batch_size},
            model=self.model_name,
            date=now(),
            n_cut=n_cut,
            runs=tuple(scorer.estimates(task, [records])[metric].value for records in runs),
            estimates=estimates,
            predictions=runs,
        )
