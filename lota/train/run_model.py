"""The tokenizer and the model of a run: loaded, or only the names and shapes of its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import Config
from lota.models.head import find_head
from lota.models.loading import add_pad_token, load_model, load_tokenizer
from lota.models.opening import check_tokenizer, embedding_rows, open_model, refuse_growth
from lota.models.packed import pack_attention
from lota.models.scope import frozen_towers


def load_run_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer, with the pad token that the run adds. Raises ValueError for one without an end token."""
    tokenizer = load_tokenizer(config.model.name_or_path, config.model.tokenizer_name_or_path)
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
    """The model with the weights of `archive`, or of model.name_or_path, and the vocabulary of the run.

    Its towers for images and sound require no gradient, unless model.scope names them. Raises ValueError for
    one that cannot do packing=true.
    """
    model = load_model(
        config.model.name_or_path,
        archive=archive,
        dtype=dtype,
        device=device,
        pad_token=config.model.pad_token,
        tokenizer=tokenizer,
    )
    finish_run_model(model, config, archive or config.model.name_or_path)
    return model


def finish_run_model(model: PreTrainedModel, config: Config, source: str | Path) -> None:
    """What a run does with a loaded model. source: what errors name."""
    if config.packing:
        pack_attention(model, source)
    for name in frozen_towers(model, config.model.scope):
        model.get_parameter(name).requires_grad_(False)
    find_head(model)  # asks it now, before anything is wrapped or compiled


def run_skeleton(config: Config, tokenizer: PreTrainedTokenizerBase, key: str = "archive") -> PreTrainedModel:
    """The model that will train on the meta device, its vocabulary as large as it will be.

    key: `archive`, or `reference_archive` for the model of the reference that is given. Raises ValueError for
    what `open_model` refuses, a tokenizer of another model, and fewer positions than max_length.
    """
    archive: str | None = getattr(config.model, key)
    if archive is not None and not Path(archive).expanduser().exists():
        raise ValueError(f"model.{key}={archive} does not exist: give a Hugging Face folder or a policy.pt")
    model, _ = open_model(config.model.name_or_path, archive)
    check_positions(model, config.max_length)
    if key == "archive":
        check_tokenizer(tokenizer, model, archive or config.model.name_or_path)
    if config.model.pad_token is not None and len(tokenizer) > embedding_rows(model):
        refuse_growth(model, config.model.pad_token)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def check_positions(model: PreTrainedModel, max_length: int) -> None:
    """Raise ValueError if a model has fewer positions than max_length, stretched rotary ones counted."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None)
    factor = rotary.get("factor") if isinstance(rotary, dict) else None
    if positions is None or positions < 0:  # XLNet has no limit, and says so with -1
        return
    if positions * max(factor or 1, 1) < max_length:
        raise ValueError(f"max_length={max_length}: the model has {positions} positions; lower it")
