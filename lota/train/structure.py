"""The tokenizer of a run, and the names and shapes of its model, before any weight is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from lota.config import Config
from lota.models.loading import add_pad_token, embedding_rows, load_tokenizer
from lota.models.policy import is_policy, model_folder
from lota.models.scope import meta_model
from lota.models.weights import open_weights


def run_tokenizer(config: Config) -> Any:
    """The tokenizer, with the pad token that the run adds. Raises ValueError for one without an end token."""
    tokenizer = load_tokenizer(config.model.tokenizer_name_or_path or config.model.name_or_path)
    if config.model.pad_token is not None:
        add_pad_token(tokenizer, config.model.pad_token)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model.name_or_path} has no end-of-sequence token")
    return tokenizer


def check_reference(config: Config, tokenizer: Any) -> None:
    """Raise ValueError for a reference model that is not there, or whose token ids are not the policy's."""
    archive = config.model.reference_archive
    if archive is None:
        return
    structures = (run_structure(config, tokenizer, key) for key in ("reference_archive", "archive"))
    rows, own_rows = (embedding_rows(model) for model in structures)
    try:
        theirs = None if is_policy(archive) else _vocabulary(load_tokenizer(archive), config)
    except ValueError:  # it has no tokenizer of its own
        theirs = None
    differs = rows != own_rows if theirs is None else theirs != _vocabulary(tokenizer, config)
    if differs:
        raise ValueError(
            f"model.reference_archive={archive} has another vocabulary ({rows} rows) than the policy "
            f"({own_rows} rows): give a reference that shares the policy's tokenizer"
        )


def _vocabulary(tokenizer: Any, config: Config) -> dict[str, int]:
    """Token -> id, without the pad token that the run may add."""
    return {token: i for token, i in tokenizer.get_vocab().items() if token != config.model.pad_token}


def run_structure(config: Config, tokenizer: Any, key: str = "archive") -> nn.Module:
    """Names and shapes of the model that will train, its vocabulary as large as it will be.

    key: `archive`, or `reference_archive` for those of the reference that is given.
    """
    archive = getattr(config.model, key)
    if archive is not None and not Path(archive).expanduser().exists():
        raise ValueError(f"model.{key}={archive} does not exist: give a Hugging Face folder or a policy.pt")
    from_policy = archive is not None and is_policy(archive)
    try:
        model = meta_model(model_folder(config.model.name_or_path, archive))
    except (OSError, KeyError) as error:
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: no model there: {error}"
        ) from error
    _check_positions(model, config)
    rows = embedding_rows(model)
    if from_policy:
        rows = _policy_rows(model, archive)
    if config.model.pad_token is not None:
        rows = max(rows, len(tokenizer))
    if rows != embedding_rows(model):
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def _policy_rows(model: nn.Module, archive: str) -> int:
    """Rows of the token embedding in a policy.pt."""
    name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    return open_weights(archive, model).shape(name)[0]


def _check_positions(model: nn.Module, config: Config) -> None:
    """Raise ValueError when a model with a table of positions has fewer of them than max_length."""
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if table and re.search(r"wpe|position", name) and module.num_embeddings < config.max_length:
            raise ValueError(
                f"max_length={config.max_length}: the model has {module.num_embeddings} positions; lower it"
            )
