"""Score a model on a task: completions, what is read from them, mean and standard error, files on disk."""

from __future__ import annotations

import datetime
import functools
import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from lota.atomic import atomic_path, write_json
from lota.config import default_cache
from lota.data import encode_prompt
from lota.decoding import Decoding
from lota.generation import generate, prompt_bound
from lota.journal import Journal, content_key, model_key
from lota.models import dtype_of, load_config, load_model, load_tokenizer

logger = logging.getLogger(__name__)

Row = dict[str, Any]

NO_CHAT_TEMPLATE = "never"  # prompts are the task's own text, with no chat template around it


class ScoredTask(Protocol):
    """What evaluation needs to know of a task; `tasks.base.Task` is one."""

    name: str
    version: int
    metric: str | None
    closing: str
    chat: bool

    def prompt(self, row: Row) -> str: ...
    def gold(self, row: Row) -> str | None: ...
    def extract(self, completion: str) -> str | None: ...
    def score(self, extracted: str | None, gold: str | None) -> float: ...


@dataclass(frozen=True)
class Result:
    """Scores of one or several runs over the same n examples.

    score: fraction, the mean over examples (and runs); stderr: sample deviation over examples / sqrt(n),
    None for one example; seed: of the first run; settings: what the score depends on; runs: the score of
    each run.
    """

    task: str
    version: int
    metric: str
    score: float
    stderr: float | None
    n: int
    seed: int
    settings: dict[str, Any]
    model: str
    date: str
    runs: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `runs` only where there are several."""
        content = asdict(self)
        if len(self.runs) == 1:
            del content["runs"]
        return content


def load_pair(
    name_or_path: str,
    *,
    tokenizer_path: str | None = None,
    archive: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[Any, Any]:
    """Model and tokenizer as the scripts name them; None stands for the model's dtype, a GPU if there is one.

    Errors: ValueError, for the tokenizer, dtype or device before the model loads.
    """
    tokenizer = load_tokenizer(tokenizer_path or name_or_path)
    chosen = dtype_of(dtype) if dtype else load_config(name_or_path).dtype or torch.float32
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    model = load_model(name_or_path, archive=archive, dtype=chosen, device=device, tokenizer=tokenizer)
    return model, tokenizer


def results_folder(model: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Where results go: `out`, else the model's own folder, else $PROJECT_CACHE/results/<hub id>."""
    if out is not None:
        return Path(out).expanduser()
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else Path(default_cache()).expanduser() / "results" / model


