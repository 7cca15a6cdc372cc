"""A tiny model of every causal-LM family of transformers: its config made small, its weights random.

`tiny_config` makes the default config of the family small by the names of its sizes; what that rule
does not get right for a family stands in families.toml too.
"""

from __future__ import annotations

import string
import tomllib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

TABLE = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))
SIZES: dict[str, int] = {key: group["is"] for group in TABLE["sizes"] for key in group["of"]}
KINDS = ("layer_types", "mlp_layer_types", "block_types", "layers_block_type")  # one entry per layer


def families() -> list[str]:
    """Model types that AutoModelForCausalLM loads, and those of text with images that it does not."""
    towers = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - {*TABLE["left_out"]["families"]}
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | towers)


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's config, made small."""
    make: Any = CONFIG_MAPPING[family]
    if family in TABLE["assistants"]:
        text = tiny_config(TABLE["assistants"][family])
        return make(
            text_config=text.to_dict() | TABLE["assistant_text"], backbone_hidden_size=text.hidden_size
        )
    return make(**_small(make(), _own(family)))


def _own(family: str) -> dict[str, Any]:
    own = TABLE["families"].get(family, {})
    return _own(own["like"]) if "like" in own else own


def _small(config: PreTrainedConfig, own: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a small config like `config`; `own` counts before the rule."""
    content = config.to_dict()
    found: dict[str, Any] = {
        key: SIZES[key] for key, value in content.items() if key in SIZES and value is not None
    }
    if content.get("num_key_value_heads") == content.get("num_attention_heads") or "kv_lora_rank" in content:
        found |= {key: SIZES["num_attention_heads"] for key in ("num_key_value_heads",) if key in found}
    if "is_decoder" in content:
        found["is_decoder"] = True
    for key in KINDS:
        if content.get(key):
            found[key] = list(dict.fromkeys(content[key]))  # each kind of layer once
    found |= {key: value for key, value in own.items() if key not in config.sub_configs}
    for key in config.sub_configs:
        if isinstance(sub := getattr(config, key, None), PreTrainedConfig):
            found[key] = _small(sub, own.get(key, {}))
    kinds = [key for key in KINDS if key in found]
    if kinds:
        depth = max(SIZES["num_hidden_layers"], *(len(found[key]) for key in kinds))
        found |= {key: (found[key] * depth)[:depth] for key in kinds}
        found |= {key: depth for key in ("num_hidden_layers", "n_layer", "num_layers") if key in found}
    return found


def new_model(family: str) -> PreTrainedModel:
    """A model as transformers initialises it.

    One with towers is whole, as its checkpoints are, though AutoModelForCausalLM may load a part of it.
    """
    config = tiny_config(family)
    towers = type(config) in AutoModelForImageTextToText._model_mapping
    auto: Any = AutoModelForImageTextToText if towers else AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model whose every tensor is random, biases and norms too, so that none can be taken for another."""
    torch.manual_seed(seed)
    model = new_model(family).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, digit or sign."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    signs = [*special.values(), *string.ascii_lowercase, *string.digits, " ", "-", ">", ".", ",", "\n"]
    raw = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def write_family(family: str, folder: Path) -> None:
    """A folder with the tiny model and its tokenizer.

    Where transformers makes no model of the config (gemma3n without timm, musicgen), it has no weights.
    """
    config = tiny_config(family)
    try:
        model = tiny_model(family)
    except (ImportError, AttributeError, ValueError):
        config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
