"""What `lota.share.vllm` needs of vLLM 0.33: patches of checkpoints, a worker, and a model that packs.

`install(monkeypatch)` puts the module of patches into sys.modules. If LOTA_VLLM_PATCHES names vLLM's own file
(vllm/model_executor/model_loader/checkpoint_weight_patch.py, which needs torch alone), that is used.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

NAME = "vllm.model_executor.model_loader.checkpoint_weight_patch"
PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
PACKED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class CheckpointWeightPatch(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def load_checkpoint_weight_patches(model, patches, *, max_chunk_bytes):
    """All patches are checked before the first is written; then NaN in a tensor leaves what is."""
    assert max_chunk_bytes > 0
    patches = list(patches)
    for patch in patches:
        numel = math.prod(patch.shape)
        unique = len(patch.indices.unique()) == len(patch.indices)
        inside = patch.indices.numel() == 0 or (patch.indices.min() >= 0 and patch.indices.max() < numel)
        if not unique or not inside or patch.values.isnan().any() or len(patch.values) != len(patch.indices):
            raise ValueError("Sparse checkpoint patches contain NaN, out-of-range or duplicate indices")
        if patch.values.ndim != 1 or not patch.dtype.is_floating_point:
            raise TypeError(patch.name)
    for patch in patches:
        whole = torch.full((math.prod(patch.shape),), math.nan, dtype=patch.dtype)
        whole[patch.indices.long()] = patch.values.to(patch.dtype)
        held = model.get_parameter(model.rows[patch.name][0].replace(".", "/")).data
        before = held.clone()
        try:
            model.load_weights([(patch.name, whole.view(patch.shape))])
        finally:
            held.copy_(torch.where(held.isnan(), before, held))


def install(monkeypatch) -> None:
    file = os.environ.get("LOTA_VLLM_PATCHES")
    if file:
        spec = importlib.util.spec_from_file_location(NAME, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = ModuleType(NAME)
        module.CheckpointWeightPatch = CheckpointWeightPatch
        module.load_checkpoint_weight_patches = load_checkpoint_weight_patches
    parts = NAME.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(sys.modules, NAME, module)
    state = ModuleType("vllm.distributed.parallel_state")
    state.get_world_group = lambda: SimpleNamespace(cpu_group=torch.distributed.group.WORLD)
    monkeypatch.setitem(sys.modules, "vllm.distributed", ModuleType("vllm.distributed"))
    monkeypatch.setitem(sys.modules, state.__name__, state)


class PackedModel(nn.Module):
    """One worker's part of a Llama as vLLM holds it: q, k, v in one weight, gate and up in one, in slices."""

    def __init__(self, folder: Path, rank: int = 0, size: int = 1, dtype=torch.bfloat16):
        super().__init__()
        self.rank, self.size = rank, size
        self.failing = None  # a tensor at whose first change the device is lost
        self.refused = None  # one of a form that cannot be patched, such as a quantized one
        state = tensors_of(folder)
        self.rows: dict[str, tuple[str, int]] = {}  # checkpoint name -> (own name, first row there)
        heights: dict[str, int] = {}
        for name, value in sorted(state.items(), key=lambda item: self.order(item[0])):
            own = self.own_name(name)
            self.rows[name] = (own, heights.get(own, 0))
            heights[own] = heights.get(own, 0) + self.part(name, value).shape[0]
        for own, height in heights.items():
            like = next(self.part(name, state[name]) for name, (o, _) in self.rows.items() if o == own)
            empty = torch.zeros(height, *like.shape[1:], dtype=dtype)
            self.register_parameter(own.replace(".", "/"), nn.Parameter(empty, requires_grad=False))
        self.load_weights(state.items())

    @staticmethod
    def order(name: str) -> tuple[str, int]:
        places = list(PACKED)
        part = name.split(".")[-2]
        return PackedModel.own_name(name), places.index(part) if part in places else 0

    @staticmethod
    def own_name(name: str) -> str:
        for part, packed in PACKED.items():
            name = name.replace(f".{part}.", f".{packed}.")
        return name

    def part(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The rows or columns of this worker."""
        if "norm" in name:
            return value
        return value.chunk(self.size, dim=1 if "o_proj" in name or "down_proj" in name else 0)[self.rank]

    def load_weights(self, weights):
        loaded = set()
        for name, value in weights:
            if name == self.refused:
                raise NotImplementedError(f"{name} is quantized")
            if name == self.failing and not value.isnan().all():
                raise RuntimeError("the device was lost")
            own, first = self.rows[name]
            part = self.part(name, value)
            self.get_parameter(own.replace(".", "/")).data[first : first + part.shape[0]].copy_(part)
            loaded.add(own)
        return loaded


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def worker_class(extension: type) -> type:
    """A worker's class with the extension among its bases, as vLLM puts it there."""

    class Base:
        pass

    class Worker(Base):
        def __init__(self, folder: Path, **sizes):
            self.model_config = SimpleNamespace(model=str(folder))
            self.model = PackedModel(folder, **sizes)

        def get_model(self):
            return self.model

        def execute_model(self, request):
            return f"answered {request}"

    for attribute in dir(extension):
        assert attribute.startswith("__") or not hasattr(Worker, attribute)
    Worker.__bases__ = (*Worker.__bases__, extension)
    return Worker
