"""Load model and tokenizer, once for every script: pad token, vocabulary resize, policy.pt, block class."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lota.models.causal import refuse_not_causal
from lota.models.damaged import one_line, refuse_damaged_json
from lota.models.hub import refuse_absent
from lota.models.opening import (
    BELONGING,
    check_tokenizer,
    embedding_rows,
    is_quantized,
    open_model,
    refuse_growth,
    unexpected,
)
from lota.models.policy import find_policy, is_policy, model_folder, read_policy
from lota.models.scope import auto_class, load_config, meta_model, refuse_no_model
from lota.models.weights import all_finite, open_weights, refuse_misfit, refuse_not_finite
from lota.storage import DAMAGED

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PER_LAYER = "vocab_size_per_layer_input"  # Gemma's second embedding, which grows with the first
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called `name`; ValueError with the choices otherwise."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_tokenizer(name_or_path: str | Path, given: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, a folder or hub id, or the one at `given` in its place.

    Raises ValueError when there is none (an empty one is none), or no model of which it would be.
    """
    remedy = "name one with model.tokenizer_name_or_path (scripts: --tokenizer_path)"
    if given is None:
        refuse_no_model(name_or_path)
    name_or_path = given or name_or_path
    folder = Path(name_or_path).expanduser()
    try:
        refuse_absent(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except Exception as error:  # the tokenizers library raises exceptions of no kind of their own
        if given is None and ((folder / "config.json").is_file() or not folder.is_dir()):
            load_config(name_or_path)  # which a tokenizer needs too
        refuse_damaged_json(folder, TOKENIZER_JSON)
        raise ValueError(f"no tokenizer at {name_or_path}: {remedy}. Cause: {one_line(error)}") from error
    # transformers makes a GPT-2 tokenizer of config.json alone, whose vocabulary is the end token
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"no tokenizer at {name_or_path} (it has no vocabulary): {remedy}")
    return tokenizer


