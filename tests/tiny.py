"""Tiny random models of several architectures, and random masks over them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lota.masks import Mask
from lota.masks.extract.neurons import units_of
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
    """Whole rows or columns of every matrix in the scope."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for name, tensor in find_scope(model).items():
        units = units_of(name, tensor, granularity)
        chosen = torch.rand(units.count, generator=generator) < density
        bits = np.unpackbits(units.packed(chosen.numpy()), count=np.prod(tensor.shape))
        kept[name] = torch.from_numpy(bits).bool().reshape(tensor.shape)
    return Mask.from_dense(kept)


def batches(n: int, size: int = 4, length: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """n batches of random token ids, shape (size, length)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (size, length), generator=generator) for _ in range(n)]
