"""One of two workers that split a model: its answers and its weights after each of several faults."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import vllm_stand_in
from delta_models import bits

from lota.share.vllm import DeltaWorker

LAST = "model.layers.1.mlp.down_proj.weight"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    patching = pytest.MonkeyPatch()
    vllm_stand_in.install(patching)
    worker = vllm_stand_in.worker_class(DeltaWorker)(folder / "base", rank=rank, size=2)
    models = {
        name: [bits(p) for p in vllm_stand_in.PackedModel(folder / name, rank, 2).parameters()]
        for name in ("base", "t0", "t1")
    }
    own = folder / f"node{rank}"  # what the path of a delta leads to on this worker's machine
    own.mkdir()
    steps = []

    def step(method: str, file: str | None = None) -> None:
        try:
            said = getattr(worker, method)(*([] if file is None else [str(own / file)]))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        held = [bits(p) for p in worker.model.parameters()]
        model = next(
            (n for n, all_ in models.items() if all(a.equal(b) for a, b in zip(held, all_, strict=True))),
            None,
        )
        try:
            request = worker.execute_model("it")
        except RuntimeError as error:
            request = str(error)
        steps.append([str(said), model, request])

    shutil.copy(folder / "0.safetensors", own / "0.safetensors")
    shutil.copy(folder / f"{rank}.safetensors", own / "mixed.safetensors")
    if rank == 0:
        shutil.copy(folder / "1.safetensors", own / "1.safetensors")
    step("attach_delta", "0.safetensors")
    step("switch_delta", "1.safetensors")  # the second machine lacks it
    step("switch_delta", "mixed.safetensors")
    shutil.copy(folder / "1.safetensors", own / "1.safetensors")
    worker.model.refused = LAST if rank == 0 else None
    worker.lota_deltas.tried.clear()
    step("switch_delta", "1.safetensors")
    worker.model.refused, worker.model.failing = None, LAST if rank == 1 else None
    step("switch_delta", "1.safetensors")
    step("restore_base")
    worker.model.failing = None
    step("restore_base")
    step("switch_delta", "1.safetensors")
    (folder / f"answers{rank}.json").write_text(json.dumps(steps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