def choose_pad_token_id(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """An id to fill batches with, always under an explicit attention mask: pad, else eos, else unk, else 0.

    Ids that the model has no embedding row for are passed over, so the vocabulary never grows.
    """
    rows, ends = config.get_text_config().vocab_size, special_id(config, "eos_token_id")
    choices = [tokenizer.pad_token_id, special_id(config, "pad_token_id"), tokenizer.eos_token_id]
    choices += [*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.unk_token_id]
    return next((i for i in choices if i is not None and 0 <= i < rows), 0)


def special_id(config: PreTrainedConfig, key: str) -> Any:
    """A special token's id, such as `pad_token_id`; None for a config that has no such key (CodeGen's)."""
    found = getattr(config, key, None)
    return getattr(config.get_text_config(), key, None) if found is None else found


def set_pad_token_id(config: PreTrainedConfig, pad_token_id: int | None) -> None:
    """Name the pad token in a config; in one with towers it is the text's."""
    text = config.get_text_config()
    for part in (config, text):
        if part is text or hasattr(part, "pad_token_id"):
            part.pad_token_id = pad_token_id


def add_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str) -> int:
    """Make `pad_token` the pad token, adding it to the vocabulary when it is not there; returns its id."""
    tokenizer.add_special_tokens({"pad_token": pad_token})
    return tokenizer.pad_token_id


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
    policy.pt alone. pad_token: added to `tokenizer` (name_or_path's when None) and, if the embeddings have no
    row for it, to the model.
    Raises ValueError before anything is loaded for what `open_model` refuses and for a tokenizer of another
    model; afterwards for NaN and infinity, and for a model in which a token depends on later ones.
    """
    _check_before(name_or_path, archive, tokenizer)
    if archive is not None and is_policy(archive):
        config, state = load_config(name_or_path), read_policy(archive).state
        model = model_from_policy(config, state, find_policy(archive))
        cast_parameters(model, dtype, device, copy=True)  # off the mapped file
    else:
        path = str(name_or_path if archive is None else archive)
        on_device = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
        config = load_config(path)
        model = _load_all(auto_class(config), path, path, config, dtype=dtype, **on_device)
    own_memory(model)
    _check_finite(model, name_or_path if archive is None else archive)
    if pad_token is not None:
        tokenizer = load_tokenizer(name_or_path) if tokenizer is None else tokenizer
        set_pad_token_id(model.config, add_pad_token(tokenizer, pad_token))
        if len(tokenizer) > embedding_rows(model):
            refuse_growth(model, pad_token)
            resize_vocabulary(model, len(tokenizer))
    turn_dropout_off(model)
    refuse_not_causal(model.eval(), name_or_path)
    return model


def _check_before(
    name_or_path: str | Path, archive: str | Path | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    folder = model_folder(str(name_or_path), None if archive is None else str(archive))
    if is_quantized(load_config(folder)):  # transformers decodes such weights by itself
        model = meta_model(folder)
    else:
        model, _ = open_model(name_or_path, archive)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, archive or name_or_path)


def _check_finite(model: PreTrainedModel, path: str | Path) -> None:
    """Raise ValueError for NaN or infinity among the loaded weights, naming the file that they are from."""
    strange = [name for name, p in model.named_parameters() if not all_finite(p.detach())]
    if strange:
        source = open_weights(path, model)
        refuse_not_finite(source.read(strange[0]), strange[0], source.file_of(strange[0]))
        raise ValueError(
            f"{path}: {strange[0]} has values that {model.dtype} cannot hold: choose bfloat16 or float32"
        )


def model_from_policy(
    config: PreTrainedConfig, state: dict[str, Tensor], source: str | Path = "the checkpoint"
) -> PreTrainedModel:
    """The model with the weights of `state`: the same memory if nothing is converted, the same dtype.

    source: what errors name. The vocabulary of `config` becomes the checkpoint's. Names of older transformers
    releases (experts apart, `embed_out`) are translated by transformers. Raises ValueError listing what is
    missing, what is not in the model and what has another shape.
    """
    with torch.device("meta"):
        structure = auto_class(config).from_config(config)
    rows, base_rows = _stored_rows(structure, state), embedding_rows(structure)
    if rows is not None and rows != base_rows:
        logger.info("%s: vocabulary of %d rows instead of the base's %d", source, rows, base_rows)
        text = config.get_text_config()
        for key in [key for key in ("vocab_size", _PER_LAYER) if getattr(text, key, None) is not None]:
            setattr(text, key, getattr(text, key) + rows - base_rows)
        for part in (config, config.get_text_config()):
            if getattr(part, "pad_token_id", None) is not None and part.pad_token_id >= rows:
                part.pad_token_id = None
    for name, origin in tied_names(structure).items():
        if name in state and origin in state and not torch.equal(state[name], state[origin]):
            raise ValueError(f"{source}: {name} and {origin} differ, but the base ties them")
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    own = config if type(structure.config) is type(config) else config.get_text_config()
    return _load_all(type(structure), None, source, config, config=own, state_dict=state, dtype=dtype)


def _load_all(
    model_class: Any, path: str | None, source: str | Path, stored: PreTrainedConfig, **options: Any
) -> PreTrainedModel:
    """transformers' loader, which draws at random what it does not find; that is an error here.

    source: what the error names. stored: the config of the checkpoint. Raises ValueError for weights missing,
    left over or of another shape.
    """
    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(_tells_no_report)  # of what is told below, and of towers line by line
    try:
        model, info = model_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, SafetensorError, *DAMAGED) as error:
        raise ValueError(
            f"{source} cannot be loaded as a causal language model: {one_line(error)}"
        ) from error
    finally:
        report.removeFilter(_tells_no_report)
    expected, held = dict.fromkeys(info["missing_keys"], ()), {}
    for name, stored, own in info["mismatched_keys"]:
        expected[name], held[name] = tuple(own), tuple(stored)
    held |= unexpected(model, dict.fromkeys(info["unexpected_keys"], ()), stored)
    partner = f"a {type(model).__name__} of this configuration"
    refuse_misfit(source, partner, expected, held, BELONGING)
    return model


def _tells_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def tied_names(model: nn.Module) -> dict[str, str]:
    """{name of a tied weight: name of the weight it shares memory with}, from transformers' own table."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _stored_rows(model: PreTrainedModel, state: dict[str, Tensor]) -> int | None:
    """Rows of the checkpoint's token embedding; None when it is not there under the model's name."""
    embedding = model.get_input_embeddings()
    names = [f"{prefix}.weight" for prefix, module in model.named_modules() if module is embedding]
    names += [target for target, origin in tied_names(model).items() if origin in names]
    return next((state[name].shape[0] for name in names if name in state), None)


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
        nn.Module.to(model, device)
    model.config.dtype = dtype


def own_memory(model: nn.Module) -> None:
    """Give parameters that are parts of one stored tensor, or not contiguous, memory of their own.

    To autograd such parts are one tensor: an update of one during the backward pass spoils all the others.
    """
    owners = Counter(p.untyped_storage().data_ptr() for p in model.parameters())
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if owners[p.untyped_storage().data_ptr()] > 1 or not p.is_contiguous():
                copy = p.detach().clone(memory_format=torch.contiguous_format)
                setattr(module, name, new.setdefault(p, nn.Parameter(copy, p.requires_grad)))


def resize_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give the embeddings `rows` rows; new ones are the mean of the old, at every call alike. Ties stay."""
    before = {name: parameter.shape[:1] for name, parameter in model.named_parameters()}
    with torch.random.fork_rng():  # transformers draws new rows at random, which are replaced below
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            old = before.get(name, tensor.shape[:1])
            if tensor.shape[:1] > old:
                tensor[old[0] :] = mean_row(tensor[: old[0]])


def mean_row(tensor: Tensor) -> Tensor:
    """The mean over rows, (1, ...): what a row added to the vocabulary starts from."""
    return tensor.mean(dim=0, keepdim=True, dtype=torch.float64).to(tensor.dtype)


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that train mode (which checkpointing needs) equals eval mode.

    Attention keeps a float on its module, a few models read one from their config: both are set.
    """
    for module in model.modules():
        is_dropout = "Dropout" in type(module).__name__
        for holder in (module, getattr(module, "config", module)):
            for key, value in list(getattr(holder, "__dict__", {}).items()):  # IDEFICS has dicts for configs
                if isinstance(value, float) and ("drop" in key or (is_dropout and key == "p")):
                    setattr(holder, key, 0.0)


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each block in backward; never reentrant, which would fire a shared weight's hook twice."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # transformers before 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.config.use_cache = False
