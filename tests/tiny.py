"""Tiny random models of several architectures, and random masks over them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lota.masks import Mask
from lota.masks.extract.units import units_of
from lota.models.loading import turn_dropout_off
from lota.models.scope import find_scope
from tests.hf_models import new_config

VOCAB = 61
ARCHITECTURES = ("llama", "gpt2", "qwen2", "gpt_neox", "mixtral")


def make(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A randomly initialised causal LM without dropout, seeded, in training mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(new_config(architecture, vocab_size=VOCAB, pad_token_id=0))
    turn_dropout_off(model)
    return model.to(dtype).train()


def random_mask(model: nn.Module, density: float = 0.3, seed: int = 0) -> Mask:
    """Coin flips over the default scope; one scoped tensor keeps nothing, one keeps everything."""
    generator = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(t.shape, generator=generator) < density for name, t in find_scope(model).items()}
    names = list(kept)
    kept[names[1]] = torch.zeros_like(kept[names[1]])
    kept[names[2]] = torch.ones_like(kept[names[2]])
    return Mask.from_dense(kept)


def line_mask(model: nn.Module, granularity: str, density: float = 0.3) -> Mask:
    """Whole rows, columns or blocks of 16 of every matrix in the scope."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for name, tensor in find_scope(model).items():
        units = units_of(name, tensor, granularity, block=16)
        chosen = torch.rand(units.count, generator=generator) < density
        bits = np.unpackbits(units.packed(chosen.numpy()), count=np.prod(tensor.shape))
        kept[name] = torch.from_numpy(bits).bool().reshape(tensor.shape)
    return Mask.from_dense(kept)


def batches(n: int, size: int = 4, length: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """n batches of random token ids, shape (size, length)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (size, length), generator=generator) for _ in range(n)]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 3, accumulation: int = 1) -> None:
    """n optimizer steps on random batches, on the model's device."""
    for i, ids in enumerate(batches(n * accumulation)):
        ids = ids.to(model.device)
        (model(input_ids=ids, labels=ids).loss / accumulation).backward()
        if (i + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()


def count_moved(model: nn.Module, start: nn.Module, mask: Mask) -> int:
    """Entries that differ from those of `start`; every frozen one must be the same bits."""
    moved = 0
    for (name, p), before in zip(model.named_parameters(), start.parameters(), strict=True):
        differ = p.detach().cpu() != before.detach().cpu()
        assert not (differ & ~mask.dense(name) if name in mask else differ).any(), name
        moved += int(differ.sum())
    return moved


def same_state(a: dict, b: dict) -> bool:
    """Whether two optimizers' state dicts have the same entries, dtypes and bits."""
    return a["state"].keys() == b["state"].keys() and all(
        type(value) is type(b["state"][i].get(key))
        and (
            torch.equal(value, b["state"][i][key]) and value.dtype == b["state"][i][key].dtype
            if torch.is_tensor(value)
            else value == b["state"][i][key]
        )
        for i, entry in a["state"].items()
        for key, value in entry.items()
    )
