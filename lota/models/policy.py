"""Read policy.pt and build the model that it holds.

Layout: {"step_idx": int, "state": {name: tensor}, "metrics": {str: number}}, written by torch.save.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lota.utils import torch_reason

logger = logging.getLogger(__name__)
LAYOUT = ("step_idx", "state", "metrics")
# torch.compile, FSDP1 and checkpoint_wrapper put these into a name at any depth; no model has its own.
WRAPPERS = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"}
# Buffers that older transformers releases saved (rotary frequencies, causal masks): computed, not learnt.
COMPUTED = (r"\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")
# How torch's tensors-only reader says that it met something else than tensors and plain values.
OBJECTS = re.compile(r"Unsupported (global|class)|Trying to |Can only ")


def is_policy(path: str | Path) -> bool:
    """Whether `path` means a policy file: a file, a name that ends in .pt, a folder with policy.pt alone.

    A folder that also holds weights for transformers is read as such, here as in `open_weights`.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        converted = (path / "config.json").is_file()
        return (path / "policy.pt").is_file() and not converted
    return path.is_file() or path.suffix == ".pt"


def policy_path(path: str | Path) -> Path:
    """The policy.pt meant by `path`: the file itself or a run folder such as epoch-1/ that holds one.

    Raises ValueError when there is no such file.
    """
    path = Path(path).expanduser()
    file = path / "policy.pt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no policy file at {file}: give a policy.pt or a folder with one (RUN/epoch-1)")
    return file


