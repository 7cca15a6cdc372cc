"""Time and peak memory of log-probabilities from hidden states and a head's weight, with their gradients.

    python -m benchmarks.head                        # 128,256 words, 256 tokens of width 512, fp32
    python -m benchmarks.head --peaks --tokens 1024  # a process of its own per contestant, one pass each
    python -m benchmarks.head --dtype bfloat16 --contestants inside torch_chunks all_logits

`inside` is lota/models/head_logps.py; `torch_chunks` is torch's linear_cross_entropy with as many logits at a
time; `all_logits` makes the logits of all tokens and works on chunks of them, as this project did before;
`counted_logits` does so for the tokens that count. Contestants take turns; seconds are of processor time,
medians, and the ratios are those to `inside`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step import ROOT
from lota.models.head_logps import CHUNK_ENTRIES, After, HeadLogProbs
from lota.system import peak_memory_bytes

SETTING = ("tokens", "words", "width", "dtype")


class OfLogits(torch.autograd.Function):
    """log softmax(logits)[target] of logits (tokens, words), in chunks of tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        size = max(1, CHUNK_ENTRIES // logits.shape[1])
        parts = []
        for values, wanted in zip(logits.split(size), targets.split(size), strict=True):
            values = values.float()
            normalizers = values.logsumexp(dim=1)
            parts.append((values.gather(1, wanted[:, None]).squeeze(1) - normalizers, normalizers))
        logps, normalizers = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, normalizers)
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        grad = torch.empty_like(logits)
        size = max(1, CHUNK_ENTRIES // logits.shape[1])
        for first in range(0, len(logits), size):
            rows = slice(first, first + size)
            values = (logits[rows].float() - normalizers[rows, None]).exp_().mul_(-grad_logps[rows, None])
            grad[rows] = values.scatter_add_(1, targets[rows, None], grad_logps[rows, None])
        return grad, None


def inside(hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    return HeadLogProbs.apply(hidden[counted], weight, None, targets, After(), weight.dtype, True)


def torch_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, CHUNK_ENTRIES // len(weight)))
    return -F.linear_cross_entropy(hidden[counted], weight, targets, reduction="none", options=options)


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    everywhere = torch.zeros(len(hidden), dtype=targets.dtype)
    everywhere[counted] = targets
    return OfLogits.apply(F.linear(hidden, weight), everywhere)[counted]


def counted_logits(hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    return OfLogits.apply(F.linear(hidden[counted], weight), targets)


Contestant = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CONTESTANTS: dict[str, Contestant] = {
    f.__name__: f for f in (inside, torch_chunks, all_logits, counted_logits)
}
CONDITIONS = [(trains, half) for trains in (False, True) for half in (False, True)]


def one_pass(args: argparse.Namespace, contestant: Contestant, trains: bool, half: bool) -> float:
    """Seconds of processor time of a forward and a backward pass."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.width, generator=generator).to(dtype).requires_grad_()
    weight = torch.empty(args.words, args.width, dtype=dtype).normal_(0, 0.02, generator=generator)
    weight.requires_grad_(trains)
    counted = torch.arange(args.tokens // 2 if half else 0, args.tokens)
    targets = torch.randint(0, args.words, (len(counted),), generator=generator)
    start = time.process_time()
    contestant(hidden, weight, targets, counted).sum().backward()
    return time.process_time() - start


def own_process_peak(args: argparse.Namespace, name: str, trains: bool, half: bool) -> int:
    """Peak bytes of a process that makes one pass."""
    options = [f"--{key}={getattr(args, key)}" for key in SETTING]
    condition = ["--peak-of", name, str(int(trains)), str(int(half))]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.head", *condition, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--words", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=512, help="of the hidden states")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--peaks", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        name, trains, half = args.peak_of
        one_pass(args, CONTESTANTS[name], bool(int(trains)), bool(int(half)))
        print(peak_memory_bytes(torch.device("cpu")))
        return
    print({key: getattr(args, key) for key in SETTING}, torch.__version__, torch.get_num_threads(), "threads")
    for trains, half in CONDITIONS:
        found: dict[str, list[float]] = {name: [] for name in args.contestants}
        for _ in range(1 if args.peaks else args.rounds):
            for name, values in found.items():
                if args.peaks:
                    values.append(own_process_peak(args, name, trains, half) / 2**20)
                else:
                    values.append(one_pass(args, CONTESTANTS[name], trains, half))
        medians = {name: statistics.median(values) for name, values in found.items()}
        first = next(iter(medians.values()))
        print(f"\nhead {'trained' if trains else 'frozen'}, {'half of the' if half else 'all'} tokens count")
        for name, median in medians.items():
            print(f"{name:16} {median:9.{0 if args.peaks else 3}f} {median / first:8.2f}", flush=True)


if __name__ == "__main__":
    main()
