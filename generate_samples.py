"""Write completions of prompts in AlpacaEval's format, one file per temperature and sample."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from lota.distributed.processes import processes
from lota.evaluate import cli
from lota.evaluate.alpaca import Sampler
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine_choice import check_engine
from lota.places import holding
from lota.utils import Problems
from tasks import get_task
from tasks.base import Row
from tasks.chat import ChatTask
from tasks.prompts import PROMPTS

PROMPT_SETS = ("alpaca_eval", "sharegpt", "ultrafeedback")
SETS = ", ".join(PROMPT_SETS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.model_parser(__doc__, "--model_path")
    add = parser.add_argument
    add("--prompt_set", default=PROMPT_SETS[0], help=f"{SETS}, or a .json or .jsonl file of prompts")
    add("--split", help="of the prompt set; default: the one held out from training, if it has one")
    add(
        "--num_samples_per_prefix",
        type=int,
        default=1,
        help="answers to each prompt; the second and later ones are in files NAME_sample1.json ... (1)",
    )
    add("--temperatures", default="0.7", help="separated by commas; 0 is greedy (0.7)")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest tokens with this probability (1)")
    add("--top_k", type=int, default=0, help="draw from that many tokens; 0: all (0)")
    add("--model_name", required=True, help="the samples' `generator`")
    add("--archive", help="weights on top of the model: a folder with policy.pt, or a converted one")
    add("--max_length", type=int, default=1024, help="tokens of prompt and completion (1024)")
    add("--max_prompt_length", type=int, default=512, help="tokens of the prompt (512)")
    add("--chunk_size", type=int, default=32, help="prompts per batch, and per writing of the file (32)")
    add("--seed", type=int, default=0, help="of the draws; each prompt and sample has its own (0)")
    add("--ff", type=int, default=0, help="pass over that many prompts at the start (0)")
    add("--n_examples", type=int, default=0, help="that many prompts after those; 0: all (0)")
    return parser.parse_args(argv)


def decodings(args: argparse.Namespace, stop: tuple[str, ...]) -> list[Decoding]:
    """One per temperature; ValueError with all that is wrong with the flags."""
    problems: list[str] = []
    found = []
    if not 0 < args.max_prompt_length < args.max_length:
        problems.append(f"--max_prompt_length {args.max_prompt_length}: must lie between 0 and --max_length")
    least = {"chunk_size": 1, "num_samples_per_prefix": 1, "ff": 0, "n_examples": 0, "seed": 0}
    problems += cli.too_small(args, least)
    if not args.model_name.strip():
        problems.append("--model_name is empty: name the samples' generator")
    most = max(1, args.max_length - args.max_prompt_length)
    for text in args.temperatures.split(","):
        try:
            found.append(Decoding(most, float(text), args.top_p, args.top_k, args.seed, stop))
        except ValueError as error:
            problems.append(f"--temperatures {text}: {error}")
    if args.num_samples_per_prefix > 1 and any(decoding.temperature == 0 for decoding in found):
        problems.append("--temperatures 0: greedy samples of a prompt are all the same; ask for one")
    if problems:
        raise ValueError("; ".join(problems))
    return found


def read_prompts(args: argparse.Namespace) -> tuple[ChatTask, list[Row]]:
    """Task and rows of a prompt set."""
    if args.prompt_set in PROMPT_SETS:
        task = get_task(args.prompt_set)
        assert isinstance(task, ChatTask)
        return task, task.load(args.split or task.held_out or task.splits[0], args.data_dir)
    if Path(args.prompt_set).suffix:
        return PROMPTS, PROMPTS.read(args.prompt_set)
    raise ValueError(f"--prompt_set {args.prompt_set}: neither {SETS} nor a .json or .jsonl file")


def sample(args: argparse.Namespace) -> list[Path]:
    """The files written; what can be refused is refused before the model loads."""
    problems = Problems()
    problems.attempt(check_engine, args)
    read = problems.attempt(read_prompts, args)
    wanted = problems.attempt(decodings, args, read[0].stop if read else ())
    problems.refuse()
    assert read is not None and wanted is not None
    (task, rows), asked = read, itertools.product(wanted, range(args.num_samples_per_prefix))
    chosen = range(len(rows))[args.ff :][: args.n_examples or None]
    if not chosen:
        raise ValueError(f"--ff {args.ff} leaves none of the {len(rows)} prompts of {args.prompt_set}")
    folder = cli.choose_results_folder(args)
    prompter = cli.make_prompter(args)
    prompts = [prompter.prompt(task, row) for row in rows]
    instructions = [task.instruction(row) for row in rows]
    stem, files = Path(args.prompt_set).stem, []
    for decoding, number in asked:
        name = f"{stem}_temp{decoding.temperature}{f'_sample{number}' if number else ''}.json"
        files.append((folder / name, decoding, number))
    with ExitStack() as held:
        for path, *_ in files:
            held.enter_context(holding(path))
        engine = held.enter_context(cli.opened_engine(args, prompter.tokenizer, args.chunk_size))
        for _, decoding, _ in files:
            engine.check(decoding)
        sampler = Sampler(
            engine,
            prompter,
            task,
            generator=args.model_name,
            max_prompt_length=args.max_prompt_length,
            chunk_size=args.chunk_size,
        )
        for path, decoding, number in files:
            with tqdm(total=len(chosen), desc=path.name, unit="prompt") as bar:
                sampler.write(
                    path, instructions, prompts, decoding, sample=number, chosen=chosen, on_done=bar.update
                )
    return [path for path, *_ in files]


def work(args: argparse.Namespace) -> str:
    """What one of the command's processes does; returns what the first one says at the end."""
    if not processes().first:
        cli.help_first(args, args.chunk_size)
        return ""
    return " ".join(["samples in", *map(str, sample(args))])


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parse, work, argv)


if __name__ == "__main__":
    sys.exit(main())
