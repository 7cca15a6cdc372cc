"""Base and tuned models on disk to extract masks from, and masks by a sort of everything in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lota.masks import Mask
from lota.models import chunks
from lota.models.scope import find_scope
from tests.hf_models import save_model, save_policy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks per tensor, also in tiny models; a module that imports this has it in all its tests."""
    monkeypatch.setattr(chunks, "CHUNK", 512)


def make_pair(tmp_path: Path, kind: str = "llama", dtype=torch.float32, ties: bool = True, tuned: str = "hf"):
    """A base folder of several shards and a tuned model; returns paths and both loaded models."""
    base = save_model(kind, tmp_path / "base").to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.manual_seed(1)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    with torch.no_grad():
        for parameter in changed.parameters():
            steps = torch.randint(-3, 4, parameter.shape) / 4 if ties else torch.randn(parameter.shape)
            parameter += steps.to(dtype)
    if tuned == "policy":
        return tmp_path / "base", save_policy(tmp_path / "policy.pt", changed.state_dict()), base, changed
    changed.save_pretrained(tmp_path / "tuned", max_shard_size="15KB")
    return tmp_path / "base", tmp_path / "tuned", base, changed


def saliencies_of(base: nn.Module, tuned: nn.Module) -> dict[str, torch.Tensor]:
    """|tuned - base| of every parameter of the scope, in fp32."""
    first, second = dict(base.named_parameters()), dict(tuned.named_parameters())
    return {
        name: (second[name].detach().float() - first[name].detach().float()).abs()
        for name in find_scope(base)
    }


def sorted_masks(saliencies: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Kept flags of the k largest nonzero saliencies; ties by position in parameter order."""
    flat = torch.cat([value.reshape(-1) for value in saliencies.values()]).double()
    order = torch.argsort(flat, descending=True, stable=True)[:k]
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[flat[order] > 0]] = True
    parts = kept.split([value.numel() for value in saliencies.values()])
    return {name: part.reshape(saliencies[name].shape) for name, part in zip(saliencies, parts, strict=True)}


def assert_mask(mask: Mask, expected: dict[str, torch.Tensor]) -> None:
    assert mask.names == list(expected)
    for name, flags in expected.items():
        assert torch.equal(mask.dense(name), flags), name
    assert mask.meta["kept"] == mask.n_kept == sum(int(flags.sum()) for flags in expected.values())
