"""Small Hugging Face models and tokenizers made on the spot, and policy files of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

ROWS = 64
SIZES = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**WIDE, num_key_value_heads=2, attention_dropout=0.3),
    "gpt2": lambda: GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
    "mixtral": lambda: MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=4),
    "gpt_neox": lambda: GPTNeoXConfig(**WIDE, attention_dropout=0.3, hidden_dropout=0.3, **IDS),
    "qwen2": lambda: Qwen2Config(**WIDE, num_key_value_heads=2, tie_word_embeddings=True, **IDS),
    "gptj": lambda: GPTJConfig(
        vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, resid_pdrop=0.3, **IDS
    ),
}
TIED = ("gpt2", "qwen2")
INPUT = torch.arange(20).view(2, 10)


def new_model(kind: str, seed: int = 0):
    """A model whose every tensor is random, biases and norms too, so that none can be taken for another."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def save_policy(path: Path, state: dict, step_idx: int = 7) -> Path:
    torch.save({"step_idx": step_idx, "state": state, "metrics": {"loss": 1.5}}, path)
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits


def word_tokenizer(size: int, **special: str) -> PreTrainedTokenizerFast:
    """Words w0, w1, ..., then the special tokens, `size` entries in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*(f"w{i}" for i in range(size - len(special))), *special.values()]
    raw = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special.get("unk_token"))
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)
