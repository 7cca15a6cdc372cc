"""Merging measured: seconds and peak memory from deltas, from whole models, and with mergekit.

    python -m benchmarks.merging --sparsity 0.9

A random Llama of 124M parameters in bf16 and three neighbours, each with 1 - s of the matrices changed,
are merged by TIES. Every contestant is a command in a process of its own, imports included; they take turns,
medians are reported, and the peak resident memory of the process. `imports` is merge_models.py --help.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("a", "b", "c")
SHAPE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": 50257, "tie_word_embeddings": True,
}  # fmt: skip


def make(folder: Path, sparsity: float, shape: dict = SHAPE) -> None:
    """base/, and a, b, c/ with the deltas a.safetensors, ...; each as `transformers` saves it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lota.delta import extract

    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        tuned = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
        with torch.no_grad():
            for parameter in tuned.model.layers.parameters():
                if parameter.ndim == 2:
                    chosen = torch.rand(parameter.shape, generator=generator) >= sparsity
                    parameter[chosen] += 1e-2 * torch.randn(int(chosen.sum()), generator=generator).bfloat16()
        tuned.save_pretrained(folder / name)
        extract(folder / "base", folder / name, folder / f"{name}.safetensors")


def contestants(folder: Path) -> dict[str, list[str]]:
    """name -> command, the folder it writes last."""
    ours = [sys.executable, str(ROOT / "merge_models.py"), "--base", str(folder / "base")]
    rule = ["--method", "ties", "--density", "0.2"]
    deltas = [str(folder / f"{name}.safetensors") for name in NAMES]
    models = [str(folder / name) for name in NAMES]
    yml = ["--export-mergekit", str(folder / "ties.yml"), "--out"]
    kit = [str(Path(sys.executable).with_name("mergekit-yaml")), str(folder / "ties.yml"), "--quiet"]
    return {
        "imports": [*ours[:2], "--help"],
        "LoTA, deltas": [*ours, "--deltas", *deltas, *rule, "--out"],
        "LoTA, models": [*ours, "--deltas", *models, *rule, *yml],
        "mergekit-yaml, models": kit,
    }


def measured(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a command; ends the benchmark when it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"failed: {' '.join(command)}\n{log.read()}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(folder: Path, rounds: int) -> list[dict]:
    runs: dict[str, list[tuple[float, int]]] = {}
    for turn in range(rounds):
        for name, command in contestants(folder).items():
            out = [] if name == "imports" else [str(folder / f"out_{turn}_{name.replace(' ', '_')}")]
            runs.setdefault(name, []).append(measured([*command, *out]))
    return [
        {
            "what": name,
            "runs": len(pairs),
            "median_s": round(statistics.median(seconds for seconds, _ in pairs), 2),
            "peak_bytes": max(peak for _, peak in pairs),
        }
        for name, pairs in runs.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of the matrices left alone")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contestant runs")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        # in a process of its own: this one stays small, for Linux hands its peak down to what it starts
        code = f"import pathlib, benchmarks.merging as m; m.make(pathlib.Path({scratch!r}), {args.sparsity})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
        rows = measure(Path(scratch), args.rounds)
    print(f"{'contestant':<24} {'median s':>9} {'peak MiB':>9}")
    for row in rows:
        print(f"{row['what']:<24} {row['median_s']:>9.2f} {row['peak_bytes'] / 2**20:>9.0f}")
    print("\n".join(json.dumps({**row, "sparsity": args.sparsity}) for row in rows))


if __name__ == "__main__":
    main()
