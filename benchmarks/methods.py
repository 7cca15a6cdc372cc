"""Step time, peak memory and trained entries of every method as the training loop runs it, side by side.

    python -m benchmarks.methods                      # CPU, 124M-parameter Llama shape, 4 x 128 tokens
    python -m benchmarks.methods --shape 1b --batch 8 --length 512 --dtype bfloat16 --device cuda

All with RMSprop fused into the backward pass, but SHiRA, which is peft's own with torch's. Methods take turns
within one process; peak memory is that of a process of its own. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

import lota
from benchmarks.step import (
    ROOT,
    Step,
    adapter_step,
    backward,
    build_model,
    line_mask,
    random_mask,
    shira_config,
    timed,
    token_batch,
)  # fmt: skip
from lota.masks import Mask
from lota.masks.trainable import trainable_mask
from lota.system import peak_memory_bytes
from lota.train.lora import add_lora, lora_targets

Method = Callable[[argparse.Namespace], tuple[Step, int]]  # settings -> (a training step, trained entries)
SETTING = ("shape", "batch", "length", "dtype", "device")


def trained(model: torch.nn.Module, mask: Mask | None = None, clip: str = "even") -> tuple[Step, int]:
    optimizer = lota.MaskedRMSprop(model, mask, lr=1e-5, grad_norm_strategy=clip, max_grad_norm=10.0)
    lota.fuse_in_backward(optimizer)

    def step(ids: torch.Tensor) -> None:
        backward(model, ids)
        optimizer.step()

    return step, optimizer.n_trained


def dense(args: argparse.Namespace) -> tuple[Step, int]:
    return trained(build_model(args))


def masked(sparsity: float, granularity: str, args: argparse.Namespace) -> tuple[Step, int]:
    model = build_model(args)
    if granularity == "element":
        return trained(model, random_mask(model, sparsity))
    return trained(model, line_mask(model, sparsity, granularity))


def alternate_layers(args: argparse.Namespace) -> tuple[Step, int]:
    model = build_model(args)
    return trained(model, trainable_mask(model, None, freeze_layers="odd"))


def low_rank(rank: int, args: argparse.Namespace) -> tuple[Step, int]:
    model = build_model(args)
    add_lora(model, lora_targets(model)[0], rank=rank, alpha=2 * rank, dropout=0.0)
    return trained(model)


def shira(args: argparse.Namespace) -> tuple[Step, int]:
    model = build_model(args)
    step = adapter_step(model, shira_config())
    return step, sum(p.numel() for p in model.parameters() if p.requires_grad)


METHODS: dict[str, Method] = {
    "fft": dense,
    "alternate_layers": alternate_layers,
    "lota_0.5": partial(masked, 0.5, "element"),
    "lota_0.9": partial(masked, 0.9, "element"),
    "lota_0.9 rows": partial(masked, 0.9, "row"),
    "lota_0.99": partial(masked, 0.99, "element"),
    "lora_r8": partial(low_rank, 8),
    "lora_r64": partial(low_rank, 64),
    "peft SHiRA r=64": shira,
}


def own_process_peak(args: argparse.Namespace, name: str) -> int:
    """Peak bytes of a process that builds one method and makes three steps."""
    options = [f"--{key}={getattr(args, key)}" for key in SETTING]
    flags = ["--checkpointing"] if args.checkpointing else []
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.methods",
        "--peak-of",
        name,
        *options,
        *flags,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.split()[-1])


def print_peak(args: argparse.Namespace) -> None:
    (step, _), ids = METHODS[args.peak_of](args), token_batch(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step(ids)
    print(peak_memory_bytes(torch.device(args.device)))


def print_table(args: argparse.Namespace) -> None:
    made, ids = {name: METHODS[name](args) for name in args.methods}, token_batch(args)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(args.rounds + 1):
        for name, (step, _) in made.items():
            taken = timed(step, ids, args.device)
            if turn:  # the first step of each warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = medians[args.methods[0]]
    print("| method | trained entries | s / step | of the first | peak MiB |\n|---|---|---|---|---|")
    for name, (_, entries) in made.items():
        peak = own_process_peak(args, name) / 2**20
        print(
            f"| {name} | {entries:,} | {medians[name]:.3f} | {medians[name] / first:.2f} | {peak:,.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="124m", help="as in benchmarks/step.py")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps per method")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    print_peak(args) if args.peak_of else print_table(args)


if __name__ == "__main__":
    main()
