"""Score a model on tasks: python eval_model_all.py --model PATH --datasets "gsm8k,..." [--sample ...]"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from lota.data.prompts import recorded_limits
from lota.evaluate.cli import add_shared, loaded, named, prompter_of, results_folder, results_of, trained_as
from lota.evaluate.compare import compared
from lota.evaluate.evaluator import Evaluator, Result
from lota.evaluate.plan import Plan, Wanted, plans_of
from lota.evaluate.summary import summary, table, write_summary
from tasks import EVALUATED_ON, evaluation_names, get_task

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
SCORINGS = {"generate": "generation", "loglik": "loglik"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub id")
    names = "task names, separated by commas; commonsense: its eight, mathinstruct: gsm8k, purebad: hexphi"
    add("--datasets", required=True, help=names)
    add_shared(add)
    add("--n_examples", type=int, default=0, help="a seeded sample of that many per task; 0: all (default)")
    add("--bs", type=int, default=64, help="prompts per batch (64); halves itself when memory runs out")
    seed = "of the examples chosen, those of --num_fewshot, and, with --sample, of the completions (0)"
    add("--seed", type=int, default=0, help=seed)
    add(
        "--num_runs",
        type=int,
        default=1,
        help="runs over the same examples, with seeds seed, seed+1, ... (1)",
    )
    add("--num_fewshot", type=int, default=0, help="solved training examples in front of each prompt (0)")
    scoring = "by completions or, for multiple choice, by the choices' log-likelihoods; default: generate; "
    add("--scoring", choices=SCORINGS, help=f"{scoring}texts (wikitext) are always scored by perplexity")
    whole = "do not cut prompts as the model's training run did (max_length, max_prompt_length)"
    add("--whole_prompts", action="store_true", help=whole)
    add("--compare", metavar="OTHER", help="a model, or its --out, that was evaluated on the same examples")
    add("--max_new_tokens", type=int, help="tokens per completion at most; default: each task's own")
    add("--sample", action="store_true", help="draw each token instead of taking the likeliest")
    for name, value in SAMPLING.items():
        add(f"--{name}", type=type(value), help=f"with --sample; default {value}")
    add("--verbose", action="store_true", help="show every prompt, completion and score")
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in SAMPLING if getattr(args, name) is not None]
    if given and not args.sample:
        parser.error(f"{', '.join(given)}: without --sample decoding is greedy; add --sample")
    if args.n_examples < 0 or args.num_fewshot < 0 or args.bs < 1 or args.num_runs < 1:
        parser.error("--n_examples and --num_fewshot must be >= 0, --bs and --num_runs >= 1")
    return args


def wanted(args: argparse.Namespace) -> Wanted:
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return Wanted(
        data_dir=args.data_dir,
        n_examples=args.n_examples,
        seed=args.seed,
        scoring=SCORINGS.get(args.scoring),
        num_fewshot=args.num_fewshot,
        sampling={**SAMPLING, **given} if args.sample else None,
        max_new_tokens=args.max_new_tokens,
        compare=results_folder(args.compare) if args.compare else None,
    )


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The summary of all tasks; what can be refused is refused before the model loads."""
    plans = plans_of(evaluation_names(args.datasets), get_task, wanted(args))
    out_dir = results_of(args, args.model)
    limits = None if args.whole_prompts else recorded_limits(trained_as(args, args.model))
    prompter = prompter_of(args, args.model, limits)
    model, tokenizer = loaded(args, args.model, prompter)
    more = {
        "model_name": named(args, args.model),
        "out_dir": out_dir,
        "batch_size": args.bs,
        "prompter": prompter,
    }
    evaluator = Evaluator(model, tokenizer, **more)
    results = [run(evaluator, plan, args) for plan in plans]
    given = [name.strip() for name in args.datasets.split(",")]
    pairs = zip(plans, results, strict=True)
    content = summary(
        results,
        groups={name: EVALUATED_ON[name] for name in given if name in EVALUATED_ON},
        compared_with=args.compare,
        comparisons={p.task.name: compared(p.task, result, p.other) for p, result in pairs if p.other},
    )
    write_summary(out_dir, content)
    return content


def run(evaluator: Evaluator, plan: Plan, args: argparse.Namespace) -> Result:
    """Score one task under a progress bar."""
    total = len(plan.chosen) * (args.num_runs if plan.draws else 1)
    with tqdm(total=total, desc=plan.task.name, unit="example", disable=args.verbose) as bar:

        def show(prediction: dict) -> None:
            bar.update()
            if args.verbose:
                print(*(f"[{key}] {value}" for key, value in prediction.items()), "", sep="\n")

        return evaluator.evaluate(
            plan.task,
            plan.rows,
            plan.decoding,
            chosen=plan.chosen,
            num_runs=args.num_runs,
            on_done=show,
            scoring=plan.scoring,
            few_shot=plan.few_shot,
        )


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse(argv)
    try:
        content = evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(content))
    print(f"results in {results_of(args, args.model) / 'metrics'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
