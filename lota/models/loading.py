"""Load model and tokenizer, once for every script: pad token, vocabulary resize, policy.pt, block class."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lota.models.policy import is_policy, model_from_policy, policy_path, read_policy, refuse_misfit
from lota.models.scope import transformer_blocks

__all__ = [
    "add_pad_token",
    "choose_pad_token_id",
    "dtype_of",
    "enable_activation_checkpointing",
    "find_block_class",
    "load_config",
    "load_model",
    "load_tokenizer",
    "read_policy",
    "resize_vocabulary",
    "transformer_blocks",
    "turn_dropout_off",
]
logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called `name`; ValueError with the choices otherwise."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; ValueError when there is none (an empty one is none)."""
    folder = Path(name_or_path)
    if (folder / "policy.pt").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"no tokenizer at {name_or_path}, which holds a policy.pt and no model: convert it first with "
            f"convert_policy_to_hf_resize.py --model_path BASE --policy_path {folder / 'policy.pt'} "
            f"--save_path {name_or_path}"
        )
    remedy = "name one with model.tokenizer_name_or_path (scripts: --tokenizer_path)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer at {name_or_path}: {remedy}. Cause: {_short(error)}") from error
    # transformers makes a GPT-2 tokenizer of config.json alone, whose vocabulary is the end token
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"no tokenizer at {name_or_path} (it has no vocabulary): {remedy}")
    return tokenizer


def choose_pad_token_id(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """An id to fill batches with, always under an explicit attention mask: pad, else eos, else unk, else 0.

    Ids that the model has no embedding row for are passed over, so the vocabulary never grows.
    """
    rows = config.get_text_config().vocab_size
    choices = (
        tokenizer.pad_token_id,
        config.pad_token_id,
        tokenizer.eos_token_id,
        _first(config.eos_token_id),
        tokenizer.unk_token_id,
    )
    return next((i for i in choices if i is not None and 0 <= i < rows), 0)


def add_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str) -> int:
    """Make `pad_token` the pad token, adding it to the vocabulary when it is not there; returns its id."""
    tokenizer.add_special_tokens({"pad_token": pad_token})
    return tokenizer.pad_token_id


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The model's config; ValueError when the folder or hub id cannot be had."""
    try:
        return AutoConfig.from_pretrained(str(name_or_path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_no_model(name_or_path, error)) from error


def load_model(
    name_or_path: str | Path,
    *,
    archive: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    pad_token: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """A causal LM in `dtype` on `device`, in eval mode, every dropout at 0.

    archive: weights to use instead of name_or_path's: a Hugging Face folder, a policy.pt, or a folder with
    policy.pt alone. pad_token: added to `tokenizer` (name_or_path's when None) and, where the embeddings
    have no row for it, to the model.
    Raises ValueError when weights are missing, left over or of another shape.
    """
    if archive is not None and is_policy(archive):
        config = load_config(name_or_path)
        model = model_from_policy(config, read_policy(archive), source=str(policy_path(archive)))
        cast_parameters(model, dtype, device, copy=True)  # off the mapped file
    else:
        model = _from_pretrained(name_or_path if archive is None else archive, dtype, device)
    if pad_token is not None:
        tokenizer = load_tokenizer(name_or_path) if tokenizer is None else tokenizer
        model.config.pad_token_id = add_pad_token(tokenizer, pad_token)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            resize_vocabulary(model, len(tokenizer))
    turn_dropout_off(model)
    return model.eval()


def _from_pretrained(
    name_or_path: str | Path, dtype: torch.dtype, device: str | torch.device
) -> PreTrainedModel:
    """transformers' loader; weights that it would have drawn at random are an error."""
    placement = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(name_or_path), dtype=dtype, output_loading_info=True, **placement
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(_no_model(name_or_path, error)) from error
    refuse_misfit(name_or_path, info["missing_keys"])
    return model


def cast_parameters(
    model: PreTrainedModel,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
    copy: bool = False,
) -> None:
    """Parameters as `dtype` on `device`, one by one; buffers keep their dtype, ties stay tied."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device=device, dtype=dtype, copy=copy)
    if device is not None:
        model.to(device)
    model.config.dtype = dtype


def resize_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give the embeddings `rows` rows; new ones are the mean of the old, at every call alike. Ties stay."""
    old = model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng():  # transformers draws new rows at random, which are replaced below
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for tensor in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                if tensor is not None and rows > old:
                    tensor[old:] = mean_row(tensor[:old])


def mean_row(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over rows, (1, ...): what a row added to the vocabulary starts from."""
    return tensor.mean(dim=0, keepdim=True, dtype=torch.float64).to(tensor.dtype)


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that train mode (which checkpointing needs) equals eval mode.

    Attention keeps a float on its module, a few models read one from their config: both are set.
    """
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0
        for holder in (module, getattr(module, "config", module)):
            for key, value in list(vars(holder).items()):
                if "drop" in key and isinstance(value, float):
                    setattr(holder, key, 0.0)


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each block in backward; never reentrant, which would fire a shared weight's hook twice."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # transformers before 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.config.use_cache = False


def find_block_class(model: nn.Module, name: str | None = None) -> type[nn.Module]:
    """The class of the repeated transformer block, found from the structure or chosen by its class `name`.

    Raises ValueError with the candidates when no module is of that class.
    """
    if name is None:
        return type(transformer_blocks(model)[0][1])
    classes = {type(module).__name__: type(module) for module in model.modules()}
    if name in classes:
        return classes[name]
    repeated = [type(entry).__name__ for m in model.modules() if isinstance(m, nn.ModuleList) for entry in m]
    candidates = list(dict.fromkeys([*repeated, *difflib.get_close_matches(name, classes)]))
    raise ValueError(
        f"model.block_name={name}: {type(model).__name__} has no such class;"
        f" use null (found by itself) or one of {', '.join(candidates)}"
    )


def _first(ids: int | list[int] | None) -> int | None:
    """The first of a config's eos ids, which may be one id or a list."""
    return (ids[0] if ids else None) if isinstance(ids, list | tuple) else ids


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _no_model(name_or_path: str | Path, error: Exception) -> str:
    return (
        f"no causal language model at model.name_or_path={name_or_path}: give a folder with config.json and"
        f" weights, or a hub id that this machine can reach. Cause: {_short(error)}"
    )
