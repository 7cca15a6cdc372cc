"""Everything that is to be measured on a GPU, and `pytest -m gpu`, in one command of at most nine minutes.

    python -m benchmarks.gpu                                   # one card, 8B Llama shape, 8 x 512 tokens
    python -m benchmarks.gpu --shape tiny --device cpu --rows 2 --length 32 --steps 1    # does it run at all

Random weights in bf16 and activation checkpointing; one model serves all contestants, one after the other.
Parts come in the order of their importance. Each is left out, and the output says so, if the time that it
needs is no longer there. After each part the results go to --out (JSON) and a table is printed, so that what
was measured before an interruption is kept.

Share of the matrix rate: floating-point operations of the model per second over those of a large product in
bf16, measured first. With N weights in matrices (head included, embeddings not), D tokens and K trained
entries they are 4 N D + 2 K D: forward, gradient of the activations, gradient of what trains (6 N D if all
train). Attention's own products and the recomputation of checkpointing do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lota
from benchmarks import preference
from benchmarks import step as steps
from benchmarks.gpu_kernels import kernel_times
from lota.data.batches import Batch
from lota.models.packed import pack_attention, packed_inputs, varlen_kernel
from lota.models.scope import find_scope
from lota.optim import launches
from lota.optim.compiled import compile_blocks
from lota.storage import write_json
from lota.system import peak_memory_bytes, reset_peak_memory, versions
from lota.train.losses import ChosenRejected, preference_loss, response_logps, sft_loss, token_logps

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
Step = Callable[[], None]


class SpreadMask:
    """A random mask that is made on the device, parameter by parameter: 7e9 coins would take minutes.

    Entries: one at random in every 1/(1-s) neighbours. Rows, columns, blocks of 64: a random choice.
    """

    def __init__(self, model: nn.Module, sparsity: float, granularity: str):
        parameters = dict(model.named_parameters())
        self.scope = {name: parameters[name] for name in find_scope(model)}
        self.share, self.granularity = 1 - sparsity, granularity
        self.names = list(self.scope)
        self.shapes = {name: tuple(p.shape) for name, p in self.scope.items()}

    def check(self, shapes: dict[str, Any]) -> None:
        """It is made for this model."""

    def __contains__(self, name: str) -> bool:
        return name in self.scope

    def kept(self, name: str) -> int:
        if name not in self.scope:
            return 0
        return self.positions(name).numel() if self.granularity == "element" else int(self.dense(name).sum())

    def positions(self, name: str) -> Tensor:
        p = self.scope[name]
        stride = round(1 / self.share)
        n = p.numel() // stride
        generator = torch.Generator(p.device).manual_seed(hash(p.shape) % 2**31)
        offsets = torch.randint(stride, (n,), device=p.device, generator=generator)
        return torch.arange(n, device=p.device).mul_(stride).add_(offsets)

    def dense(self, name: str) -> Tensor:
        p = self.scope[name]
        height, width = p.shape
        if self.granularity == "element":
            flags = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
            return flags.index_fill_(0, self.positions(name), True).view(p.shape)
        tall, wide = {"row": (1, width), "column": (height, 1), "block": (64, 64)}[self.granularity]
        grid = torch.zeros(math.ceil(height / tall), math.ceil(width / wide), dtype=torch.bool)
        order = torch.randperm(grid.numel(), generator=torch.Generator().manual_seed(0))
        grid.view(-1)[order[: max(1, round(self.share * grid.numel()))]] = True
        whole = grid.to(p.device).repeat_interleave(tall, 0).repeat_interleave(wide, 1)
        return whole[:height, :width].contiguous()


class Watch:
    """Time of the optimizer on the device, between events around its calls."""

    def __init__(self, device: str):
        self.device, self.spans, self.running = device, [], False

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            if not self.running:
                return call(*arguments)
            start = self.now()
            result = call(*arguments)
            self.spans.append((start, self.now()))
            return result

        return timed

    def now(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        steps.synchronize(self.device)
        if self.device != "cuda":
            return sum(end - start for start, end in self.spans)
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1000


class Bench:
    """What the parts share: the model, the batch, the clock, the results."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.deadline = time.monotonic() + 60 * args.minutes
        self.results: dict[str, Any] = {}
        self.rate = math.nan  # floating-point operations per second
        self._model: nn.Module | None = None
        self.packs = False  # whether its attention keeps packed examples apart
        generator = torch.Generator().manual_seed(1)
        words = steps.SHAPES[args.shape][0]
        self.ids = torch.randint(words, (args.rows, args.length), generator=generator).to(self.device)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def model(self) -> nn.Module:
        """Built when it is first asked for."""
        if self._model is None:
            self._model = steps.build_model(self.args)
        return self._model

    @property
    def batch(self) -> Batch:
        return Batch(self.ids, torch.ones_like(self.ids), self.ids, self.ids.numel())

    def matrices(self) -> int:
        """Weights of the model in matrices that tokens are multiplied with."""
        embedding = self.model.get_input_embeddings().weight
        tied = embedding is self.model.get_output_embeddings().weight
        total = sum(p.numel() for p in self.model.parameters() if p.ndim > 1)
        return total if tied else total - embedding.numel()

    def sft(self, model: nn.Module) -> None:
        logps, counted = response_logps(model, self.batch, contextlib.nullcontext())
        sft_loss(logps, counted).mean().backward()

    def measure(self, step: Step, trained: int, watch: Watch | None = None) -> dict[str, float]:
        """Times and peak of a step that is made again and again."""
        for _ in range(2):
            step()
        steps.synchronize(self.args.device)
        reset_peak_memory(self.device)
        seconds = [steps.timed(lambda _: step(), self.ids, self.args.device) for _ in range(self.args.steps)]
        median, tokens = statistics.median(seconds), self.ids.numel()
        operations = (4 * self.matrices() + 2 * trained) * tokens
        found = {
            "seconds": median,
            "tokens_per_second": tokens / median,
            "peak_gib": peak_memory_bytes(self.device) / GIB,
            "trained_entries": trained,
            "all_seconds": seconds,
        }
        if not math.isnan(self.rate):
            found["share_of_rate"] = operations / median / self.rate
        if watch is not None:
            watch.running = True
            step()
            found["optimizer_share"] = watch.seconds() / median
        return found


