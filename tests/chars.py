"""A tokenizer with a token per character, and a tiny random model that reads it, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


def char_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def char_model(seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """Random Llama; large initial weights, so that its greedy text is not one letter repeated."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": len(ALPHABET) + 3,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()


def save_pair(folder: Path, seed: int = 0) -> Path:
    char_model(seed).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder
