"""Base and tuned folders of small models for the tests of deltas."""

from __future__ import annotations

from pathlib import Path

import hf_models
import torch
from safetensors.torch import load_file
from torch import nn

from lota.delta import Delta, extract
from lota.masks import Mask


def save_model(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings
) -> nn.Module:
    model = hf_models.new_model(kind).to(dtype)
    model.save_pretrained(folder, **settings)
    return model


def change(model: nn.Module, seed: int = 0, density: float = 0.1, mask=None) -> nn.Module:
    """Add noise to a share of the entries, or to those that a mask keeps; the model is changed in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        chosen = torch.rand(p.shape, generator=generator) < density
        if mask is not None:
            chosen = mask.dense(name) if name in mask else torch.zeros_like(chosen)
        p.data += (torch.randn(p.shape, generator=generator) * 0.01 * chosen).to(p.dtype)
    return model


def delta_pair(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings
) -> tuple[Path, Path, Path]:
    """base/, tuned/ and the delta between them."""
    base, tuned, delta = folder / "base", folder / "tuned", folder / "d.safetensors"
    change(save_model(base, kind, dtype, **settings)).save_pretrained(tuned, **settings)
    extract(base, tuned, delta)
    return base, tuned, delta


def disjoint_deltas(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, n: int = 3):
    """n deltas of one base that change different entries: (base values, tuned values, open deltas)."""
    model = save_model(folder / "base", kind, dtype)
    base = values(model)
    generator = torch.Generator().manual_seed(0)
    owner = {name: torch.randint(n + 1, p.shape, generator=generator) for name, p in base.items()}
    tuned, deltas = [], []
    for i in range(n):
        model.load_state_dict(base, strict=False)
        change(model, seed=i, mask=Mask.from_dense({name: o == i for name, o in owner.items()}))
        model.save_pretrained(folder / f"t{i}")
        tuned.append(values(model))
        extract(folder / "base", folder / f"t{i}", folder / f"{i}.safetensors")
        deltas.append(Delta.open(folder / f"{i}.safetensors"))
    return base, tuned, deltas


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder under its name on disk."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same_files(a: Path, b: Path) -> bool:
    one, other = tensors(a), tensors(b)
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and torch.equal(bits(one[n]), bits(other[n]))
        for n in one
    )
