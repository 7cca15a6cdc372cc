"""Score a model on tasks: python eval_model_all.py --model PATH --datasets "gsm8k,..." [--sample ...]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lota.data.examples import VALIDATION
from lota.data.task import Row
from lota.distributed.processes import processes
from lota.evaluate import cli
from lota.evaluate.batching import context_length
from lota.evaluate.engine_choice import OPENAI, check_engine
from lota.evaluate.evaluator import EvaluationSettings, Evaluator, prepare_requests, result_file
from lota.evaluate.results import Result, compare, summarize, summary_table, write_summary
from lota.evaluate.scorers import TaskRequest
from lota.models.provenance import run_settings
from lota.models.scope import load_config
from lota.places import holding
from lota.utils import Problems
from tasks import EVALUATED_ON, evaluation_names, get_task

BATCH_SIZE = 64
SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
SCORINGS = {"generate": "generation", "loglik": "loglik"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.model_parser(__doc__, "--model")
    add = parser.add_argument
    add(
        "--datasets",
        required=True,
        help="task names, separated by commas; commonsense: its eight, mathinstruct: gsm8k, purebad: hexphi",
    )
    add("--n_examples", type=int, default=0, help="a seeded sample of that many per task; 0: all (default)")
    add("--bs", type=int, help=f"prompts per batch ({BATCH_SIZE}); halves itself when memory runs out")
    add(
        "--seed",
        type=int,
        default=0,
        help="of the examples chosen, those of --num_fewshot, and, with --sample, of the completions (0)",
    )
    add("--num_runs", type=int, default=1, help="runs over the same examples; run k draws with seed + k (1)")
    add("--num_fewshot", type=int, default=0, help="solved training examples in front of each prompt (0)")
    add(
        "--scoring",
        choices=SCORINGS,
        help="by completions or, for multiple choice, by the choices' log-likelihoods; default: generate; "
        "texts (wikitext) are always scored by perplexity",
    )
    add(
        "--whole_prompts",
        action="store_true",
        help="do not cut prompts as the model's training run did (max_length, max_prompt_length)",
    )
    add(
        "--split",
        choices=[VALIDATION],
        help="score validation rows, not the held-out split that results are reported on: those that "
        "training with validation_fraction left out, else the task's own; results: OUT/validation",
    )
    add("--validation_fraction", type=float, help="of the training rows (default: that of the model's run)")
    add("--compare", metavar="OTHER", help="a model, or its --out, that was evaluated on the same examples")
    add("--max_new_tokens", type=int, help="tokens per completion at most; default: each task's own")
    add("--sample", action="store_true", help="draw each token instead of taking the likeliest")
    for name, value in SAMPLING.items():
        add(f"--{name}", type=type(value), help=f"with --sample; default {value}")
    add("--verbose", action="store_true", help="show every prompt, completion and score")
    args = parser.parse_args(argv)
    args.sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.sampling and not args.sample:
        given = ", ".join(f"--{name}" for name in args.sampling)
        parser.error(f"{given}: without --sample decoding is greedy; add --sample")
    least = {"n_examples": 0, "seed": 0, "bs": 1, "num_runs": 1, "num_fewshot": 0}
    if args.validation_fraction is not None and args.split is None:
        parser.error("--validation_fraction: add --split validation")
    if wrong := cli.too_small(args, least):
        parser.error("; ".join(wrong))
    return args


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The summary of all tasks; what can be refused is refused before the model loads."""
    settings = EvaluationSettings(
        data_dir=args.data_dir,
        n_examples=args.n_examples,
        seed=args.seed,
        scoring=SCORINGS.get(args.scoring),
        num_fewshot=args.num_fewshot,
        sampling={**SAMPLING, **args.sampling} if args.sample else {},
        max_new_tokens=args.max_new_tokens,
        split=args.split,
        validation_fraction=validation_fraction(args) if args.split else 0.0,
        compare=of_split(cli.results_folder(args.compare), args) if args.compare else None,
    )
    out_dir = results_folder(args)
    problems = Problems()
    problems.attempt(check_engine, args)
    if args.engine != OPENAI:  # a server tells its model's context
        problems.attempt(lambda: check_context(args, context_length(load_config(args.model))))
    prepared = problems.attempt(prepare_requests, evaluation_names(args.datasets), get_task, settings)
    problems.refuse()
    assert prepared is not None
    prompter = cli.make_prompter(args, whole_prompts=args.whole_prompts)
    results, comparisons = [], {}
    with ExitStack() as held:
        for request, _ in prepared:
            held.enter_context(holding(result_file(out_dir, request)))
        engine = held.enter_context(cli.opened_engine(args, prompter.tokenizer, args.bs or BATCH_SIZE))
        problems.attempt(check_context, args, engine.context)
        for request, _ in prepared:
            problems.attempt(engine.check, None if request.scorer.reads else request.decoding)
        problems.refuse()
        evaluator = Evaluator(engine, prompter, model_name=cli.model_label(args), out_dir=out_dir)
        for request, other in prepared:
            results.append(score(evaluator, request, args))
            if other is not None:
                comparisons[request.task.name] = compare(request.task, results[-1], other)
    given = [name.strip() for name in args.datasets.split(",")]
    content = summarize(
        results,
        groups={name: EVALUATED_ON[name] for name in given if name in EVALUATED_ON},
        compared_with=args.compare,
        comparisons=comparisons,
    )
    write_summary(out_dir, content)
    return content


