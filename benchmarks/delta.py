"""Sparse task vector files: size against the entropy, speed of the coding, switching tasks on a loaded model.

    OMP_NUM_THREADS=1 python -m benchmarks.delta codec      # random positions and values
    python -m benchmarks.delta adapted                      # models really trained, at s = 0.9 and 0.99
    python -m benchmarks.delta switch                       # against loading, PEFT LoRA and PEFT SHiRA

Contestants take turns within one process; medians, and ratios of medians.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lota
from benchmarks.step import LINEAR, build_model, lora_config, shira_config
from lota.delta import Delta, extract
from lota.share.delta.cli import entropy_bits
from lota.share.delta.codec import decode, encode
from lota.share.delta.index import SEGMENT

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6
SPARSITIES = (0.9, 0.99)
SHARED = ROOT.parent / "shared"


def medians(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of each, the median of `rounds` in turns after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, work in contestants.items():
            start = clock()
            work()
            if i:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def codec(args: argparse.Namespace) -> None:
    """Random positions and values of a segment, in memory: compare and code; decode and restore.

    MB of weights per second of processor time, one thread.
    """
    print(f"{'dtype':>10} {'s':>5} {'size / bound':>13} {'encode MB/s':>12} {'decode MB/s':>12}")
    for dtype, bits in (("bfloat16", np.uint16), ("float32", np.uint32)):
        for sparsity in (0.5, *SPARSITIES):
            generator = np.random.default_rng(0)
            base = generator.integers(0, np.iinfo(bits).max, SEGMENT, dtype=bits)
            changed = generator.random(SEGMENT) >= sparsity
            xors = generator.integers(1, np.iinfo(bits).max, SEGMENT, dtype=bits)
            tuned = np.where(changed, base ^ xors, base)
            made = []

            def write(base=base, tuned=tuned, made=made) -> None:
                positions = np.flatnonzero(base != tuned)
                made[:] = [encode(SEGMENT, positions, base[positions] ^ tuned[positions])]

            def read(base=base, made=made, bits=bits) -> np.ndarray:
                again = base.copy()
                positions, found = decode(SEGMENT, bits, *made[0])
                again[positions] ^= found
                return again

            seconds = medians({"encode": write, "decode": read}, args.rounds, time.process_time)
            assert np.array_equal(read(), tuned)
            n = int(changed.sum())
            bound = (entropy_bits(SEGMENT, n) + 8 * n * base.itemsize) / 8
            rates = [base.nbytes / MB / seconds[name] for name in ("encode", "decode")]
            ratio = len(made[0][1]) / bound
            print(f"{dtype:>10} {sparsity:5} {ratio:13.4f} {rates[0]:12.0f} {rates[1]:12.0f}")


def adapted(args: argparse.Namespace) -> None:
    """Calibrate, extract masks, adapt with save_delta=true: as on the command line, base files in bf16."""
    models = {"tiny-llama": (ROOT / "assets" / "tiny-llama", "toy_sort", ["n_examples=1000"])}
    if SHARED.is_dir():
        data = [f"data_dir={SHARED / 'data'}", "data_fraction=0.2"]
        models["stories260K"] = (SHARED / "models" / "stories260K", "sql", data)
    titles = ("model", "s", "kept", "changed", "bytes", "/ bound, kept", "/ bound, changed")
    print(*titles, sep="\t")
    for name, (model, task, data) in models.items():
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base"
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(base)
            for file in model.glob("tokenizer*"):
                (base / file.name).write_bytes(file.read_bytes())
            for sparsity, path in _adapt(base, task, data, Path(folder)).items():
                delta = Delta.open(path)
                n, size = delta.meta["kept"], path.stat().st_size
                scope = n / (1 - delta.meta["sparsity"])
                bounds = [(entropy_bits(round(scope), k) + 16 * k) / 8 for k in (n, delta.n_changed)]
                ratios = [f"{size / bound:.3f}" for bound in bounds]
                print(name, sparsity, n, delta.n_changed, size, *ratios, sep="\t", flush=True)


def _adapt(base: Path, task: str, data: list[str], folder: Path) -> dict[float, Path]:
    """Sparsity -> delta file of a run."""
    shared = ["model=blank_model", f"model.name_or_path={base}", f"datasets=[{task}]", *data, "batch_size=8",
              "do_first_eval=false", "warmup_steps=5", "minimum_log_interval_secs=10"]  # fmt: skip
    environment = {**os.environ, "PROJECT_CACHE": str(folder)}

    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)

    run("train_single_gpu.py", "exp_name=dense", "mask_path=null", "lr=1e-4", *shared)
    tuned = str(next((folder / "dense").glob("*-*")))
    sparsities = list(map(str, SPARSITIES))
    run("extract_masks.py", "--base", str(base), "--tuned", tuned, "--sparsities", *sparsities, "--name", "m",
        "--out", str(folder / "masks"))  # fmt: skip
    found = {}
    for s in SPARSITIES:
        mask = next((folder / "masks").rglob(f"{s}_mask.pt"))
        run(
            "train_single_gpu.py",
            f"exp_name=s{s}",
            f"mask_path={mask}",
            "lr=1e-3",
            "save_delta=true",
            *shared,
        )
        found[s] = next((folder / f"s{s}").rglob("delta.safetensors"))
    return found


def switch(args: argparse.Namespace) -> None:
    """From one task to another on a 124M-parameter bf16 Llama, ready to run at the base's speed."""
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(args)
        model.save_pretrained(Path(folder) / "base")
        contestants: dict[str, Callable[[], object]] = {}
        for s in SPARSITIES:
            deltas = two_tasks(model, Path(folder), s)
            contestants[f"lota.switch, s={s}"] = _alternating(
                partial(lota.switch, copy.deepcopy(model)), deltas
            )
        tasks = [Path(folder) / f"{i}_{SPARSITIES[0]}" for i in range(2)]
        contestants["load the other folder"] = _alternating(_load, tasks)
        target = build_model(args)
        contestants["copy the other folder's weights in"] = _alternating(
            lambda path: target.load_state_dict(load_file(path / "model.safetensors"), strict=False), tasks
        )
        contestants |= _passes(model)
        for name, config in (("LoRA", lora_config), ("SHiRA", shira_config)):
            contestants[f"PEFT {name} r=64: unmerge, merge"] = _peft(args, config)
        seconds = medians(contestants, args.rounds)
        for name, value in seconds.items():
            ratio = value / seconds["load the other folder"]
            print(f"{name:38} {1000 * value:9.1f} ms {ratio:8.2f} x loading")
        _forward(args, model)


