"""Extraction of masks, measured: time against torch.topk and against plain reading, and peak memory.

    python -m benchmarks.extraction --entries 200000000

Contestants take turns in one process, everything in the page cache; medians and ratios are reported, as JSON
lines and a table. Peak memory: getrusage of a fresh process that runs extract_masks.py at three sparsities.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lota.masks import kept_count
from lota.masks.extract.saliency import as_float32
from lota.masks.extract.select import Quota, Rule, select
from lota.models import chunks as streaming
from lota.models.pair import ModelPair, open_pair
from lota.models.scope import meta_model
from lota.models.tensor_files import new_safetensors

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = [0.5, 0.9, 0.99]


def make_pair(folder: Path, entries: int, hidden: int = 2048, dtype: str = "float32") -> tuple[Path, Path]:
    """A random Llama with about `entries` attention and MLP weights, and the same with a change to each.

    Rows of the change differ in size, as they do after fine-tuning. Written tensor by tensor.
    """
    from transformers import LlamaConfig

    per_layer = 4 * hidden * hidden + 3 * hidden * (hidden * 11 // 4)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, num_hidden_layers=max(1, round(entries / per_layer)),
        vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    paths = folder / "base", folder / "tuned"
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(path)
    parameters = dict(meta_model(paths[0]).to(getattr(torch, dtype)).named_parameters())
    generator = torch.Generator().manual_seed(0)
    base, tuned = (new_safetensors(path / "model.safetensors", parameters) for path in paths)
    with base as put_base, tuned as put_tuned:
        for name, parameter in parameters.items():
            shape = parameter.shape
            rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) + 0.2
            weight = torch.randn(shape, generator=generator) * 0.02
            change = torch.randn(shape, generator=generator) * rows * 1e-3
            put_base(name, weight)
            put_tuned(name, weight + change)
    return paths


def read_and_subtract(pair: ModelPair) -> None:
    """The yardstick: one pass over both files, same reader and threads, nothing but the difference."""

    scratch = streaming.Scratch()

    def work(span: streaming.Span) -> None:
        sides = []
        for role, source in pair.sources.items():
            n = span.stop - span.start
            buffer = scratch.get(f"{role} bytes", n * source.dtype(span.name).itemsize, np.uint8)
            part = source.read_flat(*span, out=buffer)
            sides.append(as_float32(part, scratch.get(role, n, np.float32)))
        np.subtract(sides[1], sides[0], out=sides[1])

    with ThreadPoolExecutor(streaming.worker_count()) as pool:
        for _ in pool.map(work, streaming.spans(sizes_of(pair))):
            pass


def torch_topk(pair: ModelPair, sparsity: float) -> torch.Tensor:
    """What one writes first: all scores in one tensor, torch.topk, a bool mask."""
    sizes = sizes_of(pair)
    scores = torch.empty(sum(sizes.values()))
    start = 0
    for name, n in sizes.items():
        tuned, base = (pair.sources[role].read(name).float().reshape(-1) for role in ("tuned", "base"))
        torch.sub(tuned, base, out=scores[start : start + n])
        start += n
    scores.abs_()
    kept = torch.topk(scores, kept_count(sparsity, len(scores))).indices
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[kept] = True
    return mask


def sizes_of(pair: ModelPair) -> dict[str, int]:
    return {name: math.prod(tensor.shape) for name, tensor in pair.scope.items()}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_of_command(base: Path, tuned: Path, out: Path) -> tuple[int, float]:
    """Peak resident bytes and seconds of extract_masks.py in a fresh process, imports included."""
    script = (
        "import resource, sys, extract_masks; extract_masks.main(sys.argv[1:]); "
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", script, "--base", base, "--tuned", tuned, "--name", "x"]
    command += ["--out", out, "--sparsities", *map(str, SPARSITIES)]
    start = time.perf_counter()
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return int(result.stdout.split("PEAK")[1]) * unit, time.perf_counter() - start


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict]:
    base, tuned = folder / "base", folder / "tuned"
    # in a process of its own, and the peak first: Linux hands a parent's peak down to the programs it starts
    made = f"pathlib.Path({str(folder)!r}), {arguments.entries}, dtype={arguments.dtype!r}"
    code = f"import pathlib, benchmarks.extraction as e; e.make_pair({made})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    peak, elapsed = peak_of_command(base, tuned, folder / "masks")
    pair = open_pair(base, tuned)
    contestants = {
        "read and subtract, one pass": lambda: read_and_subtract(pair),
        "lota s=0.9": lambda: select(Quota(pair, [0.9], Rule()), with_hash=False),
        "lota s=0.5,0.9,0.99": lambda: select(Quota(pair, SPARSITIES, Rule()), with_hash=False),
        "lota s=0.9 with base hash": lambda: select(Quota(pair, [0.9], Rule())),
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*contestants, "torch.topk s=0.9"]}
    for turn in range(arguments.repeats):
        for name, run in contestants.items():
            seconds[name].append(timed(run))
        if turn < arguments.topk_repeats:
            seconds["torch.topk s=0.9"].append(timed(lambda: torch_topk(pair, 0.9)))
    check_exact(pair)
    yardstick = statistics.median(seconds["read and subtract, one pass"])
    slowest = statistics.median(seconds["torch.topk s=0.9"])
    common = {
        "entries": sum(sizes_of(pair).values()),
        "dtype": arguments.dtype,
        "threads": streaming.worker_count(),
    }
    rows = [
        {
            "what": name,
            **common,
            "runs": len(times),
            "median_s": round(statistics.median(times), 3),
            "min_s": round(min(times), 3),
            "max_s": round(max(times), 3),
            "over_read": round(statistics.median(times) / yardstick, 2),
            "topk_over_this": round(slowest / statistics.median(times), 2),
        }
        for name, times in seconds.items()
    ]
    rows.append(
        {
            "what": "extract_masks.py, 3 sparsities",
            **common,
            "peak_bytes": peak,
            "median_s": round(elapsed, 3),
        }
    )
    return rows


def check_exact(pair: ModelPair) -> None:
    """The masks agree with torch.topk up to the choice among equal scores at the threshold."""
    mask = select(Quota(pair, [0.9], Rule()), with_hash=False)[0.9]
    kept = torch.cat([mask.dense(name).reshape(-1) for name in mask.names])
    other = torch_topk(pair, 0.9)
    differ = (kept != other).nonzero().reshape(-1)
    if kept.sum() != other.sum():
        raise RuntimeError(f"{int(kept.sum())} entries kept, {int(other.sum())} by torch.topk")
    start = 0
    for name, n in sizes_of(pair).items():
        inside = differ[(differ >= start) & (differ < start + n)] - start
        if len(inside):
            tuned, base = (pair.sources[role].read(name).float().reshape(-1) for role in ("tuned", "base"))
            if not ((tuned - base).abs()[inside] == mask.meta["threshold"]).all():
                raise RuntimeError(f"{name}: entries away from the threshold differ from torch.topk")
        start += n


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=200_000_000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--topk_repeats", type=int, default=2, help="torch.topk is slow")
    parser.add_argument("--folder", help="where the pair is written (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(Path(folder).absolute(), arguments)
    for row in rows:
        print(json.dumps(row))
    print(f"\n{'':34} {'median s':>9} {'x read':>7} {'topk/this':>10} {'peak MiB':>9}")
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else ""
        print(
            f"{row['what']:34} {row['median_s']:>9} {row.get('over_read', ''):>7} "
            f"{row.get('topk_over_this', ''):>10} {peak:>9}"
        )
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
