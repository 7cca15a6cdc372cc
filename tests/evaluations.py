"""Evaluations of a tiny random model, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from lota.data.prompts import Prompter
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import TransformersEngine
from lota.evaluate.evaluator import Evaluator
from lota.evaluate.results import Result
from lota.evaluate.scorers import TaskRequest


def score(model_and_tokenizer, folder, task, rows, decoding=None, num_runs=1, on_done=None, **more) -> Result:
    """Score rows with results in `folder`; more: fields of TaskRequest."""
    model, tokenizer = model_and_tokenizer
    request = TaskRequest(task, rows, decoding or Decoding(12), **more)
    engine = TransformersEngine(model, tokenizer, batch_size=3)
    evaluator = Evaluator(engine, Prompter(tokenizer), model_name="m", out_dir=folder)
    return evaluator.evaluate(request, num_runs, on_done)


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(data_dir: Path, task: str, split: str, rows: list[dict]) -> None:
    """Rows of a task, where it looks for them."""
    path = data_dir / "tasks" / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