@contextlib.contextmanager
def masked(bench: Bench, mask: SpreadMask | None, **settings: Any) -> Iterator[tuple[Any, Watch]]:
    """A fused RMSprop on the shared model, watched; removed from it afterwards."""
    optimizer = lota.MaskedRMSprop(
        bench.model.requires_grad_(True),  # as after loading
        mask, lr=1e-5, grad_norm_strategy="even", max_grad_norm=10.0, **settings,
    )  # fmt: skip
    watch = Watch(bench.args.device)
    optimizer.receive = watch.around(optimizer.receive)  # before it becomes a hook
    optimizer.step = watch.around(optimizer.step)
    unfuse = lota.fuse_in_backward(optimizer)
    try:
        yield optimizer, watch
    finally:
        unfuse()


def adapt(sparsity: float, granularity: str, kernels: bool = True) -> Callable[[Bench], dict[str, Any]]:
    """LoTA under a random mask. kernels: whether those of lota/optim/kernels.py may be used."""

    def part(bench: Bench) -> dict[str, Any]:
        devices, launches.DEVICES = launches.DEVICES, launches.DEVICES if kernels else set()
        try:
            with masked(bench, SpreadMask(bench.model, sparsity, granularity)) as (optimizer, watch):

                def step() -> None:
                    bench.sft(bench.model)
                    optimizer.step()

                found = bench.measure(step, optimizer.n_trained, watch)
                return found | {"kernels": any(map(optimizer._has_kernels, optimizer.names))}
        finally:
            launches.DEVICES = devices

    return part


def lora(bench: Bench) -> dict[str, Any]:
    """PEFT's LoRA, r=64 on all linear layers, in bf16, with torch's RMSprop."""
    wrapped: Any = steps.adapted(bench.model, steps.lora_config())
    try:
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.RMSprop(trained, lr=1e-5, alpha=0.99)

        def step() -> None:
            bench.sft(wrapped)
            torch.nn.utils.clip_grad_norm_(trained, 10.0)
            optimizer.step()
            optimizer.zero_grad()

        return bench.measure(step, sum(p.numel() for p in trained))
    finally:
        wrapped.unload()


def calibrate(bench: Bench) -> dict[str, Any]:
    """All weights, in bf16 without masters, stochastic rounding, square averages in bf16."""
    with masked(bench, None, masters=False, stochastic_rounding=True, optimizer_state="bfloat16") as (
        optimizer,
        watch,
    ):

        def step() -> None:
            bench.sft(bench.model)
            optimizer.step()

        return bench.measure(step, optimizer.n_trained, watch)


def dpo(bench: Bench) -> dict[str, Any]:
    """As many sequences as SFT has, in pairs; the reference is the policy with its kept entries swapped."""
    with masked(bench, SpreadMask(bench.model, 0.9, "element")) as (optimizer, watch):
        reference = preference.by_swapping(bench.args, bench.model, optimizer)

        def step() -> None:
            of_reference = ChosenRejected.split(reference(bench.batch))
            logps, counted = response_logps(bench.model, bench.batch, contextlib.nullcontext())
            losses = preference_loss(
                ChosenRejected.split(logps), of_reference, ChosenRejected.split(counted), beta=0.1
            )
            losses.mean().backward()
            optimizer.step()

        found = bench.measure(step, optimizer.n_trained, watch)
        found.pop("share_of_rate", None)  # the operations counted leave out the reference's forward pass
        return found


