"""A Hugging Face folder like an existing one with other values, written in the memory of one parameter.

Names on disk, shapes, dtypes and small files are the base's; the values of each parameter are asked for one
after the other under the loaded model's names, and go straight to their place in the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lota.models.policy import tied_names
from lota.models.weights import Group, WeightSource
from lota.share.hf_folder import TOKENIZER_FILES, copy_small_files, plan_shards, safetensors_header

CONFIG_FILES = ("config.json", "generation_config.json")


def write_like(
    base: str | Path,
    source: WeightSource,
    model: PreTrainedModel,
    folder: Path,
    value_of: Callable[[str], Tensor],
    max_shard_size: str = "2GB",
) -> None:
    """Write into `folder` (which exists and is empty) the base with `value_of(name)` for each parameter.

    base: Hugging Face folder or hub id; source: its opened weights; model: its structure, on the meta device.
    value_of is called once for each of `source.names()`, in the order of their sorted names on disk. Values
    are cast to the base's dtype; buffers are the base's. Raises ValueError, before any value is asked for,
    where transformers cannot undo the conversion that it applies when it loads such a model.
    """
    check_writable(source, model)
    copied = [name for name in source.unused if name not in tied_names(model)]
    groups = sorted(source.groups(), key=lambda group: min(group.stored))
    order = [name for group in groups for name in group.stored] + copied
    shapes = {
        n: torch.empty(source.stored[n].shape, dtype=source.stored[n].dtype, device="meta") for n in order
    }
    with _Shards(folder, shapes, max_shard_size) as shards:
        for group in groups:
            values = {name: value_of(name) for name in group.parameters}
            for name, value in _on_disk(model, values, group).items():
                shards.put(name, value)
        for name in copied:
            shards.put(name, source.read_stored(name))
    copy_small_files(base, (*CONFIG_FILES, *TOKENIZER_FILES), folder)


def check_writable(source: WeightSource, model: PreTrainedModel) -> None:
    """Raise ValueError unless every parameter can be written under the names that it was read from."""
    for group in (group for group in source.groups() if group.converted):
        empty = {
            name: torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")
            for name in group.parameters
        }
        written = {name: tuple(value.shape) for name, value in _on_disk(model, empty, group).items()}
        if written != {name: tuple(source.stored[name].shape) for name in group.stored}:
            raise ValueError(
                f"{source.id}: {group.stored[0]} cannot be written as it was read: {type(model).__name__}"
                " converts it on loading. Load it with transformers, save_pretrained it, and use that folder"
            )


def _on_disk(model: PreTrainedModel, values: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Parameters of a group -> stored name -> tensor."""
    if group.converted:
        return revert_weight_conversion(model, dict(values))
    return {group.stored[0]: values[group.parameters[0]]}


class _Shards:
    """The weight files of a folder: laid out when made, filled in any order."""

    def __init__(self, folder: Path, shapes: Mapping[str, Tensor], max_shard_size: str):
        self._shapes, self._handles, self._places = shapes, [], {}
        for file, names in plan_shards(shapes, folder, max_shard_size).items():
            header, begins = safetensors_header({name: shapes[name] for name in names})
            handle = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._handles.append(handle)
            _write_at(handle, memoryview(header), 0)
            self._places.update({name: (handle, begin) for name, begin in begins.items()})

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind, *_) -> None:
        for handle in self._handles:
            os.close(handle)
        assert kind is not None or not self._places, f"never written: {list(self._places)[:5]}"

    def put(self, name: str, value: Tensor) -> None:
        """Write a tensor to its place, in the dtype planned for it."""
        handle, begin = self._places.pop(name)
        value = value.to(self._shapes[name].dtype).contiguous()
        assert value.shape == self._shapes[name].shape, name
        _write_at(handle, memoryview(value.reshape(-1).view(torch.uint8).numpy()), begin)


def _write_at(handle: int, view: memoryview, position: int) -> None:
    while view:
        written = os.pwrite(handle, view, position)
        view, position = view[written:], position + written
