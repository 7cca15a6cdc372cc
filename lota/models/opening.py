"""A model on disk, checked from its headers against the structure that it will be loaded into.

The one check of every command that loads a model: what it refuses is refused before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lota.models.key_mapping import placed
from lota.models.policy import find_policy, is_policy, model_folder
from lota.models.scope import load_config, meta_model, whole_model
from lota.models.weights import WeightSource, open_weights, refuse_misfit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Buffers that older transformers releases saved (rotary frequencies, causal masks): computed, not learnt.
COMPUTED = (r"\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")
LOADABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BELONGING = "give the config.json or the base that they belong to"
_LOADED_FILES = re.compile(r"(model|pytorch_model)(-.+)?\.(safetensors|bin)")


def open_model(
    name_or_path: str | Path, archive: str | Path | None = None
) -> tuple[PreTrainedModel, WeightSource]:
    """The structure on the meta device, its vocabulary as large as the weights', and the weights.

    name_or_path, archive: as in `load_model`. Raises ValueError for files that are damaged or none of a
    model's, for weights missing, left over, of another shape, or quantized.
    """
    policy = archive is not None and is_policy(archive)
    folder = model_folder(str(name_or_path), None if archive is None else str(archive))
    model = meta_model(folder)
    weights = name_or_path if archive is None else find_policy(archive) if policy else archive
    source = open_weights(weights, model)
    _check_dtypes(source, model)
    embedding = embedding_name(model)
    if policy and embedding in source and source.shape(embedding)[0] != embedding_rows(model):
        model.resize_token_embeddings(source.shape(embedding)[0], mean_resizing=False)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    held = {name: source.shape(name) for name in source.names()}
    held |= unexpected(model, source.strange, load_config(folder))
    refuse_misfit(source.id, f"a {type(model).__name__} of this configuration", expected, held, BELONGING)
    unread = [path for path in source.files if not policy and not _LOADED_FILES.fullmatch(path.name)]
    if unread:
        raise ValueError(
            f"{unread[0]}: transformers reads model.safetensors, or shards and their index; rename it"
        )
    return model, source


def unexpected(
    model: PreTrainedModel, names: Mapping[str, tuple[int, ...]], config: PreTrainedConfig
) -> dict[str, tuple[int, ...]]:
    """Of what a model has no place for, that which its class does not expect to meet.

    config: of the checkpoint, which may be of a model with towers beside this text model.
    """
    ignored = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), *COMPUTED]))
    left = {name: shape for name, shape in names.items() if not ignored.search(name)}
    whole = whole_model(config) if left else None
    elsewhere = set() if whole is None else placed(left, whole)
    return {name: shape for name, shape in left.items() if name not in elsewhere}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, source: str | Path) -> None:
    """Raise ValueError if the tokenizer has ids without an embedding row: another model's tokenizer.

    Its pad token need not have one: batches are filled with an id that has. source: what the error names.
    """
    rows = embedding_rows(model)
    beyond = {
        token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token != tokenizer.pad_token
    }
    if beyond:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(beyond)} tokens more than the {rows} "
            f"embedding rows of {source} ({min(beyond, key=lambda token: beyond[token])!r} first): give the "
            "model's own tokenizer with model.tokenizer_name_or_path (scripts: --tokenizer_path)"
        )


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether a model's config says so: transformers alone knows then what its stored numbers mean."""
    return getattr(config, "quantization_config", None) is not None


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the token embedding, which may be more than the tokenizer has tokens."""
    return model.get_input_embeddings().get_parameter("weight").shape[0]


def refuse_growth(model: PreTrainedModel, pad_token: str) -> None:
    """Raise ValueError for a model whose vocabulary cannot grow by a pad token.

    Mllama's and Moshi's embeddings have rows without an output: no config makes a model of the grown shapes.
    """
    head, rows = model.get_output_embeddings(), embedding_rows(model)
    outputs = rows if head is None else head.get_parameter("weight").shape[0]
    if outputs != rows:
        raise ValueError(
            f"model.pad_token={pad_token}: a {type(model).__name__} has {rows} embedding rows for {outputs} "
            "outputs, and cannot grow by a token: use model.pad_token=null (padding with an existing token)"
        )


def embedding_name(model: PreTrainedModel) -> str:
    """Name of the token embedding's parameter."""
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def _check_dtypes(source: WeightSource, model: PreTrainedModel) -> None:
    quantized = [name for name in source.names() if source.dtype(name) not in LOADABLE]
    if quantized or is_quantized(model.config):
        what = f"{quantized[0]} is {source.dtype(quantized[0])}" if quantized else "its config.json says so"
        raise ValueError(
            f"{source.id} is quantized ({what}): give the model from before quantization, or load it with "
            "transformers, dequantize it and save_pretrained it"
        )
