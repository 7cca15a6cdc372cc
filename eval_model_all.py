"""Score a model on tasks: python eval_model_all.py --model PATH --datasets "gsm8k,..." [--sample ...]"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lota.config import default_cache
from lota.data import seeded_sample
from lota.decoding import Decoding
from lota.evaluation import Evaluator, Result, check_scored, load_pair, results_folder
from tasks import Task, get_task

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub id")
    add("--tokenizer_path", help="where the tokenizer is, if not with the model")
    add("--datasets", required=True, help="task names, separated by commas")
    add("--data_dir", help="holds tasks/<task>/<split>.*; default $PROJECT_CACHE, else ~/.cache/lota")
    add(
        "--out",
        help="results go to OUT/metrics; default: the model's folder; $PROJECT_CACHE/results/ID for a hub id",
    )
    add("--n_examples", type=int, default=0, help="a seeded sample of that many per task; 0: all (default)")
    add("--bs", type=int, default=64, help="prompts per batch (64); halves itself when memory runs out")
    add(
        "--seed",
        type=int,
        default=0,
        help="of the examples chosen and, with --sample, of the completions (0)",
    )
    add(
        "--num_runs",
        type=int,
        default=1,
        help="runs over the same examples, with seeds seed, seed+1, ... (1)",
    )
    add("--max_new_tokens", type=int, help="tokens per completion at most; default: each task's own")
    add("--dtype", help="float32, bfloat16 or float16; default: the model's own")
    add("--device", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    add("--sample", action="store_true", help="draw each token instead of taking the likeliest")
    for name, value in SAMPLING.items():
        add(f"--{name}", type=type(value), help=f"with --sample; default {value}")
    add("--verbose", action="store_true", help="show every prompt, completion and score")
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in SAMPLING if getattr(args, name) is not None]
    if given and not args.sample:
        parser.error(f"{', '.join(given)}: without --sample decoding is greedy; add --sample")
    if args.n_examples < 0 or args.bs < 1 or args.num_runs < 1:
        parser.error("--n_examples must be >= 0, --bs and --num_runs >= 1")
    return args


def decoding_for(task: Task, args: argparse.Namespace) -> Decoding:
    """How completions of a task are made; ValueError for settings that make no sense."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    max_new_tokens = task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    sampling = {**SAMPLING, **given} if args.sample else {}
    return Decoding(max_new_tokens, seed=args.seed, stop=task.stop, **sampling)


def held_out_rows(task: Task, data_dir: str | Path) -> list[dict]:
    check_scored(task)
    if task.held_out is None:
        raise ValueError(f"task {task.name} has no held-out split to be evaluated on")
    return task.load(task.held_out, data_dir)


def evaluate(args: argparse.Namespace) -> list[Result]:
    """Results of all tasks; what can be refused is refused before the model loads."""
    tasks = [get_task(name) for name in dict.fromkeys(name.strip() for name in args.datasets.split(","))]
    plans = [
        (task, held_out_rows(task, args.data_dir or default_cache()), decoding_for(task, args))
        for task in tasks
    ]
    loading = {name: getattr(args, name) for name in ("tokenizer_path", "dtype", "device")}
    model, tokenizer = load_pair(args.model, **loading)
    out_dir = results_folder(args.model, args.out)
    evaluator = Evaluator(model, tokenizer, model_name=args.model, out_dir=out_dir, batch_size=args.bs)
    results = []
    for task, rows, decoding in plans:
        chosen = seeded_sample(range(len(rows)), args.n_examples or len(rows), args.seed)
        with tqdm(
            total=len(chosen) * args.num_runs, desc=task.name, unit="example", disable=args.verbose
        ) as bar:

            def show(prediction: dict, bar: tqdm = bar) -> None:
                bar.update()
                if args.verbose:
                    print(*(f"[{key}] {value}" for key, value in prediction.items()), "", sep="\n")

            results.append(
                evaluator.evaluate(task, rows, decoding, chosen=chosen, num_runs=args.num_runs, on_done=show)
            )
    return results


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse(argv)
    try:
        results = evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for r in results:
        error = "" if r.stderr is None else f" +- {r.stderr:.4f}"
        print(f"{r.task:<20} {r.metric} {r.score:.4f}{error} (n={r.n}, version {r.version})")
    print(f"results in {results_folder(args.model, args.out) / 'metrics'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