def packing(sparsity: float, granularity: str) -> Callable[[Bench], dict[str, Any]]:
    """As many tokens in one packed row of examples of different lengths as in rows without padding."""

    def part(bench: Bench) -> dict[str, Any]:
        model, n = bench.model, bench.ids.numel()
        ends = sorted({n * k * k // 100 for k in range(1, 11)} | {n})
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False) if end > start]
        positions = torch.cat([torch.arange(length, device=bench.device) for length in lengths])[None]
        ids = bench.ids.view(1, -1)
        if not bench.packs:
            pack_attention(model, "random weights")
            bench.packs = True
        with masked(bench, SpreadMask(model, sparsity, granularity)) as (optimizer, watch):

            def step() -> None:
                logps = token_logps(bench.model, packed_inputs(ids, positions), ids)
                (-logps.sum() / bench.args.rows).backward()
                optimizer.step()

            found = bench.measure(step, optimizer.n_trained, watch)
        return found | {"lengths": lengths, "varlen kernel": varlen_kernel() is not None}

    return part


def compiled(sparsity: float, granularity: str) -> Callable[[Bench], dict[str, Any]]:
    """Each transformer block compiled by torch."""

    def part(bench: Bench) -> dict[str, Any]:
        with masked(bench, SpreadMask(bench.model, sparsity, granularity)) as (optimizer, watch):
            blocks = compile_blocks(bench.model)

            def step() -> None:
                bench.sft(bench.model)
                optimizer.step()

            try:
                found = bench.measure(step, optimizer.n_trained, watch)
                return found if blocks.reason is None else {"error": blocks.reason}
            finally:
                blocks.undo()

    return part


def facts(bench: Bench) -> dict[str, Any]:
    """The device, and its rate for a large product in bf16 on random numbers."""
    side = 8192 if bench.args.device == "cuda" else 256
    a, b = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = [steps.timed(lambda _: a @ b, a, bench.args.device) for _ in range(10)]
    bench.rate = 2 * side**3 / statistics.median(seconds)
    found: dict[str, Any] = {"matrix_tflops": bench.rate / 1e12}
    with contextlib.suppress(OSError):  # there may be no git
        found |= versions(bench.device)
    found["kernels"] = launches.usable(bench.device)
    if bench.args.device == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {"device": properties.name, "memory_gib": properties.total_memory / GIB}
    return found


