"""Completions per second: lota.evaluate.generation.generate against transformers' own `generate`.

    python -m benchmarks.generation --model ../shared/models/stories260K --data_dir ../shared/data

Greedy, over the first rows of each task's test split, at the same batch size and the same number of new
tokens. transformers takes the rows in file order, as a plain evaluation loop does: without stop texts, with
them (`stop_strings`), and with its static cache; the completions must be the same text. Contestants take
turns within one process, so that drift of the machine hits all alike, and seconds on a CPU with one thread
are those of the process, so that other processes count less. Prints a line of JSON per task and contestant,
then a table with ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lota.evaluate.decoding import Decoding
from lota.evaluate.generation import completion_text, generate
from tasks import get_task


class Work(NamedTuple):
    """What every contestant completes."""

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    stop: tuple[str, ...]
    max_new_tokens: int
    batch_size: int


def ours(work: Work) -> list[str]:
    """LoTA: rows sorted by length, finished rows leave, no autograd bookkeeping."""
    decoding = Decoding(work.max_new_tokens, stop=work.stop)
    return generate(work.model, work.tokenizer, work.prompts, decoding, batch_size=work.batch_size)


def transformers_generate(work: Work, **settings: Any) -> list[str]:
    """Batches in file order, padded on the left; completions cut at the stop texts afterwards."""
    texts = []
    for start in range(0, len(work.prompts), work.batch_size):
        batch = work.prompts[start : start + work.batch_size]
        width = max(map(len, batch))
        device = work.model.device
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
        output = work.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=work.max_new_tokens,
            pad_token_id=work.tokenizer.eos_token_id, **settings,
        )  # fmt: skip
        texts += [completion_text(work.tokenizer, row[width:], work.stop) for row in output.tolist()]
    return texts


def with_stop_strings(work: Work) -> list[str]:
    return transformers_generate(work, stop_strings=list(work.stop), tokenizer=work.tokenizer)


def with_static_cache(work: Work) -> list[str]:
    return transformers_generate(work, cache_implementation="static", disable_compile=True)


CONTESTANTS: dict[str, Callable[[Work], list[str]]] = {
    "lota": ours,
    "transformers": transformers_generate,
    "transformers_stop_strings": with_stop_strings,
    "transformers_static_cache": with_static_cache,
}


def load_work(args: argparse.Namespace, name: str, model: Any, tokenizer: Any) -> Work:
    task = get_task(name)
    rows = task.load("test", args.data_dir)[: args.rows]
    new = args.max_new_tokens or task.max_new_tokens
    context = model.config.max_position_embeddings
    prompts = [tokenizer(task.prompt(row)).input_ids[-(context - new) :] for row in rows]
    return Work(model, tokenizer, prompts, task.stop, new, args.batch_size)


def timed(contestant: Callable[[Work], list[str]], work: Work) -> tuple[float, list[str]]:
    on_cuda = work.model.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if on_cuda or torch.get_num_threads() > 1 else time.process_time
    start = clock()
    texts = contestant(work)  # text is on the CPU: nothing is left in flight
    return clock() - start, texts


def times(args: argparse.Namespace, work: Work) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per round and contestant, taken in turns, and how many completions equal ours."""
    seconds: dict[str, list[float]] = {name: [] for name in args.contestants}
    texts: dict[str, list[str]] = {}
    warm = work._replace(prompts=work.prompts[: work.batch_size], max_new_tokens=4)
    for name in args.contestants:
        CONTESTANTS[name](warm)
    for _ in range(args.rounds):
        for name in args.contestants:
            taken, texts[name] = timed(CONTESTANTS[name], work)
            seconds[name].append(taken)
    first = texts[args.contestants[0]]
    equal = {name: sum(a == b for a, b in zip(first, texts[name], strict=True)) for name in args.contestants}
    return seconds, equal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="../shared/models/stories260K")
    parser.add_argument("--data_dir", default="../shared/data")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "sql"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=0, help="0: the task's own")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs per contestant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval().to(args.device)
    setting = {key: getattr(args, key) for key in ("model", "batch_size", "rows", "device")}
    setting |= {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "threads": torch.get_num_threads(), "machine": platform.processor(),
    }  # fmt: skip
    lines = []
    for task in args.tasks:
        work = load_work(args, task, model, tokenizer)
        seconds, equal = times(args, work)
        medians = {name: statistics.median(seconds[name]) for name in args.contestants}
        for name, median in medians.items():
            measured = {"seconds": seconds[name], "completions": len(work.prompts), "equal": equal[name]}
            print(json.dumps({"task": task, "contestant": name, **setting, **measured}), flush=True)
            rate, ratio = len(work.prompts) / median, median / medians[args.contestants[0]]
            lines.append(f"{task:10} {name:26} {rate:13.2f} {ratio:10.2f} {equal[name]:6}/{args.rows}")
    print(f"\n{'task':10} {'contestant':26} {'completions/s':>13} {'lota / it':>10} {'same text':>9}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
