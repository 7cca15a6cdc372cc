"""policy.pt and other `torch.save` files: which file a path means, where its tensors lie, and reading them.

Layout: {"step_idx": int, "state": {name: tensor}, "metrics": {str: number}}, written by torch.save.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lota.models.damaged import refuse_stranger
from lota.models.tensor_files import StoredTensor, refuse_delta
from lota.models.torch_files import HoldsObjects, map_tensors, read_torch_file
from lota.models.zip_records import NotSupported
from lota.storage import verify_checksum

LAYOUT = ("step_idx", "state", "metrics")
# torch.compile, FSDP1 and checkpoint_wrapper put these into a name at any depth; no model has its own.
WRAPPERS = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"}


class Policy(NamedTuple):
    """What a policy.pt holds."""

    step_idx: int
    state: dict[str, Tensor]  # names unwrapped
    metrics: dict[str, float]


def is_policy(path: str | os.PathLike[str]) -> bool:
    """Whether `path` means a policy file: a file, a name that ends in .pt, a folder with policy.pt alone.

    A folder that also holds weights for transformers is read as such, here as in `open_weights`.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return (path / "policy.pt").is_file() and not (path / "config.json").is_file()
    return path.is_file() or path.suffix == ".pt"


def model_folder(name_or_path: str, archive: str | None) -> str:
    """Folder or hub id with the config of a run's starting weights: a policy.pt has name_or_path's."""
    return name_or_path if archive is None or is_policy(archive) else archive


def find_policy(path: str | os.PathLike[str]) -> Path:
    """The policy.pt meant by `path`: the file itself or a run folder such as epoch-1/ that holds one.

    Raises ValueError when there is no such file.
    """
    path = Path(path).expanduser()
    file = path / "policy.pt" if path.is_dir() else path
    if not file.is_file() and (path / "config.json").is_file():
        raise ValueError(
            f"no policy file at {file}: {path} is a Hugging Face folder already, with nothing to convert"
        )
    if not file.is_file():
        raise ValueError(f"no policy file at {file}: give a policy.pt or a folder with one (RUN/epoch-1)")
    if file.suffix == ".safetensors":
        refuse_delta(file)
        raise ValueError(
            f"{file} is no policy.pt: give the Hugging Face folder that holds it, with its config"
        )
    return file


def read_policy(path: str | os.PathLike[str]) -> Policy:
    """The content of a policy.pt, or of the one in a folder.

    Tensors are mapped from the file (private pages: writing to them never changes it), so memory is taken as
    they are read. Raises ValueError, naming the file and the remedy, for a file that is missing, truncated,
    of another layout, or that holds more than tensors and plain values.
    """
    file = find_policy(path)
    record = _read(file)
    remedy = "wrap a plain state dict as {'step_idx': 0, 'state': state_dict, 'metrics': {}}"
    if not isinstance(record, dict):
        raise ValueError(f"{file} holds a {type(record).__name__}, not a dict of {LAYOUT}; {remedy}")
    missing = [key for key in LAYOUT if key not in record]
    if missing:
        found = ", ".join(str(key) for key in list(record)[:5]) or "nothing"
        raise ValueError(f"{file} lacks {', '.join(missing)} (found: {found}); {remedy}")
    if not _is_state(record["state"]):
        raise ValueError(f"{file}: 'state' is not a dict of name -> tensor; {remedy}")
    state = map_tensors(file, _unwrap_names(file, record["state"]))
    return Policy(record["step_idx"], state, record["metrics"])


def index_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Name -> place in a `torch.save` file: {step_idx, state, metrics}, or a plain state dict.

    Raises ValueError naming a damaged or unsafe file.
    """
    content = _read(path)
    state = content.get("state", content) if isinstance(content, dict) else {}
    if not _is_state(state):
        raise ValueError(f"{path} is no checkpoint: expected {{step_idx, state, metrics}} or a state dict")
    return _unwrap_names(path, state)


def unwrapped(name: str) -> str:
    """`module.model._checkpoint_wrapped_module.x` -> `model.x`; `module` goes only at the front (DDP)."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def _unwrap_names(file: Path, state: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for wrapped, value in state.items():
        name = unwrapped(wrapped)
        if name in found:
            raise ValueError(f"{file}: two tensors are both called {name} once wrapper names are removed")
        found[name] = value
    return found


def _is_state(state: Any) -> bool:
    """Whether this is a dict of names and tensors, at least one."""
    if not isinstance(state, dict) or not state:
        return False
    return all(isinstance(key, str) and isinstance(value, StoredTensor) for key, value in state.items())


def _read(file: Path) -> Any:
    """What the file holds, with a StoredTensor for each tensor; every way it can be bad is a ValueError.

    A file that lies beside checksums, as every checkpoint's does, is checked against them first; any other
    against those within it.
    """
    refuse_stranger(file)
    checked = verify_checksum(file)
    try:
        return read_torch_file(file, check_crc=not checked)
    except HoldsObjects as error:
        raise ValueError(
            f"{file} was not read: it holds Python objects besides tensors and plain values, and loading them"
            " could run code. Save it again from where it was made, as torch.save({'step_idx': int, 'state':"
            f" {{name: tensor}}, 'metrics': {{name: Python number}}}}). {error}"
        ) from error
    except NotSupported as error:
        raise ValueError(f"{file} was not read: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read: it is truncated, damaged or not written"
            f" by torch.save. Copy it again, or use an earlier checkpoint of the run. The reason: {error}"
        ) from error
