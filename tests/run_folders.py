"""Run folders for tests, with the files of a run and numbers of one's choice."""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict
from pathlib import Path

import runs
import torch
import yaml

from lota.config import Config
from lota.evaluate.estimates import mean
from lota.evaluate.results import Result, summarize, write_summary
from lota.train.checkpoint import Progress
from lota.train.run_folder import RunFolder


def write_run(
    folder: Path, *overrides: str, log: list[dict] | None = None, scores: dict | None = None
) -> Path:
    """A run folder. overrides: settings as on the command line; log: lines of metrics.jsonl.

    scores: task -> scores of its examples, as if epoch-1 had been evaluated.
    """
    folder.mkdir(parents=True)
    content = asdict(runs.settings(*overrides))
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps({"device": "cpu (test)"}), encoding="utf-8")
    if log is not None:
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in log), encoding="utf-8"
        )
    (folder / "epoch-1").mkdir()
    (folder / "epoch-1" / "policy.pt").write_bytes(b"not read")
    if scores:
        results = [_result(task, values) for task, values in scores.items()]
        write_summary(folder / "epoch-1", summarize(results))
    return folder


def finished_run(config, content: str = "old") -> Path:
    """A folder that looks like one of a finished run."""
    run = config.run_dir
    (run / "step-80").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "step-80/policy.pt"):
        (run / name).write_text(content)
    return run


def folder_state(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def write_checkpoint(run: Path, name: str, step: int, finished: bool = False, **seen: str | None) -> None:
    """The files of a whole checkpoint, of an age that had no checksums. seen: what the run was made from."""
    (run / name).mkdir(parents=True)
    (run / name / "policy.pt").touch()
    progress = asdict(Progress(step=step, finished=finished))
    torch.save({"progress": progress, **seen}, run / name / "resume.pt")


def looked(config: Config) -> RunFolder:
    folder = RunFolder(config)
    folder.look()
    return folder


def begun_run(config: Config, *checkpoints: str) -> Path:
    """A run with these settings that has written these checkpoints and ended."""
    with looked(config) as folder:
        for step, name in enumerate(checkpoints, start=1):
            write_checkpoint(folder.path, name, step)
    return folder.path


def _result(task: str, values: list[float]) -> Result:
    found = mean(dict(enumerate(values)))
    return Result(
        task=task,
        version=1,
        seed=0,
        settings={},
        model="m",
        date="2026-01-01",
        runs=(found.value,),
        scoring="completion",
        n_cut=0,
        estimates={"exact_match": found},
        predictions=[],
    )


def log_of(losses: list[float], every: int = 8) -> list[dict]:
    """Lines of a log: a training loss per step, a held-out loss after each second one."""
    lines = []
    for step, loss in enumerate(losses, start=1):
        numbers = {"loss/train": 9 * loss, "nats_per_token/train": loss}
        speed = {"tokens_per_second": 100.0 * step, "peak_memory_bytes": 2**28 + step}
        lines.append({"examples": every * step, "step": step, **numbers, "lr": 1e-3, **speed})
        if step % 2 == 0:
            lines.append({"examples": every * step, "step": step, "nats_per_token/eval": loss + 0.1})
    return lines


def rated_mask(path, density: float, score: str, seed: int = 0) -> str:
    """A mask of the embedded model that says what rated its entries and at which sparsity."""
    mask = runs.write_mask(path, density, seed)
    mask.meta |= {"score": score, "sparsity": 1 - density}
    mask.save(path)
    return f"mask_path={path}"


def tables(text: str) -> dict[str, list[list[str]]]:
    """Tables of the page by the title above them."""
    found = {}
    for part in text.split("<h2>")[1:]:
        rows = re.findall(r"<tr>(.*?)</tr>", part)
        title = html.unescape(part.split("</h2>")[0])
        found[title] = [[html.unescape(c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]
    return found
