"""Names on disk -> names of the loaded model, one tensor at a time.

transformers renames, merges and splits tensors while it loads a checkpoint (Mixtral's experts become one 3-D
tensor, GPT-NeoX's `embed_out` becomes `lm_head`). Here its own mapping is applied to names and shapes only;
the data of one parameter is converted when it is asked for. Most conversions only move whole rows, and those
are turned into a list of runs (target position, source tensor, source position, length), so that a part of
a merged tensor can be read without building it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PROBE_COLUMNS = 6  # even and composite: an operation that reorders columns cannot leave 0..5 in place


@dataclass(frozen=True)
class Run:
    """`length` entries of `source` from `source_start` on stand at `start` in the flat target."""

    start: int
    source: str
    source_start: int
    length: int


@dataclass
class Conversion:
    """Several stored tensors that become one or several parameters.

    sources: (stored name, converter's pattern) in the order in which transformers collects them.
    """

    converter: Any
    first_target: str
    model: nn.Module
    sources: list[tuple[str, str]] = field(default_factory=list)

    def apply(self, fetch: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameter name -> tensor; `fetch` gives the stored tensors."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first_target, name, pattern, fetch(name))
        result = converter.convert(self.first_target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


@dataclass(frozen=True)
class Target:
    """Where a parameter's values come from: one stored tensor under another name, or a conversion."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str | None = None
    conversion: Conversion | None = None


def translate(stored: Mapping[str, Any], model: nn.Module, loaded_names: bool = False) -> dict[str, Target]:
    """Parameter or buffer name of `model` -> Target.

    stored: name in the file -> anything with `shape` and `dtype`. model: a transformers model, on the meta
    device is enough. loaded_names: the file was written from a loaded model's state dict, so that a name
    that the model has is taken as it is. Stored tensors that the model has no place for are left out.
    Raises ValueError where transformers' conversion cannot be applied.
    """
    known = model.state_dict()
    rename, converter_of, order = _transformers_mapping(model, known)
    targets: dict[str, Target] = {}
    conversions: dict[str, Conversion] = {}
    for name in sorted(stored, key=order):
        renamed, pattern = (name, None) if loaded_names and name in known else rename(name)
        if renamed not in known:
            continue
        if pattern is None:
            tensor = stored[name]
            targets[renamed] = Target(tuple(tensor.shape), tensor.dtype, source=name)
        else:
            conversion = conversions.setdefault(renamed, Conversion(converter_of[pattern], renamed, model))
            conversion.sources.append((name, pattern))
    for conversion in conversions.values():
        targets.update(_converted_targets(conversion, stored))
    return targets


def _converted_targets(conversion: Conversion, stored: Mapping[str, Any]) -> dict[str, Target]:
    """Names and shapes that a conversion gives, found by running it on tensors without data."""

    def shape_only(name: str) -> Tensor:
        return torch.empty(tuple(stored[name].shape), dtype=stored[name].dtype, device="meta")

    try:
        results = conversion.apply(shape_only)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        names = ", ".join(name for name, _ in conversion.sources[:3])
        raise ValueError(
            f"{names} ... cannot be converted to {conversion.first_target}; the checkpoint is incomplete, "
            f"quantized or of another model: {error}"
        ) from error
    return {
        name: Target(tuple(value.shape), value.dtype, conversion=conversion)
        for name, value in results.items()
    }


def _transformers_mapping(model: nn.Module, known: Mapping[str, Tensor]):
    """The one place that touches transformers' loading internals (present from 5.17 to 5.23 at least).

    Returns rename(stored name) -> (name, converter's pattern or None), pattern -> converter, and the sort
    key that puts expert 10 after expert 9, as `convert_and_load_state_dict_in_model` does.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            return rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=known)
        return renamed, pattern

    return rename, {p: entry for entry in converters for p in entry.source_patterns}, dot_natural_key


def row_runs(conversion: Conversion, stored: Mapping[str, Any]) -> dict[str, list[Run]] | None:
    """Parameter name -> runs of whole rows, or None where the conversion does more than move rows.

    The conversion is run on small integer tensors that number the rows: the same shapes with the last
    dimension cut to six columns. The result counts only if each row comes out whole, in the real shape.
    """
    names = [name for name, _ in conversion.sources]
    columns = {tuple(stored[name].shape)[-1] for name in names if len(stored[name].shape) >= 2}
    if len(columns) != 1 or any(len(stored[name].shape) < 2 for name in names):
        return None
    n_columns = columns.pop()
    first_row, offset = {}, 0
    for name in names:
        first_row[name] = offset
        offset += int(np.prod(tuple(stored[name].shape)[:-1])) + 1  # a gap keeps runs within one tensor

    def numbered(name: str) -> Tensor:
        lead = tuple(stored[name].shape)[:-1]
        rows = torch.arange(int(np.prod(lead))) + first_row[name]
        return (rows[:, None] * _PROBE_COLUMNS + torch.arange(_PROBE_COLUMNS)).reshape(*lead, _PROBE_COLUMNS)

    try:
        results = conversion.apply(numbered)
        real = _converted_targets(conversion, stored)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError):
        return None
    runs = {}
    for target, value in results.items():
        if tuple(value.shape) != (*real[target].shape[:-1], _PROBE_COLUMNS):
            return None
        if value.dtype != torch.int64 or real[target].shape[-1] != n_columns:
            return None
        flat = value.reshape(-1, _PROBE_COLUMNS)
        rows = flat[:, 0] // _PROBE_COLUMNS
        if not torch.equal(flat, rows[:, None] * _PROBE_COLUMNS + torch.arange(_PROBE_COLUMNS)):
            return None
        runs[target] = _merge_rows(rows.numpy(), first_row, n_columns)
    return runs


def _merge_rows(rows: np.ndarray, first_row: Mapping[str, int], n_columns: int) -> list[Run]:
    names, starts = list(first_row), list(first_row.values())
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    runs = []
    for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        index = bisect.bisect_right(starts, int(rows[begin])) - 1
        source_row = int(rows[begin]) - starts[index]
        runs.append(Run(begin * n_columns, names[index], source_row * n_columns, (end - begin) * n_columns))
    return runs
