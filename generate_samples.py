"""Write completions of prompts in AlpacaEval's format, one file per temperature and sample."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lota.evaluate.alpaca import Sampler, decodings
from lota.evaluate.cli import add_shared, loaded, prompter_of, results_of
from tasks import get_task
from tasks.base import Row
from tasks.chat import ChatTask
from tasks.prompts import PROMPTS

PROMPT_SETS = ("alpaca_eval", "sharegpt", "ultrafeedback")
SETS = ", ".join(PROMPT_SETS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt_set", default=PROMPT_SETS[0], help=f"{SETS}, or a .json or .jsonl file of prompts")
    add("--split", help="of the prompt set; default: the one held out from training, if it has one")
    files = "answers to each prompt; the second and later ones are in files NAME_sample1.json ... (1)"
    add("--num_samples_per_prefix", type=int, default=1, help=files)
    add("--temperatures", default="0.7", help="separated by commas; 0 is greedy (0.7)")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of this probability together (1)",
    )
    add("--top_k", type=int, default=0, help="draw from that many tokens; 0: all (0)")
    add("--model_name", required=True, help="the samples' `generator`")
    add("--model_path", required=True, help="Hugging Face folder or hub id")
    add("--archive", help="weights on top of the model: a folder with policy.pt, or a converted one")
    add_shared(add)
    add("--max_length", type=int, default=1024, help="tokens of prompt and completion (1024)")
    add("--max_prompt_length", type=int, default=512, help="tokens of the prompt (512)")
    add("--chunk_size", type=int, default=32, help="prompts per batch; the file is written after each (32)")
    add("--seed", type=int, default=0, help="of the draws; each prompt and sample has its own (0)")
    add("--ff", type=int, default=0, help="pass over that many prompts at the start (0)")
    add("--n_examples", type=int, default=0, help="that many prompts after those; 0: all (0)")
    return parser.parse_args(argv)


def read_prompts(args: argparse.Namespace) -> tuple[ChatTask, list[Row]]:
    """Task and rows of a prompt set."""
    if args.prompt_set in PROMPT_SETS:
        task = get_task(args.prompt_set)
        return task, task.load(args.split or task.held_out or task.splits[0], args.data_dir)
    if Path(args.prompt_set).suffix:
        return PROMPTS, PROMPTS.read(args.prompt_set)
    raise ValueError(f"--prompt_set {args.prompt_set}: neither {SETS} nor a .json or .jsonl file")


def sample(args: argparse.Namespace) -> list[Path]:
    """The files written; what can be refused is refused before the model loads."""
    task, rows = read_prompts(args)
    plans = decodings(args, task.stop)
    chosen = range(len(rows))[args.ff :][: args.n_examples or None]
    if not chosen:
        raise ValueError(f"--ff {args.ff} leaves none of the {len(rows)} prompts of {args.prompt_set}")
    folder = results_of(args, args.model_path)
    prompter = prompter_of(args, args.model_path)
    prompts = [prompter.prompt(task, row) for row in rows]
    instructions = [task.instruction(row) for row in rows]
    model, tokenizer = loaded(args, args.model_path, prompter, args.archive)
    bounds = {"max_prompt_length": args.max_prompt_length, "chunk_size": args.chunk_size}
    sampler = Sampler(model, tokenizer, task, generator=args.model_name, prompter=prompter, **bounds)
    paths = []
    for decoding, number in itertools.product(plans, range(args.num_samples_per_prefix)):
        name = f"{Path(args.prompt_set).stem}_temp{decoding.temperature}"
        name += f"_sample{number}.json" if number else ".json"
        paths.append(folder / name)
        with tqdm(total=len(chosen), desc=name, unit="prompt") as bar:
            more = {"prompts": prompts, "sample": number, "chosen": chosen, "on_done": bar.update}
            sampler.write(paths[-1], instructions, decoding, **more)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        paths = sample(parse(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("samples in", *paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
