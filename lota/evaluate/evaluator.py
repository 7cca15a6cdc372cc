"""Score a model on a task: predictions, what they amount to with which error, files on disk."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lota.data.prompts import NO_CHAT_TEMPLATE, FewShot, Prompter
from lota.data.task import Task
from lota.evaluate.cli import load_model_and_tokenizer, results_folder
from lota.evaluate.decoding import Decoding
from lota.evaluate.estimates import mean_and_stderr
from lota.evaluate.journal import Journal
from lota.evaluate.results import Result, now, write_lines, write_result
from lota.evaluate.scorers import Records, Scorer, scorer_of
from lota.models.hashing import model_key
from lota.utils import content_key

__all__ = [
    "NO_CHAT_TEMPLATE",
    "Evaluator",
    "Result",
    "Task",
    "check_scored",
    "evaluate_task",
    "load_model_and_tokenizer",
    "mean_and_stderr",
    "results_folder",
]
logger = logging.getLogger(__name__)
Row = dict[str, Any]


def check_scored(task: Task) -> None:
    """Refuse a task that only provides prompts."""
    if task.metric is None:
        raise ValueError(
            f"task {task.name} has no score; generate_samples.py writes completions of its prompts"
        )


class Evaluator:
    """A loaded model that is scored on one task after another, with results in <out_dir>/metrics.

    prompter: how rows become prompts; None: the tasks' own texts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        model_name: str,
        out_dir: str | os.PathLike[str],
        batch_size: int = 16,
        prompter: Prompter | None = None,
    ) -> None:
        self.model, self.tokenizer, self.model_name = model, tokenizer, model_name
        self.folder, self.batch_size = Path(out_dir) / "metrics", batch_size
        self.prompter = prompter or Prompter(tokenizer)

    @functools.cached_property
    def model_key(self) -> dict[str, str]:
        return model_key(self.model, self.tokenizer)

    def evaluate(
        self,
        task: Task,
        rows: Sequence[Row],
        decoding: Decoding,
        *,
        chosen: Sequence[int] | None = None,
        num_runs: int = 1,
        on_done: Callable[[Row], None] | None = None,
        scoring: str | None = None,
        few_shot: FewShot | None = None,
    ) -> Result:
        """Score a task's rows, or those numbered `chosen`, num_runs times: run k draws with seed + k.

        scoring: a name of `SCORERS`; None: the task's first. Writes <task>.json (the result; with loglik all
        names start with <task>_loglik), <task>_predictions.jsonl (of run 0; _run1 ... for more), and appends
        a line per run to <task>_accuracy.txt. Predictions on disk are reused where weights, task version,
        data, seed, settings and template are the same; on_done is called with every prediction, old or new.
        Scoring that draws nothing has one run. Errors: ValueError for a task without that score, or nothing
        to score.
        """
        chosen = range(len(rows)) if chosen is None else chosen
        if not chosen or num_runs < 1:
            check_scored(task)
            raise ValueError(f"task {task.name}: {len(chosen)} examples, {num_runs} runs: nothing to score")
        kind = scorer_of(task, scoring)
        scorer = kind(
            self.model,
            self.prompter,
            task,
            rows,
            decoding=decoding,
            few_shot=few_shot,
            batch_size=self.batch_size,
        )
        n_cut = scorer.prepare(chosen)
        if n_cut:
            logger.warning("%s: %d of %d prompts cut to fit", task.name, n_cut, len(chosen))
        key = self._key(scorer)
        runs, stem = [], task.name + kind.suffix
        for run in range(num_runs if kind.draws else 1):
            seed = decoding.seed + run
            runs.append(self._run(scorer, chosen, run, seed, key, on_done))
            self._append_line(stem, scorer, runs[-1], seed)
        result = self._result(scorer, runs, key, n_cut)
        write_result(self.folder / f"{stem}.json", result)
        return result

    def _result(self, scorer: Scorer, runs: Sequence[Records], key: Mapping[str, Any], n_cut: int) -> Result:
        task = scorer.task
        estimates = scorer.estimates(task, runs)
        metric = next(iter(estimates))
        more = {name: value for name, value in key.items() if name not in ("task", "version", "settings")}
        return Result(
            task=task.name,
            version=task.version,
            metric=metric,
            score=estimates[metric].value,
            stderr=estimates[metric].stderr,
            n=len(runs[0]),
            seed=scorer.decoding.seed,
            settings={**key["settings"], **more, "batch_size": self.batch_size},
            model=self.model_name,
            date=now(),
            runs=tuple(scorer.estimates(task, [records])[metric].value for records in runs),
            scoring=scorer.name,
            n_cut=n_cut,
            estimates=estimates,
            predictions=runs,
        )

    def _key(self, scorer: Scorer) -> dict[str, Any]:
        """What decides the predictions, but for the seed."""
        task = scorer.task
        settings = {**scorer.settings, "dtype": str(self.model.dtype).removeprefix("torch.")}
        key = {"task": task.name, "version": task.version, "data": content_key(list(scorer.rows))}
        key |= {**self.model_key, "template": self.prompter.key, "settings": settings}
        return key | ({"few_shot": scorer.few_shot.key} if scorer.few_shot else {})

    def _run(
        self,
        scorer: Scorer,
        chosen: Sequence[int],
        run: int,
        seed: int,
        key: dict[str, Any],
        on_done: Callable[[Row], None] | None,
    ) -> Records:
        """The predictions of a run, those on disk and the missing ones."""
        report = on_done or (lambda prediction: None)
        name = f"{scorer.task.name}{scorer.suffix}_predictions{f'_run{run}' if run else ''}"
        path = self.folder / f"{name}.jsonl"
        # what draws nothing has the same predictions for every seed
        draws = scorer.draws and scorer.decoding.temperature > 0
        with Journal(
            path.with_suffix(".journal"), {**key, "seed": seed if draws else None}, [path]
        ) as journal:
            for i in chosen:
                if i in journal.records:
                    report(journal.records[i])

            def store(i: int, prediction: Row) -> None:
                journal.add(i, prediction)
                report(prediction)

            missing = [i for i in chosen if i not in journal.records]
            if missing:
                scorer.run(missing, seed, store)
        predictions = {i: journal.records[i] for i in chosen}
        write_lines(path, list(predictions.values()))
        return predictions

    def _append_line(self, stem: str, scorer: Scorer, records: Records, seed: int) -> None:
        task = scorer.task
        metric, found = next(iter(scorer.estimates(task, [records]).items()))
        line = f"{now()} {metric} {found.value} stderr {found.stderr} n {found.n} seed {seed}"
        with (self.folder / f"{stem}_accuracy.txt").open("a", encoding="utf-8") as file:
            file.write(f"{line} version {task.version} model {self.model_name}\n")


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    *,
    settings: Decoding,
    out_dir: str | os.PathLike[str],
    model_name: str,
    batch_size: int = 16,
    prompter: Prompter | None = None,
    **more: Any,
) -> Result:
    """`Evaluator.evaluate` for a single task; more: chosen, num_runs, on_done, scoring, few_shot."""
    evaluator = Evaluator(
        model, tokenizer, model_name=model_name, out_dir=out_dir, batch_size=batch_size, prompter=prompter
    )
    return evaluator.evaluate(task, rows, settings, **more)
