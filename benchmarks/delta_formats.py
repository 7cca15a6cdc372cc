"""A sparse task vector in every format: bytes, and times to write it, to put it on a model, to take it off.

    OMP_NUM_THREADS=1 python -m benchmarks.delta_formats

Two random changes of a share 1 - s of the linear layers of a 124M-parameter Llama in bf16, against PEFT's
adapters and the whole model. Contestants take turns within one process; medians. vLLM is a stand-in with its
contract (tests/vllm_stand_in.py), or vLLM's own function if LOTA_VLLM_PATCHES names its file.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lota
from benchmarks.delta import MB, SPARSITIES, medians, two_tasks
from benchmarks.step import LINEAR, build_model
from lota.delta import Delta, apply, extract
from lota.share.delta.indices import export_indices
from lota.share.delta.peft_adapter import export_peft

Work = Callable[[], object]


def load(folder: Path) -> nn.Module:
    """A model in memory of its own, not in the pages of its file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def size(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def adapters(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Bytes of PEFT's adapters of all linear layers, in bf16."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    found = {}
    for kind, rank in ((LoraConfig, 8), (LoraConfig, 64), (ShiraConfig, 64)):
        config = kind(r=rank, target_modules=LINEAR, task_type="CAUSAL_LM")
        adapted = get_peft_model(build_model(args), config).bfloat16()
        name = f"PEFT {kind.__name__.removesuffix('Config')} r={rank}"
        adapted.save_pretrained(folder / name)
        found[name] = size(folder / name)
    return found


def fresh(folder: Path) -> Iterator[Path]:
    """Names that nothing has, each new one in place of the one before."""
    for i in itertools.count():
        place = folder / f"made_{i}"
        yield place
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)


def exports(folder: Path, s: float, names: Iterator[Path]) -> dict[str, Work]:
    base, tuned, delta = folder / "base", folder / f"0_{s}", folder / f"0_{s}.safetensors"
    return {
        "delta (extract)": lambda: extract(base, tuned, next(names)),
        "indices": lambda: export_indices(base, delta, next(names)),
        "PEFT Super-Tuning": lambda: export_peft(base, delta, next(names)),
        "whole folder (apply)": lambda: apply(base, delta, next(names)),
    }


def changes(folder: Path, s: float, delta: Delta) -> dict[str, Work]:
    """On and off, in turns, each on a model of its own."""
    plain, model = load(folder / "base"), load(folder / "base")
    file = folder / f"indices_{s}.safetensors"
    held: dict[str, torch.Tensor] = {}

    def put() -> None:
        tensors, parameters = load_file(file), dict(plain.named_parameters())
        for name in [key.removesuffix(".values") for key in tensors if key.endswith(".values")]:
            place, flat = tensors[f"{name}.indices"].long(), parameters[name].data.view(-1)
            held[name] = flat[place]
            flat[place] = tensors[f"{name}.values"]

    def take() -> None:
        tensors, parameters = load_file(file), dict(plain.named_parameters())
        for name, values in held.items():
            parameters[name].data.view(-1)[tensors[f"{name}.indices"].long()] = values

    worker = served(folder / "base")
    return {
        "delta on": lambda: lota.attach(model, delta),
        "delta off": lambda: lota.detach(model),
        "indices on, with safetensors and torch": put,
        "indices off": take,
        **super_tuned(folder, s),
        "vLLM worker on": lambda: worker.attach_delta(str(delta.path)),
        "vLLM worker off": lambda: worker.detach_delta(),
        "another folder": lambda: load(folder / f"0_{s}"),
    }


def super_tuned(folder: Path, s: float) -> dict[str, Work]:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(folder / "base"), folder / f"peft_{s}")
    return {"Super-Tuning merged": adapted.merge_adapter, "Super-Tuning unmerged": adapted.unmerge_adapter}


def served(base: Path) -> object:
    from lota.share.vllm import DeltaWorker
    from tests import vllm_stand_in

    vllm_stand_in.install(pytest.MonkeyPatch())
    return vllm_stand_in.worker_class(DeltaWorker)(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="124m")
    args = parser.parse_args()
    args.dtype, args.device, args.length, args.checkpointing = "bfloat16", "cpu", 128, False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["PROJECT_CACHE"] = str(folder / "cache")  # of remembered hashes
        model = build_model(args)
        model.save_pretrained(folder / "base")
        whole = size(folder / "base")
        rows = {"the whole model": whole, **adapters(args, folder)}
        for s in SPARSITIES:
            delta = two_tasks(model, folder, s)[0]
            export_indices(folder / "base", delta.path, folder / f"indices_{s}.safetensors")
            export_peft(folder / "base", delta.path, folder / f"peft_{s}")
            rows |= {
                f"delta, s={s}": size(delta.path),
                f"indices, s={s}": size(folder / f"indices_{s}.safetensors"),
                f"PEFT Super-Tuning, s={s}": size(folder / f"peft_{s}"),
            }
        for name, bytes_ in rows.items():
            print(f"{name:32} {bytes_ / MB:8.1f} MB {100 * bytes_ / whole:6.1f} % of the model")
        for s in SPARSITIES:
            delta, names = Delta.open(folder / f"0_{s}.safetensors"), fresh(folder)
            parts = {"write": exports(folder, s, names), "on and off": changes(folder, s, delta)}
            for title, work in parts.items():
                print(f"{title}, s={s}", flush=True)
                for name, seconds in medians(work, args.rounds).items():
                    print(f"  {name:40} {1000 * seconds:9.1f} ms")


if __name__ == "__main__":
    main()
