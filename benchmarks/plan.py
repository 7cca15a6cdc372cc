"""Peak memory as `python -m lota.plan` predicts it, against the peak of the real run, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.plan                        # all settings, about fifteen minutes
    OMP_NUM_THREADS=1 python -m benchmarks.plan --settings entries dpo
    OMP_NUM_THREADS=1 python -m benchmarks.plan --json plan.json

Each setting trains a model of random weights by the trainer itself, two steps on rows as long as max_length,
an evaluation and a checkpoint, three times, in processes of their own: with torch's memory profiler, which
sees every allocation of torch; for the resident memory above what the imports took; and for that without the
holes that the C library leaves in its heap (MALLOC_MMAP_THRESHOLD_). The table has all three, and the
prediction over each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig

from lota.distributed.processes import joined

ROOT = Path(__file__).resolve().parent.parent
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "124m": lambda: _llama(50_257, 768, 2_048, 12),
    "41m": lambda: _llama(32_000, 512, 1_376, 8),
    "wide": lambda: _llama(8_192, 1_024, 2_816, 4),
    "gpt2": lambda: GPT2Config(vocab_size=16_000, n_positions=512, n_embd=512, n_layer=8, n_head=8),
    "mixtral": lambda: MixtralConfig(
        vocab_size=4_096, hidden_size=512, intermediate_size=1_024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, num_local_experts=8, max_position_embeddings=1_024,
    ),
}  # fmt: skip
BF16 = ("model.fsdp_policy_mp=bfloat16",)
# name -> model, sparsity and granularity of its mask (None: no mask), overrides
SETTINGS: dict[str, tuple[str, tuple[float, str] | None, tuple[str, ...]]] = {
    "entries": ("41m", (0.9, "element"), ()),
    "entries, s=0.99": ("41m", (0.99, "element"), ()),
    "entries, global": ("41m", (0.9, "element"), ("grad_norm_strategy=global", "optimizer=AdamW")),
    "rows": ("41m", (0.9, "row"), ()),
    "blocks": ("41m", (0.9, "block"), ()),
    "checkpointing, parts": (
        "41m", (0.9, "element"), ("activation_checkpointing=true", "gradient_accumulation_steps=2"),
    ),
    "calibrate": ("41m", None, ()),
    "calibrate, AdamW": ("41m", None, ("optimizer=AdamW", "grad_norm_strategy=global")),
    "calibrate, mixed": ("wide", None, (*BF16, "activation_checkpointing=true")),
    "calibrate, low memory": (
        "wide", None,
        ("model.policy_dtype=bfloat16", "stochastic_rounding=true", "optimizer_state=bfloat16"),
    ),
    "entries, bf16": ("wide", (0.9, "element"), BF16),
    "lora": ("41m", None, ("adapter=lora", "lora_rank=16")),
    "dpo": ("41m", (0.9, "element"), ("loss=dpo",)),
    "dpo, second model": ("41m", None, ("loss=dpo",)),
    "packed": ("41m", (0.9, "element"), ("packing=true",)),
    "gpt2": ("gpt2", (0.9, "element"), ()),
    "mixtral": ("mixtral", (0.9, "element"), ()),
    "replicas": ("41m", (0.9, "element"), ()),
    "shards": ("41m", None, ("trainer=FSDPTrainer",)),
    "shards, entries": ("41m", (0.9, "element"), ("trainer=FSDPTrainer",)),
    "large": ("124m", (0.9, "element"), ()),
}  # fmt: skip
PROCESSES = {"replicas": 2, "shards": 2, "shards, entries": 2}  # of settings that have several
ROWS, LENGTH = 4, 256


def _llama(vocabulary: int, hidden: int, inner: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=True,
        max_position_embeddings=1_024,
    )  # fmt: skip


# What is measured


def make_files(folder: Path, name: str) -> list[str]:
    """Model, data and mask of a setting in a folder; returns the overrides of its run."""
    from transformers import AutoModelForCausalLM

    from benchmarks.step import line_mask, random_mask

    shape, mask, overrides = SETTINGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[shape]())
    model.save_pretrained(folder / "model")
    for file in (ROOT / "assets" / "tiny-llama").glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    on_preferences = "loss=dpo" in overrides
    if mask is not None:
        sparsity, granularity = mask
        made = random_mask(model, sparsity) if granularity == "element" else line_mask(model, *mask)
        made.save(folder / "mask.pt")
        overrides += (f"mask_path={folder / 'mask.pt'}",)
    lengths = [40, LENGTH, LENGTH, LENGTH] * 8  # words; a word is a token at least
    texts = [" ".join(["cat"] * n) for n in lengths]
    if on_preferences:
        rows = [{"instruction": "say", "output_1": t, "output_2": f"a {t}", "preference": 1} for t in texts]
        (folder / "pairs.json").write_text(json.dumps(rows))
        overrides += ("datasets=[sharegpt]", f"prefs_path={folder / 'pairs.json'}", "eval_every=100")
    else:
        data = folder / "tasks" / "gsm8k"
        data.mkdir(parents=True)
        rows = [{"question": f"{n} cats?", "answer": f"{t}\n#### {n}"} for n, t in enumerate(texts)]
        for split in ("train", "test"):
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides += ("datasets=[gsm8k]", "eval_every=8")
    return [
        "exp_name=measured", "model=blank_model", f"model.name_or_path={folder / 'model'}",
        f"data_dir={folder}", f"local_dirs=[{folder / 'runs'}]", f"batch_size={ROWS}", f"max_length={LENGTH}",
        "max_prompt_length=16", f"n_examples={2 * ROWS}", f"eval_batch_size={ROWS}", "n_eval_examples=4",
        "do_first_eval=false", "save_every=8", "lr=1e-4", "warmup_steps=0", *overrides,
    ]  # fmt: skip


def composed(overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from lota.config import Config
    from lota.train.cli import register

    register("training", Config)
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        return OmegaConf.to_object(compose("config", overrides=overrides))


# Measuring, in a process of its own


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024


class Phases:
    """Peaks of resident memory between moments, and the moments."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.moments: list[tuple[int, str]] = []
        self.phase = "load"
        self.start("load")

    def start(self, phase: str) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), resident("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
        self.phase = phase
        self.moments.append((time.time_ns(), phase))


def measured_trainer(trainer: type, phases: Phases, loaded: Callable[[Any], None]) -> type:
    """A trainer that notes its phases. loaded: called when all is there that stays."""

    class Measured(trainer):  # type: ignore[misc, valid-type]
        def load(self) -> None:
            super().load()
            loaded(self)
            phases.start("steps")

        def evaluate(self) -> None:
            phases.start("evaluate")
            super().evaluate()
            phases.start("steps")

        def save(self) -> Path | None:
            phases.start("save")
            folder = super().save()
            phases.start("end")
            return folder

    return Measured


def measure(overrides: list[str], profiled: bool) -> dict[str, int]:
    """Peak bytes of each phase: of torch's allocator, or resident above what the imports took."""
    from trainers import TRAINERS

    config = composed(overrides)
    kept, before = [], _live_bytes()
    phases = Phases()
    kind: Any = TRAINERS[config.trainer.name]
    trainer = measured_trainer(kind, phases, lambda run: kept.append(_live_bytes() - before))(config)
    imports = resident("VmRSS")
    phases.start("load")
    if not profiled:
        trainer.train()
        return {phase: peak - imports for phase, peak in phases.peaks.items()}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        trainer.train()
    return _allocated(profile, phases.moments, kept[0])


def _live_bytes() -> int:
    """Of all tensors that this process holds."""
    import gc

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance would ask things that warn
        if not issubclass(kind, torch.Tensor) or issubclass(kind, FakeTensor):
            continue
        if isinstance(thing, DTensor):
            thing = thing.to_local()
        if thing.layout == torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _allocated(profile: Any, moments: list[tuple[int, str]], live: int) -> dict[str, int]:
    """Peaks of the allocator by phase. live: bytes when the steps began; changes are added to these."""
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    began = next(moment for moment, phase in moments if phase == "steps")
    total = live - sum(size for moment, size in events if moment < began)
    peaks: dict[str, int] = {}
    marks: Iterator[tuple[int, str]] = iter([*moments, (sys.maxsize, "")])
    phase, until = "load", next(marks)
    for moment, size in events:
        while moment >= until[0]:
            phase, until = until[1], next(marks)
        total += size
        peaks[phase] = max(peaks.get(phase, 0), total)
    return peaks


# The table


def predicted(overrides: list[str], processes: int = 1) -> dict[str, int]:
    """Peak bytes of each phase of one process, as a plan says."""
    from lota.models.scope import meta_model
    from lota.plan.predict import Setup, predict

    config = composed(overrides)
    setup = Setup(device="cpu", processes=processes, length=LENGTH)
    found = predict(config, meta_model(config.model.name_or_path), setup)
    peaks = {phase: memory.peak for phase, memory in found.phases.items()}
    return peaks | {"steps": max(peaks[phase] for phase in ("forward", "backward", "step"))}


def in_own_process(what: str, overrides: list[str], n: int = 1, **environment: str) -> dict[str, int]:
    module = ["-m", "benchmarks.plan", "--measure", what, *overrides]
    if n > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        module = [*start, *module]
    command = [sys.executable, "-W", "ignore", *module]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{what} of {overrides} failed:\n{done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--measure", choices=["profiled", "resident"], help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.measure:
        with joined() as together:
            found = measure(overrides, args.measure == "profiled")
            if together.first:
                print("\n" + json.dumps(found))
        return
    print(
        "| setting | model | predicted MiB | allocated | p / it | resident, no holes | p / it "
        "| resident | p / it |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    numbers = {}
    for name in args.settings:
        with tempfile.TemporaryDirectory() as folder:
            given = make_files(Path(folder), name)
            plan = predicted(given, PROCESSES.get(name, 1))
            n = PROCESSES.get(name, 1)
            allocated = in_own_process("profiled", given, n)
            again = [*given, "overwrite=true"]
            no_holes = in_own_process("resident", again, n, MALLOC_MMAP_THRESHOLD_="131072")
            whole = in_own_process("resident", again, n)
        measured = {"allocated": allocated, "resident, no holes": no_holes, "resident": whole}
        numbers[name] = {"predicted": plan, **measured}
        print(_line(name, plan, measured), flush=True)
        if args.json:
            args.json.write_text(json.dumps(numbers, indent=2) + "\n")


def _line(name: str, plan: dict[str, int], measured: dict[str, dict[str, int]]) -> str:
    """Of the highest of all phases after loading."""
    cells = [name, SETTINGS[name][0], f"{_highest(plan) / 2**20:,.0f}"]
    for peaks in measured.values():
        cells += [f"{_highest(peaks) / 2**20:,.0f}", f"{_highest(plan) / _highest(peaks):.3f}"]
    return f"| {' | '.join(cells)} |"


def _highest(peaks: dict[str, int]) -> int:
    return max(peaks.get(phase, 0) for phase in ("steps", "evaluate", "save"))


if __name__ == "__main__":
    main()