def results_folder(args: argparse.Namespace) -> Path:
    """Where results go."""
    return of_split(cli.choose_results_folder(args), args)


def of_split(folder: Path, args: argparse.Namespace) -> Path:
    """Results on validation rows stand apart from those on the held-out split."""
    return folder / args.split if args.split else folder


def validation_fraction(args: argparse.Namespace) -> float:
    """The share that is asked for, or that the model's run left out; ValueError if the run saw such rows."""
    run = run_settings(Path(args.model))
    left_out = run.validation_fraction or 0.0
    asked = left_out if args.validation_fraction is None else args.validation_fraction
    if not 0 <= asked < 1:
        raise ValueError(f"--validation_fraction {asked:g}: must be at least 0 and below 1")
    trained_on = {*run.datasets, *evaluation_names(run.datasets)}
    if asked > left_out and trained_on.intersection(evaluation_names(args.datasets)):
        raise ValueError(
            f"--validation_fraction {asked:g}: {args.model} was trained with validation_fraction="
            f"{left_out:g}, so that it has seen such rows: give at most that, or train with more left out"
        )
    return asked


def check_context(args: argparse.Namespace, context: int | None) -> None:
    """Raise ValueError if a completion of --max_new_tokens leaves no place for a prompt."""
    if args.max_new_tokens is not None and context is not None and args.max_new_tokens >= context:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens}: the model has {context} positions for prompt and "
            f"completion together; give at most {context - 1}"
        )


def score(evaluator: Evaluator, request: TaskRequest, args: argparse.Namespace) -> Result:
    """Score one task under a progress bar."""
    total = len(request.numbers) * (args.num_runs if request.scorer.draws else 1)
    with tqdm(total=total, desc=request.task.name, unit="example", disable=args.verbose) as bar:

        def show(prediction: Row) -> None:
            bar.update()
            if args.verbose:
                print(*(f"[{key}] {value}" for key, value in prediction.items()), "", sep="\n")

        return evaluator.evaluate(request, args.num_runs, show)


def work(args: argparse.Namespace) -> str:
    """What one of the command's processes does; returns the table that the first one shows."""
    if not processes().first:
        cli.help_first(args, args.bs or BATCH_SIZE)
        return ""
    content = evaluate(args)
    return f"{summary_table(content)}\nresults in {results_folder(args) / 'metrics'}"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parse, work, argv)


if __name__ == "__main__":
    sys.exit(main())
