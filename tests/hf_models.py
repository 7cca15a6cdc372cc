"""Small Hugging Face models and tokenizers made on the spot, and policy files of them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

ROWS = 64
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**_SIZES, "intermediate_size": 48, **_IDS}
_LLAMA = {**WIDE, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": ROWS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS}
CONFIGS = {
    "llama": (transformers.LlamaConfig, {**_LLAMA, "attention_dropout": 0.3}),
    "gpt2": (transformers.GPT2Config, _GPT2),
    "mixtral": (transformers.MixtralConfig, {**_LLAMA, "num_local_experts": 4}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**WIDE, "attention_dropout": 0.3, "hidden_dropout": 0.3}),
    "qwen2": (transformers.Qwen2Config, {**_LLAMA, "tie_word_embeddings": True}),
    "gptj": (transformers.GPTJConfig, {**_GPT2, "rotary_dim": 4, "resid_pdrop": 0.3}),
}
TIED = ("gpt2", "qwen2")
INPUT = torch.arange(20).view(2, 10)


def new_config(kind: str, **more: object) -> PreTrainedConfig:
    make, settings = CONFIGS[kind]
    return make(**{**settings, **more})


def new_model(kind: str, seed: int = 0, **more: object) -> nn.Module:
    """A model whose every tensor is random, biases and norms too, so that none can be taken for another."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(new_config(kind, **more), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def save_model(kind: str, folder: Path, seed: int = 0, max_shard_size: str = "1GB") -> nn.Module:
    """A new model, after it was saved."""
    model = new_model(kind, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def save_policy(path: Path, state: dict, step_idx: int = 7) -> Path:
    torch.save({"step_idx": step_idx, "state": state, "metrics": {"loss": 1.5}}, path)
    return path


def logits(model) -> torch.Tensor:
    """From a copy: tensors of a file begin at odd addresses, where some kernels add in another order."""
    with torch.no_grad():
        return copy.deepcopy(model)(INPUT).logits


def word_tokenizer(size: int, **special: str) -> PreTrainedTokenizerFast:
    """Words w0, w1, ..., then the special tokens, `size` entries in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*(f"w{i}" for i in range(size - len(special))), *special.values()]
    raw = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special.get("unk_token"))
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)
