"""Tiny random models of several architectures, and random masks over them."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from torch import nn

from lota.masks import Mask
from lota.masks.extract.neurons import units_of
from lota.models.scope import find_scope

VOCAB = 61
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    **_IDS,
}
_NEOX = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=VOCAB,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_IDS,
    ),
    "qwen2_tied": lambda: transformers.Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_NEOX),
    "mixtral": lambda: transformers.MixtralConfig(**_SMALL, num_local_experts=4),
}


def make(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A randomly initialised causal LM, seeded, in training mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]())
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
