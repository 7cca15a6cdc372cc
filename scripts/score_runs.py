"""Convert and evaluate the last checkpoint of every run below ROOT that has no score yet, in one process.

    python -m scripts.score_runs ROOT --task gsm8k [--base_out FOLDER] [arguments of eval_model_all.py]

Each run goes through `convert_policy_to_hf_resize.py`, with its defaults, and `eval_model_all.py`.
--base_out: where the results of the weights go that the runs started from.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import convert_policy_to_hf_resize
import eval_model_all
from lota.config import Config
from lota.models.policy import is_policy, model_folder
from lota.settings import stored_settings
from lota.train.checkpoint import POLICY, newest_checkpoint


def base_of(run: Path) -> str:
    """The weights that a run started from."""
    model = stored_settings(run / "config.yaml", Config())["model"]
    return model["archive"] or model["name_or_path"]


def config_of(run: Path) -> str:
    """Folder or hub id that has the config of a run's model."""
    model = stored_settings(run / "config.yaml", Config())["model"]
    return model_folder(model["name_or_path"], model["archive"])


def has_score(folder: Path, task: str) -> bool:
    return (folder / "metrics" / f"{task}.json").is_file()


def score_run(run: Path, task: str, more: list[str]) -> None:
    """Nothing happens where the last checkpoint has a score, or where there is none yet."""
    newest = newest_checkpoint(run)
    if newest is None or has_score(newest[0], task):
        return
    folder = newest[0]
    print(f"\n=== {run}", flush=True)
    convert_policy_to_hf_resize.main(
        ["--model_path", config_of(run), "--policy_path", str(folder / POLICY), "--save_path", str(folder)]
    )
    evaluate(str(folder), folder, task, more)


def evaluate(model: str, out: Path, task: str, more: list[str]) -> None:
    if eval_model_all.main(["--model", model, "--datasets", task, "--out", str(out), *more]):
        sys.exit(f"score_runs.py: {model} could not be evaluated")
    gc.collect()  # the next model needs the memory of this one


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder with the runs, at any depth")
    parser.add_argument("--task", required=True, help="what to score on")
    parser.add_argument("--base_out", type=Path, help="also score the base: OUT/metrics of this folder")
    args, more = parser.parse_known_args(arguments)
    runs = [path.parent for path in sorted(args.root.rglob("config.yaml"))]
    if not runs:
        sys.exit(f"score_runs.py: no run below {args.root}")
    if args.base_out is not None and not has_score(args.base_out, args.task):
        bases = {base_of(run) for run in runs}
        if len(bases) > 1:
            sys.exit(f"score_runs.py: the runs start from several models, {sorted(bases)}: omit --base_out")
        base = bases.pop()
        if is_policy(base):
            sys.exit(f"score_runs.py: the runs start from {base}: convert it first, or omit --base_out")
        evaluate(base, args.base_out, args.task, more)
    for run in runs:
        score_run(run, args.task, more)


if __name__ == "__main__":
    main()