def _load(folder: Path) -> torch.nn.Module:
    """The model of a folder (in the page cache), every page of it read: transformers maps the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for p in model.parameters():
        p.detach().view(-1)[::2048].sum()
    return model


def two_tasks(model: torch.nn.Module, folder: Path, sparsity: float) -> list[Delta]:
    """Deltas of two random disjoint changes of the share 1 - s of the linear layers; the model stays."""
    found = []
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            if any(kind in name for kind in LINEAR):
                place = torch.rand(p.shape, generator=torch.Generator().manual_seed(7))
                chosen = (place >= i * (1 - sparsity)) & (place < (i + 1) * (1 - sparsity))
                p.data += (chosen * torch.randn(p.shape, generator=generator) * 0.01).to(p.dtype)
        tuned = folder / f"{i}_{sparsity}"
        model.save_pretrained(tuned)
        model.load_state_dict(before, strict=False)
        extract(folder / "base", tuned, folder / f"{i}_{sparsity}.safetensors")
        found.append(Delta.open(folder / f"{i}_{sparsity}.safetensors"))
    return found


def _passes(model: torch.nn.Module) -> dict[str, Callable[[], object]]:
    """What going over all entries of the changed layers costs, in their order and eight bytes at a time.

    A switch at s = 0.9 touches 99 % of their cache lines of 64 bytes, and at s = 0.99 48 %.
    """
    twin = copy.deepcopy(model)
    words = [
        p.data.view(-1).view(torch.int64)
        for name, p in twin.named_parameters()
        if any(kind in name for kind in LINEAR)
    ]
    return {
        "read the changed layers once": lambda: [part.sum() for part in words],
        "read and write them once": lambda: [part.bitwise_xor_(0) for part in words],
    }


def _alternating(change: Callable, states: list) -> Callable[[], object]:
    turn = itertools.cycle(states)
    return lambda: change(next(turn))


def _peft(args: argparse.Namespace, config: Callable) -> Callable[[], object]:
    """Two random adapters, merged into the weights in turn."""
    from peft import get_peft_model

    adapted = get_peft_model(build_model(args), config(), adapter_name="task1")
    adapted.add_adapter("task2", config())
    for name, p in adapted.named_parameters():
        if "lora_" in name or "shira_" in name:
            torch.nn.init.normal_(p.data, std=0.01)
    names = itertools.cycle(["task1", "task2"])
    adapted.merge_adapter(["task2"])

    def change() -> None:
        adapted.unmerge_adapter()
        adapted.merge_adapter([next(names)])

    return change


@torch.no_grad()
def _forward(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """What an adapter that is switched by `set_adapter` alone, unmerged, costs in every forward pass."""
    from peft import get_peft_model

    ids = torch.randint(0, 1000, (1, 32))
    contestants = {"no adapter, or an attached delta": model}
    contestants |= {
        f"PEFT {name} r=64, unmerged": get_peft_model(build_model(args), config())
        for name, config in (("LoRA", lora_config), ("SHiRA", shira_config))
    }
    seconds = medians({n: (lambda m=m: m(input_ids=ids)) for n, m in contestants.items()}, args.rounds)
    first = next(iter(seconds.values()))
    print("a forward pass of 32 tokens:")
    for name, value in seconds.items():
        print(f"{name:38} {1000 * value:9.1f} ms {value / first:8.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("codec", "adapted", "switch"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", default="124m")
    args = parser.parse_args()
    args.dtype, args.device, args.length, args.checkpointing = "bfloat16", "cpu", 128, False
    {"codec": codec, "adapted": adapted, "switch": switch}[args.what](args)


if __name__ == "__main__":
    main()
