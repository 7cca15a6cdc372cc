"""The tokenizer and the model of a run: loaded, or only the names and shapes of its weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import Config
from lota.models.loading import add_pad_token, embedding_rows, load_model, load_tokenizer
from lota.models.policy import is_policy, model_folder
from lota.models.scope import meta_model
from lota.models.weights import open_weights


def load_run_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer, with the pad token that the run adds. Raises ValueError for one without an end token."""
    tokenizer = load_tokenizer(config.model.tokenizer_name_or_path or config.model.name_or_path)
    if config.model.pad_token is not None:
        add_pad_token(tokenizer, config.model.pad_token)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model.name_or_path} has no end-of-sequence token")
    return tokenizer


def load_run_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    archive: str | Path | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PreTrainedModel:
    """The model with the weights of `archive`, or of model.name_or_path, and the vocabulary of the run."""
    return load_model(
        config.model.name_or_path,
        archive=archive,
        dtype=dtype,
        device=device,
        pad_token=config.model.pad_token,
        tokenizer=tokenizer,
    )


def run_skeleton(config: Config, tokenizer: PreTrainedTokenizerBase, key: str = "archive") -> PreTrainedModel:
    """The model that will train on the meta device, its vocabulary as large as it will be.

    key: `archive`, or `reference_archive` for the model of the reference that is given. Raises ValueError if
    there is no such model, or if it has fewer positions than max_length.
    """
    archive: str | None = getattr(config.model, key)
    if archive is not None and not Path(archive).expanduser().exists():
        raise ValueError(f"model.{key}={archive} does not exist: give a Hugging Face folder or a policy.pt")
    try:
        model = meta_model(model_folder(config.model.name_or_path, archive))
    except (OSError, KeyError) as error:
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: no model there: {error}"
        ) from error
    _check_positions(model, config.max_length)
    rows = before = embedding_rows(model)
    if archive is not None and is_policy(archive):  # the vocabulary may have grown in the run that wrote it
        name = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        rows = open_weights(archive, model).shape(name)[0]
    if config.model.pad_token is not None:
        rows = max(rows, len(tokenizer))
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def _check_positions(model: PreTrainedModel, max_length: int) -> None:
    """Raise ValueError if a model with a table of positions has fewer of them than max_length."""
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if table and re.search(r"wpe|position", name) and module.num_embeddings < max_length:
            raise ValueError(
                f"max_length={max_length}: the model has {module.num_embeddings} positions; lower it"
            )