def tests(bench: Bench) -> dict[str, Any]:
    """`pytest -m gpu` in a process of its own."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed here"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, min(bench.left, 180))
        )
    except subprocess.TimeoutExpired as error:
        return {"error": f"not finished after {error.timeout:.0f} s", "output": _text(error.stdout)[-4000:]}
    found = {"exit": done.returncode, "summary": (done.stdout.splitlines() or [""])[-1]}
    return found if done.returncode == 0 else found | {"error": "tests failed", "output": done.stdout[-8000:]}


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


@dataclass
class Part:
    """One measurement. seconds: that it needs with the 8B shape on an H200, as estimated before any run."""

    seconds: float
    run: Callable[[Bench], dict[str, Any]]


PARTS = {
    "facts": Part(10, facts),
    "lota s=0.99": Part(40, adapt(0.99, "element")),  # builds the model, compiles the kernels
    "lota s=0.9": Part(20, adapt(0.9, "element")),
    "lora r=64": Part(20, lora),
    "blocks s=0.9": Part(25, adapt(0.9, "block")),
    "calibration": Part(25, calibrate),
    "dpo s=0.9": Part(25, dpo),
    "pytest -m gpu": Part(60, tests),
    "kernels": Part(30, lambda bench: kernel_times(bench.args.shape, bench.args.device)),
    "lota s=0.9 plain": Part(20, adapt(0.9, "element", kernels=False)),
    "rows s=0.9": Part(20, adapt(0.9, "row")),
    "columns s=0.9": Part(20, adapt(0.9, "column")),
    "blocks s=0.99": Part(20, adapt(0.99, "block")),
    "rows s=0.99": Part(20, adapt(0.99, "row")),
    "compiled s=0.99": Part(60, compiled(0.99, "element")),
    "compiled rows s=0.9": Part(60, compiled(0.9, "row")),
    "packed s=0.99": Part(25, packing(0.99, "element")),  # from here on the model's attention is another
    "packed s=0.9": Part(20, packing(0.9, "element")),
    "packed blocks s=0.9": Part(20, packing(0.9, "block")),
}

# what is wanted: part, key, other part to compare with (None: the number itself), at most or at least, limit
REACHES = [
    ("lota s=0.99", "peak_gib", None, "<=", 20),
    ("lota s=0.9", "peak_gib", None, "<=", 26),
    ("lota s=0.99", "share_of_rate", None, ">=", 0.45),
    ("lota s=0.9", "share_of_rate", None, ">=", 0.45),
    ("lota s=0.99", "tokens_per_second", "lora r=64", ">=", 1.0),
    ("lota s=0.9", "tokens_per_second", "lora r=64", ">=", 1.0),
    ("blocks s=0.9", "tokens_per_second", "lora r=64", ">=", 1.1),
    ("rows s=0.9", "tokens_per_second", "lora r=64", ">=", 1.1),
    ("columns s=0.9", "tokens_per_second", "lora r=64", ">=", 1.1),
    ("lota s=0.99", "optimizer_share", None, "<=", 0.03),
    ("lota s=0.9", "optimizer_share", None, "<=", 0.03),
    ("dpo s=0.9", "peak_gib", "lota s=0.9", "<=", 1.15),
    ("calibration", "peak_gib", None, "<=", 40),
    ("calibration", "tokens_per_second", "lota s=0.9", ">=", 0.9),
    ("packed s=0.99", "seconds", "lota s=0.99", "<=", 1.1),
    ("lota s=0.9", "optimizer_share", "lota s=0.9 plain", "<=", 1.0),
    ("compiled s=0.99", "tokens_per_second", "lota s=0.99", ">=", 1.0),
    ("compiled rows s=0.9", "tokens_per_second", "rows s=0.9", ">=", 1.0),
]


def reaches(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted and what was measured; nothing where a part is missing."""
    found = []
    for part, key, other, sign, limit in REACHES:
        value = results.get(part, {}).get(key)
        if value is not None and other is not None:
            base = results.get(other, {}).get(key)
            value = None if base is None else value / base
        verdict = "not measured"
        if value is not None:
            verdict = "reached" if (value <= limit if sign == "<=" else value >= limit) else "missed"
        what = f"{part}: {key}" + (f" / {other}" if other else "")
        found.append({"what": what, "wanted": f"{sign} {limit}", "value": value, "verdict": verdict})
    return found


def print_tables(results: dict[str, Any], compared: list[dict[str, Any]]) -> None:
    """The contestants, then what was wanted of them."""
    columns = {"seconds": "s", "tokens_per_second": "tokens/s", "peak_gib": "GiB",
               "share_of_rate": "of rate", "optimizer_share": "optimizer"}  # fmt: skip
    print(f"\n{'part':18}" + "".join(f"{title:>11}" for title in columns.values()))
    for name, found in results.items():
        if "seconds" in found:
            row = (f"{found[key]:11.4g}" if key in found else f"{'-':>11}" for key in columns)
            print(f"{name:18}" + "".join(row))
        else:
            said = (f"{key} {_short(value)}" for key, value in found.items() if key != "command")
            print(f"{name:18}   " + "; ".join(said))
    for line in compared:
        if line["value"] is not None:
            print(f"{line['verdict']:8} {line['what']}: {line['value']:.3g}, wanted {line['wanted']}")
    sys.stdout.flush()


def _short(value: Any) -> str:
    """A number or text for the table; the whole is in the JSON file."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(inner)}" for key, inner in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]


def run_part(bench: Bench, name: str) -> None:
    """One part's results, or why there are none."""
    part = PARTS[name]
    needed = part.seconds if bench.args.device == "cuda" and bench.args.shape == "8b" else part.seconds / 60
    if bench.left < needed:
        bench.results[name] = {"skipped": f"needs about {needed:.0f} s, {max(0, bench.left):.0f} s are left"}
        return
    start = time.monotonic()
    try:
        found = part.run(bench)
    except Exception as error:  # the next part may work
        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
    bench.results[name] = found | {"part_seconds": time.monotonic() - start}
    gc.collect()
    if bench.args.device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=steps.SHAPES, default="8b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per part")
    parser.add_argument("--minutes", type=float, default=9, help="that it takes at most")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file of the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    args.dtype, args.checkpointing = "bfloat16", True
    bench = Bench(args)
    setting = {"shape": args.shape, "rows": args.rows, "length": args.length, "dtype": args.dtype}
    for name in args.parts:
        run_part(bench, name)
        compared = reaches(bench.results) if args.shape == "8b" and args.device == "cuda" else []
        write_json(args.out, {"setting": setting, "parts": bench.results, "reaches": compared})
        print_tables(bench.results, compared)


if __name__ == "__main__":
    main()
