"""A model as a checkpoint stores it, tensor by tensor: in policy.pt, or in a Hugging Face folder of shards.

No process holds more of it than one tensor at a time besides what it trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lota.config import Config
from lota.models.policy import model_folder
from lota.models.weights import WeightSource
from lota.optim.masked import MaskedOptimizer
from lota.share.hf_folder import TOKENIZER_FILES, copy_small_files
from lota.share.hf_weights import in_order, open_folder, write_like
from lota.storage import blank, save_tensors

# Parameter name -> the parameter on the CPU as it is stored; None on processes that gave their part of it.
ValueOf = Callable[[str], Tensor | None]


class Source(Protocol):
    """Weights on disk: all of a model, or the parts that a process holds of it."""

    def read(self, name: str) -> Tensor:
        """A parameter, or the part of it, in its own memory, the file's dtype."""
        ...


class SavedModel:
    """What is stored of a model; writing asks for one parameter after the other.

    state: the model's `state_dict(keep_vars=True)`, or what of it is stored, by the names in the file. names:
    of its parameters, by the first of which a tied one is known, -> parameter. dtype: of stored parameters;
    buffers and whole numbers keep theirs.
    """

    def __init__(
        self, state: Mapping[str, Tensor], names: Mapping[str, Tensor], dtype: torch.dtype, value_of: ValueOf
    ):
        self.state, self.dtype, self.value_of = dict(state), dtype, value_of
        self._name = {id(p): name for name, p in names.items() if p.is_floating_point()}

    def parameters(self) -> list[str]:
        """Names of the parameters in the order in which `write_policy` asks for them."""
        return list(dict.fromkeys(self._name[id(t)] for t in self.state.values() if id(t) in self._name))

    def write_policy(self, path: Path, step_idx: int, metrics: Mapping[str, Any]) -> str:
        """Write {step_idx, state, metrics}; returns the file's SHA-256."""
        blanks: dict[str, Tensor] = {}  # of what has memory of its own, in order
        state = {}
        for key, tensor in self.state.items():
            name = self._name.get(id(tensor), key)
            if name not in blanks:
                kind = self.dtype if id(tensor) in self._name else tensor.dtype
                blanks[name] = blank(tensor.shape, kind)
            state[key] = blanks[name]
        # Python numbers: a NumPy scalar would make a file that `weights_only=True` refuses
        plain = {n: v.item() if hasattr(v, "item") else v for n, v in sorted(metrics.items())}
        content = {"step_idx": step_idx, "state": state, "metrics": plain}
        return save_tensors(content, path, self._values(blanks))

    def _values(self, wanted: Mapping[str, Tensor]) -> Iterator[Tensor]:
        parameters = set(self._name.values())
        for name in wanted:
            yield self.whole(name) if name in parameters else self.state[name].detach().cpu()

    def whole(self, name: str) -> Tensor:
        """A parameter, in the process that writes."""
        value = self.value_of(name)
        assert value is not None
        return value

    def write_folder(
        self, folder: Path, like: str, structure: PreTrainedModel, tokenizer: str | None
    ) -> None:
        """Write config, tokenizer and weights into a folder that exists, like another one or a hub id.

        structure: the model on the meta device. tokenizer: where it is, if not with `like`.
        """
        source = folder_source(like, structure)
        write_like(like, source, structure, folder, self.whole, dtype=self.dtype)
        if tokenizer is not None:
            copy_small_files(tokenizer, TOKENIZER_FILES, folder)
        file = folder / "config.json"
        content = _with_dtype(json.loads(file.read_text(encoding="utf-8")), str(self.dtype).split(".")[1])
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def contribute(self, names: list[str]) -> None:
        """Give this process's parts of the parameters to the process that writes."""
        for name in names:
            self.value_of(name)


def folder_like(config: Config) -> str:
    """The Hugging Face folder or hub id that save_format=folder writes another one of."""
    return model_folder(config.model.name_or_path, config.model.archive)


def folder_source(like: str, structure: PreTrainedModel) -> WeightSource:
    """The weights of a Hugging Face folder or hub id whose form a checkpoint takes.

    Raises ValueError if it is none, or if the model has another vocabulary, or cannot be written so.
    """
    source, _ = open_folder(like)
    for name, p in structure.named_parameters():
        if name in source and source.shape(name) != tuple(p.shape):
            raise ValueError(
                f"save_format=folder: {name} has {p.shape[0]} rows and {source.shape(name)[0]} in {like}, of "
                "which the folder takes names and config: use save_format=policy, or model.pad_token=null "
                "(padding with an existing token)"
            )
    return source


def folder_order(like: str, structure: PreTrainedModel) -> list[str]:
    """Names of the parameters in the order in which `write_folder` asks for them."""
    return [name for unit in in_order(folder_source(like, structure)) for name in unit.parameters]


def _with_dtype(content: Any, dtype: str) -> Any:
    """A config in which the dtype is another one, also inside of its parts."""
    if not isinstance(content, dict):
        return content
    keys = ("dtype", "torch_dtype")
    return {
        key: dtype if key in keys and value else _with_dtype(value, dtype) for key, value in content.items()
    }


def saved_model(
    model: nn.Module, optimizer: MaskedOptimizer, dtype: torch.dtype, base: Source | None = None
) -> SavedModel:
    """A model that this process holds whole. base: see `stored_value`."""
    parameters = dict(model.named_parameters())
    value_of = trained_values(optimizer, parameters, dtype, base)
    return SavedModel(model.state_dict(keep_vars=True), parameters, dtype, value_of)


def stored_value(name: str, tensor: Tensor, dtype: torch.dtype, base: Source | None = None) -> Tensor:
    """A copy of a parameter on the CPU in `dtype`.

    base: weights from which it is read if the model holds it in less precision than `dtype`; rows that they
    do not have (a vocabulary grown by a pad token) are the model's.
    """
    value = tensor.detach().to("cpu", dtype, copy=True)
    if base is not None and tensor.element_size() < value.element_size():
        rows = base.read(name).to(dtype)
        value[: rows.shape[0]] = rows
    return value


def trained_values(
    optimizer: MaskedOptimizer,
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype,
    base: Source | None = None,
) -> Callable[[str], Tensor]:
    """Parameter name -> its value as it is stored: kept entries are the optimizer's fp32 values.

    parameters: those that the optimizer trains and all others. base: see `stored_value`.
    """
    trained = {name: p for p, name in optimizer.names.items()}

    def value_of(name: str) -> Tensor:
        value = stored_value(name, parameters[name], dtype, base)
        if name in trained:
            p = trained[name]
            optimizer.kept[p].write(value, optimizer.exact_values(p).detach())
        return value

    return value_of
