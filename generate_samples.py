"""Write completions of prompts in AlpacaEval's format, one file per temperature and sample."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lota.config import default_cache
from lota.decoding import Decoding
from lota.evaluation import load_pair, results_folder
from lota.models import load_tokenizer
from lota.prompting import CHAT_TEMPLATES, Prompter, recorded_choice
from lota.samples import Sampler
from tasks import Task, get_task
from tasks.base import Row, read_rows

PROMPT_SETS = ("alpaca_eval", "sharegpt", "ultrafeedback")
SETS = ", ".join(PROMPT_SETS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt_set", default=PROMPT_SETS[0], help=f"{SETS}, or a .json or .jsonl file of {{instruction}}")
    add("--split", help="of the prompt set; default: the one held out from training, if it has one")
    add(
        "--num_samples_per_prefix",
        type=int,
        default=1,
        help="answers to each prompt; the second and later ones are in files NAME_sample1.json ... (1)",
    )
    add("--temperatures", default="0.7", help="separated by commas; 0 is greedy (0.7)")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens with this probability together (1)",
    )
    add("--top_k", type=int, default=0, help="draw from that many tokens; 0: all (0)")
    add("--model_name", required=True, help="the samples' `generator`")
    add("--model_path", required=True, help="Hugging Face folder or hub id")
    add("--tokenizer_path", help="where the tokenizer is, if not with the model")
    add("--archive", help="weights on top of the model: a folder with policy.pt, or a converted one")
    add("--max_length", type=int, default=1024, help="tokens of prompt and completion (1024)")
    add("--max_prompt_length", type=int, default=512, help="tokens of the prompt (512)")
    add("--chunk_size", type=int, default=32, help="prompts per batch; the file is written after each (32)")
    add("--seed", type=int, default=0, help="of the draws; each prompt and sample has its own (0)")
    add("--ff", type=int, default=0, help="pass over that many prompts at the start (0)")
    add("--n_examples", type=int, default=0, help="that many prompts after those; 0: all (0)")
    add("--data_dir", help="holds tasks/ and sharegpt_data/; default $PROJECT_CACHE, else ~/.cache/lota")
    add("--out", help="folder of the files; default: the model's; $PROJECT_CACHE/results/ID for a hub id")
    add("--chat_template", choices=CHAT_TEMPLATES, help="default: as the model was trained, else never")
    add("--dtype", help="float32, bfloat16 or float16; default: the model's own")
    add("--device", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    return parser.parse_args(argv)


def decodings(args: argparse.Namespace, stop: Sequence[str]) -> list[Decoding]:
    """One per temperature; ValueError with everything that is wrong with the numbers given."""
    problems, found = [], []
    if not 0 < args.max_prompt_length < args.max_length:
        problems.append(f"--max_prompt_length {args.max_prompt_length}: must lie between 0 and --max_length")
    if args.chunk_size < 1 or args.ff < 0 or args.n_examples < 0:
        problems.append("--chunk_size must be >= 1, --ff and --n_examples >= 0")
    if args.num_samples_per_prefix < 1:
        problems.append(f"--num_samples_per_prefix {args.num_samples_per_prefix}: must be at least 1")
    max_new_tokens = max(1, args.max_length - args.max_prompt_length)
    for text in args.temperatures.split(","):
        try:
            found.append(
                Decoding(max_new_tokens, float(text), args.top_p, args.top_k, args.seed, tuple(stop))
            )
        except ValueError as error:
            problems.append(f"--temperatures {text}: {error}")
    if args.num_samples_per_prefix > 1 and any(decoding.temperature == 0 for decoding in found):
        problems.append("--temperatures 0: greedy samples of a prompt are all the same; ask for one")
    if problems:
        raise ValueError("; ".join(problems))
    return found


def read_rows_of(args: argparse.Namespace) -> tuple[Task, list[Row]]:
    """Task and rows of a prompt set; a file holds rows of the first one."""
    if args.prompt_set in PROMPT_SETS:
        task = get_task(args.prompt_set)
        rows = task.load(args.split or task.held_out or task.splits[0], args.data_dir or default_cache())
    elif Path(args.prompt_set).suffix:
        task = get_task(PROMPT_SETS[0])
        rows = read_rows(Path(args.prompt_set).expanduser(), task.check)
    else:
        raise ValueError(f"--prompt_set {args.prompt_set}: neither {SETS} nor a .json or .jsonl file")
    return task, rows


def instruction_of(task: Task, row: Row) -> str:
    """The user's words of a chat of one message; of a longer one all turns, headings included."""
    messages = task.messages(row)
    return messages[0]["content"] if len(messages) == 1 else task.prompt(row).removesuffix(task.closing)


def sample(args: argparse.Namespace) -> list[Path]:
    """The files written; what can be refused is refused before the model loads."""
    task, rows = read_rows_of(args)
    plans = decodings(args, task.stop)
    chosen = range(len(rows))[args.ff :][: args.n_examples or None]
    if not chosen:
        raise ValueError(f"--ff {args.ff} leaves none of the {len(rows)} prompts of {args.prompt_set}")
    tokenizer = load_tokenizer(args.tokenizer_path or args.model_path)
    prompter = Prompter(tokenizer, args.chat_template or recorded_choice(args.model_path))
    prompts = [prompter.prompt(task, row) for row in rows]
    instructions = [instruction_of(task, row) for row in rows]
    loading = {name: getattr(args, name) for name in ("archive", "dtype", "device")}
    model, _ = load_pair(args.model_path, tokenizer=tokenizer, **loading)
    bounds = {"max_prompt_length": args.max_prompt_length, "chunk_size": args.chunk_size}
    sampler = Sampler(model, tokenizer, task, generator=args.model_name, prompter=prompter, **bounds)
    paths = []
    for decoding, number in itertools.product(plans, range(args.num_samples_per_prefix)):
        name = f"{Path(args.prompt_set).stem}_temp{decoding.temperature}"
        name += f"_sample{number}.json" if number else ".json"
        paths.append(results_folder(args.model_path, args.out) / name)
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