def read_policy(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a policy.pt, or of the folder that holds it; see `read_policy_record`."""
    return read_policy_record(path)["state"]


def read_policy_record(path: str | Path) -> dict:
    """The whole record {step_idx, state, metrics}, the state's names unwrapped.

    Tensors are mapped from the file (private pages: writing to them never changes it), so memory is taken as
    they are read. Raises ValueError, naming the file and the remedy, for a file that is missing, truncated,
    of another layout, or that would run code when unpickled.
    """
    file = policy_path(path)
    record = _load(file)
    _check_layout(file, record)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in record["state"].items():
        plain = unwrapped(name)
        if plain in state:
            raise ValueError(f"{file}: two tensors are both called {plain} once wrapper names are removed")
        state[plain] = tensor
    return {**{key: record[key] for key in LAYOUT}, "state": state}


def unwrapped(name: str) -> str:
    """`module.model._checkpoint_wrapped_module.x` -> `model.x`; `module` goes only at the front (DDP)."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def _load(file: Path) -> object:
    """torch.load on the CPU, tensors only; every way a file can be bad becomes a ValueError."""
    # The zip directory is a file's last part: a truncated file has none, and only zip files can be mapped.
    mapped = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():  # torch wonders about the pickle protocol of a file it then refuses
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if not OBJECTS.search(str(error)):
            raise ValueError(_unreadable(file, error)) from error
        raise ValueError(
            f"{file} was not read: it holds Python objects besides tensors and plain values, and loading them"
            " could run code. Save it again from where it was made, as torch.save({'step_idx': int, 'state':"
            f" {{name: tensor}}, 'metrics': {{name: Python number}}}}). torch says: {_refused(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(_unreadable(file, error)) from error


def _refused(error: Exception) -> str:
    """The part of torch's long message that names the refused object."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if OBJECTS.search(line)), lines[0])[:200]


def _unreadable(file: Path, error: Exception) -> str:
    return (
        f"{file} ({file.stat().st_size:,} bytes) cannot be read: it is truncated, damaged or not written by"
        " torch.save. Copy it again, or use an earlier checkpoint of the run. torch says: "
        f"{torch_reason(error)}"
    )


def _check_layout(file: Path, record: object) -> None:
    """Raise ValueError unless `record` has the keys of LAYOUT and a state of named tensors."""
    remedy = "wrap a plain state dict as {'step_idx': 0, 'state': state_dict, 'metrics': {}}"
    if not isinstance(record, dict):
        raise ValueError(f"{file} holds a {type(record).__name__}, not a dict of {LAYOUT}; {remedy}")
    missing = [key for key in LAYOUT if key not in record]
    if missing:
        found = ", ".join(str(key) for key in list(record)[:5]) or "nothing"
        raise ValueError(f"{file} lacks {', '.join(missing)} (found: {found}); {remedy}")
    state = record["state"]
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file}: 'state' is not a dict of name -> tensor; {remedy}")


def model_from_policy(
    config: PreTrainedConfig, state: dict[str, torch.Tensor], source: str = "the checkpoint"
) -> PreTrainedModel:
    """A model whose parameters *are* the tensors of `state`: no copy, no change of dtype.

    `config.vocab_size` becomes the checkpoint's number of embedding rows. Names of older transformers
    releases (experts apart, `embed_out`) are translated by transformers. Raises ValueError listing what is
    missing, what is not in the model and what has another shape.
    """
    model = empty_model(config)
    rows, expected_rows = _embedding_rows(model, state), config.get_text_config().vocab_size
    if rows is not None and rows != expected_rows:
        logger.info("%s: vocabulary of %d rows instead of the base's %d", source, rows, expected_rows)
        config.get_text_config().vocab_size = rows
        if config.pad_token_id is not None and config.pad_token_id >= rows:
            config.pad_token_id = None
        model = empty_model(config)
    differences = _differences(model, state)
    if differences[0] and differences[1]:  # names missing here and unknown names there: another naming?
        return _translated(model, config, state, source)
    refuse_misfit(source, *differences)
    state = _with_tied(source, model, state)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers (rotary frequencies are in no file)."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tied_names(model: nn.Module) -> dict[str, str]:
    """{name of a tied weight: name of the weight it shares memory with}, from transformers' own table."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _embedding_rows(model: nn.Module, state: dict[str, torch.Tensor]) -> int | None:
    """Rows of the checkpoint's token embedding; None when it is not there under the model's name."""
    embedding = model.get_input_embeddings()
    names = [f"{prefix}.weight" for prefix, module in model.named_modules() if module is embedding]
    names += [target for target, origin in tied_names(model).items() if origin in names]
    return next((state[name].shape[0] for name in names if name in state), None)


def _differences(
    model: PreTrainedModel, state: dict[str, torch.Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """(missing, unexpected, mis-shaped) names of `state` against the model; a tied name may be there once."""
    expected = model.state_dict()
    partner = tied_names(model)
    partner |= {origin: target for target, origin in partner.items()}
    ignored = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), *COMPUTED]))
    missing = [name for name in expected if name not in state and partner.get(name) not in state]
    unexpected = [name for name in state if name not in expected and not ignored.search(name)]
    misshaped = [
        f"{name} (file {tuple(state[name].shape)}, model {tuple(value.shape)})"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    return missing, unexpected, misshaped


def refuse_misfit(
    source: object, missing: Iterable, unexpected: Iterable = (), misshaped: Iterable = ()
) -> None:
    """One ValueError with the first few names of each kind; nothing when there are none."""
    kinds = {"missing": missing, "not in the model": unexpected, "of another shape": misshaped}
    parts = []
    for kind, found in kinds.items():
        names = sorted(str(name) for name in found)
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            parts.append(f"{len(names)} {kind}: {', '.join(names[:4])}{more}")
    if parts:
        raise ValueError(f"{source} does not fit the model, weights {'; '.join(parts)}. Is the base right?")


def _with_tied(source: str, model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with both names of each tied pair; two different values would lose one and are refused."""
    state = dict(state)
    for target, origin in tied_names(model).items():
        a, b = state.setdefault(target, state.get(origin)), state.setdefault(origin, state.get(target))
        if a.data_ptr() != b.data_ptr() and not torch.equal(a, b):
            raise ValueError(f"{source}: {target} and {origin} differ, but the base ties them")
    return state


def _translated(
    empty: PreTrainedModel, config: PreTrainedConfig, state: dict[str, torch.Tensor], source: str
) -> PreTrainedModel:
    """Load the names of another transformers release through transformers' conversion table (a copy)."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    differences = _differences(empty, state)
    try:
        model, info = type(empty).from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
            output_loading_info=True,
        )
    except (ValueError, KeyError, RuntimeError):
        info = {"missing_keys": differences[0]}
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        refuse_misfit(source, *differences)
    return model


def model_folder(name_or_path: str, archive: str | None) -> str:
    """Folder or hub id with the config of a run's starting weights: a policy.pt has name_or_path's."""
    return name_or_path if archive is None or is_policy(archive) else archive