def mean_and_stderr(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample deviation (n - 1) over sqrt(n); the latter is None for a single score."""
    mean = statistics.fmean(scores)
    return mean, statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_scored(task: ScoredTask) -> None:
    """Refuse a task that only provides prompts."""
    if task.metric is None:
        raise ValueError(
            f"task {task.name} has no score; generate_samples.py writes completions of its prompts"
        )


def encode_prompts(
    tokenizer: Any,
    config: Any,
    task: ScoredTask,
    prompts: Sequence[str],
    max_new_tokens: int,
    max_prompt_length: int | None = None,
) -> tuple[list[list[int]], int]:
    """Token ids of the prompts, cut to the model's context and max_prompt_length; how many were cut."""
    bound = prompt_bound(config, max_new_tokens, max_prompt_length)
    ids, n_cut = [], 0
    for prompt in prompts:
        whole = encode_prompt(tokenizer, prompt)
        if bound is not None and len(whole) > bound:
            n_cut += 1
            whole = encode_prompt(
                tokenizer, prompt, max_prompt_length=bound, closing=task.closing, keep_end=task.chat
            )
        ids.append(whole)
    return ids, n_cut


class Evaluator:
    """A loaded model that is scored on one task after another, with results in <out_dir>/metrics."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        model_name: str,
        out_dir: str | os.PathLike[str],
        batch_size: int = 16,
    ) -> None:
        self.model, self.tokenizer, self.model_name = model, tokenizer, model_name
        self.folder, self.batch_size = Path(out_dir) / "metrics", batch_size

    @functools.cached_property
    def model_key(self) -> dict[str, str]:
        return model_key(self.model, self.tokenizer)

    def evaluate(
        self,
        task: ScoredTask,
        rows: Sequence[Row],
        decoding: Decoding,
        *,
        chosen: Sequence[int] | None = None,
        num_runs: int = 1,
        on_done: Callable[[Row], None] | None = None,
    ) -> Result:
        """Score a task's rows, or those numbered `chosen`, num_runs times: run k draws with seed + k.

        Writes <task>.json (the result), <task>_predictions.jsonl (of run 0; _run1 ... for more), and
        appends a line per run to <task>_accuracy.txt. Predictions on disk are reused where weights, task
        version, data, seed, settings and template are the same; on_done is called with every prediction,
        old or new. Errors: ValueError for a task without a score, or nothing to score.
        """
        chosen = range(len(rows)) if chosen is None else chosen
        check_scored(task)
        if not chosen or num_runs < 1:
            raise ValueError(f"task {task.name}: {len(chosen)} examples, {num_runs} runs: nothing to score")
        settings = {**asdict(decoding), "dtype": str(self.model.dtype).removeprefix("torch.")}
        del settings["seed"]  # it has a place of its own
        key = {"task": task.name, "version": task.version, "data": content_key(list(rows)), **self.model_key}
        key |= {"template": NO_CHAT_TEMPLATE, "settings": settings}
        runs = []
        for run in range(num_runs):
            seeded = replace(decoding, seed=decoding.seed + run)
            path = self.folder / f"{task.name}_predictions{f'_run{run}' if run else ''}.jsonl"
            # greedy decoding draws nothing, so that its predictions are those of every seed
            run_key = {**key, "seed": seeded.seed if decoding.temperature else None}
            with Journal(path.with_suffix(".journal"), run_key, made_from_it=[path]) as journal:
                self._predict(task, rows, chosen, seeded, journal, on_done)
            predictions = [journal.records[i] for i in chosen]
            _write_lines(path, predictions)
            runs.append([prediction["score"] for prediction in predictions])
            self._append_line(task, seeded.seed, runs[-1])
        shared = {name: value for name, value in key.items() if name not in ("task", "version", "settings")}
        return self._write(task, runs, decoding.seed, {**settings, **shared, "batch_size": self.batch_size})

    def _predict(
        self,
        task: ScoredTask,
        rows: Sequence[Row],
        chosen: Sequence[int],
        decoding: Decoding,
        journal: Journal,
        on_done: Callable[[Row], None] | None,
    ) -> None:
        """Complete the journal with the predictions of all chosen rows."""
        report = on_done or (lambda prediction: None)
        for i in chosen:
            if i in journal.records:
                report(journal.records[i])
        missing = [i for i in chosen if i not in journal.records]
        prompts = [task.prompt(rows[i]) for i in missing]
        ids, n_cut = encode_prompts(self.tokenizer, self.model.config, task, prompts, decoding.max_new_tokens)
        if n_cut:
            logger.warning("%s: %d of %d prompts cut to fit the model's context", task.name, n_cut, len(ids))

        def store(at: int, completion: str) -> None:
            extracted, gold = task.extract(completion), task.gold(rows[missing[at]])
            # no answer scores 0 whatever a task's own score makes of it
            score = 0.0 if extracted is None else float(task.score(extracted, gold))
            prediction = {
                "prompt": prompts[at],
                "completion": completion,
                "extracted": extracted,
                "gold": gold,
            }
            journal.add(missing[at], {**prediction, "score": score})
            report(journal.records[missing[at]])

        generate(
            self.model,
            self.tokenizer,
            ids,
            batch_size=self.batch_size,
            indices=missing,
            on_done=store,
            **asdict(decoding),
        )

    def _append_line(self, task: ScoredTask, seed: int, scores: Sequence[float]) -> None:
        score, stderr = mean_and_stderr(scores)
        line = f"{now()} {task.metric} {score} stderr {stderr} n {len(scores)} seed {seed}"
        with (self.folder / f"{task.name}_accuracy.txt").open("a", encoding="utf-8") as file:
            file.write(f"{line} version {task.version} model {self.model_name}\n")

    def _write(
        self, task: ScoredTask, runs: Sequence[Sequence[float]], seed: int, settings: dict[str, Any]
    ) -> Result:
        # more runs over the same examples are no new examples: the deviation is that of the examples' means
        score, stderr = mean_and_stderr([statistics.fmean(scores) for scores in zip(*runs, strict=True)])
        result = Result(
            task=task.name,
            version=task.version,
            metric=task.metric or "",
            score=score,
            stderr=stderr,
            n=len(runs[0]),
            seed=seed,
            settings=settings,
            model=self.model_name,
            date=now(),
            runs=tuple(statistics.fmean(scores) for scores in runs),
        )
        write_json(self.folder / f"{task.name}.json", result.to_dict())
        return result


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: ScoredTask,
    rows: Sequence[Row],
    *,
    settings: Decoding,
    out_dir: str | os.PathLike[str],
    model_name: str,
    batch_size: int = 16,
    **more: Any,
) -> Result:
    """`Evaluator.evaluate` for a single task; more: chosen, num_runs, on_done."""
    evaluator = Evaluator(model, tokenizer, model_name=model_name, out_dir=out_dir, batch_size=batch_size)
    return evaluator.evaluate(task, rows, settings, **more)


def _write_lines(path: Path, records: Sequence[Row]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
