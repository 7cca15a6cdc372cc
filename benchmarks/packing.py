"""Batches of a real task, padded and packed: how much of them is padding, and the time of a training step.

    python -m benchmarks.packing                     # gsm8k on stories260K, as they lie beside the project
    python -m benchmarks.packing --shape 124m        # a Llama of that shape, random weights, on the same ids
    python -m benchmarks.packing --task samsum --batch 16

A model for each of the two layouts is trained on the same batches, which they take in turns: batches in the
order of an epoch, and those of `group_by_length=true`. LoTA under a random mask of --sparsity. On a CPU
seconds are those of the processor, which other programs do not lengthen: give it one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

import lota
from benchmarks.step import SHAPES, build_model, random_mask, synchronize
from lota.config import Config, ModelConfig
from lota.data.batches import Batch, Encoded, collate, encoder, epoch_batches
from lota.data.examples import load_examples
from lota.data.packed import pack
from lota.data.prompts import Prompter
from lota.models.loading import load_model, load_tokenizer
from lota.models.packed import pack_attention
from lota.train.losses import response_logps, sft_loss
from tasks import get_task

Layout = Callable[[Sequence[Encoded]], Batch]
LAYOUTS: dict[str, Layout] = {"padded": partial(collate, pad_token_id=0), "packed": pack}


def encoded_rows(args: argparse.Namespace) -> list[Encoded]:
    """The task's training examples as token ids, cut as a run with default lengths cuts them."""
    config = Config(model=ModelConfig(name_or_path=args.model), datasets=[args.task], data_dir=args.data)
    tokenizer = load_tokenizer(args.model)
    examples = load_examples([get_task(args.task)], "train", config, Prompter(tokenizer))
    return [encoder(config, tokenizer)(example)[0] for example in examples]


def padded_share(rows: Sequence[Encoded], batches: Sequence[Sequence[int]]) -> float:
    """Share of the places of padded batches that are no token."""
    places = sum(len(batch) * max(len(rows[i]) for i in batch) for batch in batches)
    return 1 - sum(len(rows[i]) for batch in batches for i in batch) / places


def trainer(args: argparse.Namespace, layout: Layout) -> Callable[[list[Encoded]], None]:
    """A training step of a model of its own."""
    model: PreTrainedModel = load_model(args.model) if args.shape is None else build_model(args)
    if layout is pack:
        pack_attention(model.eval(), args.shape or args.model)
    optimizer = lota.MaskedRMSprop(model.to(args.device).train(), random_mask(model, args.sparsity), lr=1e-5)
    lota.fuse_in_backward(optimizer)

    def step(rows: list[Encoded]) -> None:
        batch = layout(rows).to(torch.device(args.device))
        sft_loss(*response_logps(model, batch, contextlib.nullcontext())).mean().backward()
        optimizer.step()

    return step


def timed(step: Callable[[list[Encoded]], None], rows: list[Encoded], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    step(rows)
    synchronize(device)
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--data", default="../shared/data", help="folder with tasks/")
    parser.add_argument(
        "--model", default="../shared/models/stories260K", help="tokenizer, and model to train"
    )
    parser.add_argument("--shape", choices=SHAPES, help="train a model of this shape instead")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=8, help="examples per batch")
    parser.add_argument("--batches", type=int, default=15, help="that are timed, in either order")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    args.length, args.dtype, args.checkpointing = 512, "float32", False
    rows = encoded_rows(args)
    lengths = [len(row) for row in rows]
    print(f"{args.task}: {len(rows)} examples, {statistics.mean(lengths):.0f} tokens on average, "
          f"{max(lengths)} at most; {args.batch} to a batch; {args.shape or args.model}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    steps = {name: trainer(args, layout) for name, layout in LAYOUTS.items()}
    print("\n| order | padding | padded s | packed s | packed / padded |\n|---|---:|---:|---:|---:|")
    for name, given in ("shuffled", None), ("by length", lengths):
        batches = epoch_batches(len(rows), args.batch, seed=0, epoch=0, lengths=given)
        chosen = [[rows[i] for i in batch] for batch in batches[: args.batches]]
        seconds: dict[str, list[float]] = {layout: [] for layout in steps}
        for step in steps.values():
            step(chosen[0])  # to warm up
        for batch in chosen:
            for layout, step in steps.items():
                seconds[layout].append(timed(step, batch, args.device))
        ratio = statistics.median(b / a for a, b in zip(seconds["padded"], seconds["packed"], strict=True))
        medians = " | ".join(f"{statistics.median(s):.3f}" for s in seconds.values())
        print(f"| {name} | {padded_share(rows, batches):.3f} | {medians} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
