"""The weight files of a Hugging Face folder, written tensor by tensor in the memory of one parameter.

`write_weights`: a model in memory or mapped from a file. `write_like`: a folder like an existing one (names
on disk, shapes, dtypes and small files are the base's) with other values, which are asked for one by one
under the loaded model's names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory, split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lota.models.loading import tied_names
from lota.models.scope import meta_model
from lota.models.tensor_files import Shaped, config_folder, new_safetensors
from lota.models.weights import ReadUnit, WeightSource, all_finite, open_weights, refuse_not_finite
from lota.share.hf_folder import CONFIG_FILES, PROCESSOR_FILES, TOKENIZER_FILES, copy_small_files


class _Form(NamedTuple):
    """What a tensor will be in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def check_shard_size(max_shard_size: str) -> None:
    """Raise ValueError for what is no size of a file, such as 2GB."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except (ValueError, KeyError) as error:
        raise ValueError(f"max_shard_size={max_shard_size}: give a size such as 500MB or 2GB") from error


def write_weights(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: str,
    source: object = "the model",
    base: WeightSource | None = None,
) -> None:
    """Write the model's tensors under their names on disk.

    source: what errors name. base: the weights that the model was made from; their names on disk are taken,
    and what they hold besides, such as towers that the model does not load, is copied. Floating-point ones
    are cast to `dtypes[name]`, or to `dtype` if that has none. A tied weight is written once. Extra memory:
    one tensor. Raises ValueError for NaN, infinity, and values beyond the range of a dtype, OSError when the
    disk is full.
    """
    ignored = {*tied_names(model), *(model._keys_to_ignore_on_save or ())}
    state = {name: value.detach() for name, value in model.state_dict().items() if name not in ignored}
    with torch.device("meta"):  # one that was not loaded: names on disk are those of the architecture
        structure = type(model)(model.config)
    stored = {} if base is None else _as_stored(base, state)
    stored |= revert_weight_conversion(structure, state)
    state = dict(sorted(stored.items()))
    beside = {} if base is None else {n: base.stored[n] for n in base.strange if n not in state}
    forms = {
        name: _Form(dtypes.get(name, dtype) if v.is_floating_point() else v.dtype, tuple(v.shape))
        for name, v in state.items()
    }
    for name, tensor in beside.items():
        kind = dtypes.get(name, dtype) if tensor.dtype.is_floating_point else tensor.dtype
        forms[name] = _Form(kind, tensor.shape)
    buffers = {name for name, _ in model.named_buffers()}  # some hold infinity: Gemma 4's bounds
    buffers |= set() if base is None else {*base.buffers.values(), *beside}
    with _new_shards(folder, forms, max_shard_size) as put:
        for name, form in forms.items():
            value = base.read_stored(name) if base is not None and name in beside else state.pop(name)
            put(name, value.to(form.dtype) if name in buffers else _cast(name, value, form.dtype, source))


def _as_stored(base: WeightSource, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take out of `state` what the base has, under the base's names on disk; the rest stays."""
    found: dict[str, Tensor] = {}
    for unit in base.units():
        if all(name in state for name in unit.parameters):
            values = {name: state[name] for name in unit.parameters}
            written = on_disk(values, unit)
            if sorted(written) == sorted(unit.stored):
                found |= written
                for name in unit.parameters:
                    del state[name]
    return found | {stored: state.pop(name) for name, stored in base.buffers.items() if name in state}


def _cast(name: str, value: Tensor, dtype: torch.dtype, source: object) -> Tensor:
    cast = value.to(dtype)
    if not all_finite(cast):
        refuse_not_finite(value, name, source)
        raise ValueError(f"{source}: {name} has values that {dtype} cannot hold; choose another dtype")
    return cast


def open_folder(path: str | os.PathLike[str]) -> tuple[WeightSource, PreTrainedModel]:
    """Open the weights and the structure (on the meta device) of a Hugging Face folder or hub id.

    Raises ValueError for what is no such folder, and for one that `write_like` could not write again.
    """
    folder = config_folder(path)
    if folder is None:
        raise ValueError(
            f"{path} is no Hugging Face folder with a config.json: convert it first, with "
            "convert_policy_to_hf_resize.py"
        )
    structure = meta_model(folder)
    source = open_weights(path, structure)
    check_writable(source, structure)
    return source, structure


def write_like(
    base: str | Path,
    source: WeightSource,
    model: PreTrainedModel,
    folder: Path,
    value_of: Callable[[str], Tensor],
    max_shard_size: str = "2GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Write into `folder` (which exists) the base with `value_of(name)` for each parameter.

    base: Hugging Face folder or hub id; source: its opened weights; model: its structure, on the meta device.
    value_of is called once for each of `source.names()`, `in_order`. Values are cast to `dtype`, None: to the
    base's; buffers are the base's. Raises ValueError, before any value is asked for,
    if transformers cannot undo the conversion that it applies when it loads such a model.
    """
    check_writable(source, model)
    copied = [name for name in source.unused if name not in tied_names(model)]
    units = in_order(source)
    forms: dict[str, Shaped] = {}
    for name in (name for unit in units for name in unit.stored):
        stored = source.stored[name]
        kind = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        forms[name] = _Form(kind, tuple(stored.shape))
    forms |= {name: source.stored[name] for name in copied}
    with _new_shards(folder, forms, max_shard_size) as put:
        for unit in units:
            values = {name: value_of(name) for name in unit.parameters}
            for name, value in on_disk(values, unit).items():
                put(name, value)
        for name in copied:
            put(name, source.read_stored(name))
    copy_small_files(base, (*CONFIG_FILES, *TOKENIZER_FILES, *PROCESSOR_FILES), folder)


def in_order(source: WeightSource) -> list[ReadUnit]:
    """What is written together, in the order in which `write_like` writes it."""
    return sorted(source.units(), key=lambda unit: min(unit.stored))


def check_writable(source: WeightSource, model: PreTrainedModel) -> None:
    """Raise ValueError unless every parameter can be written under the names that it was read from."""
    for unit in (unit for unit in source.units() if unit.converted):
        empty = {
            name: torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")
            for name in unit.parameters
        }
        try:
            written = {name: tuple(value.shape) for name, value in on_disk(empty, unit).items()}
        except ValueError:
            written = {}
        if written != {name: tuple(source.stored[name].shape) for name in unit.stored}:
            raise ValueError(
                f"{source.id}: {unit.stored[0]} cannot be written as it was read: {type(model).__name__}"
                " converts it on loading. Load it with transformers, save_pretrained it, and use that folder"
            )


def on_disk(values: Mapping[str, Tensor], unit: ReadUnit) -> dict[str, Tensor]:
    """Parameters of a unit -> stored name -> tensor."""
    if unit.conversion is not None:
        return unit.conversion.undo(values)
    return {unit.stored[0]: values[unit.parameters[0]]}


@contextlib.contextmanager
def _new_shards(
    folder: Path, tensors: Mapping[str, Shaped], max_shard_size: str
) -> Iterator[Callable[[str, Tensor], None]]:
    """The weight files of a folder, and their index if there are several; yields put(name, value)."""
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: math.prod(tensor.shape) * tensor.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with contextlib.ExitStack() as stack:
        put_of: dict[str, Callable[[str, Tensor], None]] = {}  # name -> put of its file
        for file, names in plan.filename_to_tensors.items():
            # transformers reads the metadata: "pt" says that the tensors are PyTorch's
            new = new_safetensors(folder / file, {n: tensors[n] for n in names}, {"format": "pt"})
            put_of |= dict.fromkeys(names, stack.enter_context(new))
        yield lambda name, value: put_of[name](name, value)
