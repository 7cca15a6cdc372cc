"""Names on disk -> names of the loaded model, one tensor at a time.

transformers renames, merges and splits tensors while it loads a checkpoint (Mixtral's experts become one 3-D
tensor, GPT-NeoX's `embed_out` becomes `lm_head`). Here its own mapping is applied to names and shapes only;
the data of one parameter is converted when it is asked for. Most conversions only move whole rows. Those
become a list of `RowSpan`s, so that a part of a merged tensor is read without building it: on a Mixtral shape
that takes a third of the memory and half of the time (docs/DECISIONS.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lota.models.tensor_files import Shaped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COLUMNS = 6  # of a probe; even and composite: what reorders columns cannot leave 0..5 in place
_CONVERSION_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError)


@dataclass(frozen=True)
class RowSpan:
    """Whole rows that stand one after the other, in a stored tensor and in the parameter alike."""

    start: int  # first entry in the flattened parameter
    source: str  # name of the stored tensor
    source_start: int  # first entry in the flattened stored tensor
    length: int  # entries


@dataclass(eq=False)
class Conversion:
    """Several stored tensors that become one or several parameters."""

    converter: Any  # transformers' WeightConverter
    first_target: str  # name that the converter derives the parameters' names from
    model: PreTrainedModel
    stored: Mapping[str, Shaped]  # all of the checkpoint, by name
    sources: list[tuple[str, str]] = field(
        default_factory=list
    )  # (stored name, converter's pattern), in order
    mapping: list[Any] = field(default_factory=list)  # all transforms; each knows whether it was used

    @property
    def stored_names(self) -> list[str]:
        """Names of the stored tensors that are read."""
        return [name for name, _ in self.sources]

    def apply(self, fetch: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameter name -> tensor; `fetch` gives the stored tensors."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first_target, name, pattern, fetch(name))
        result = converter.convert(self.first_target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}

    def undo(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of this conversion -> stored name -> tensor, as transformers saves a loaded model.

        It reverses those of its transforms that were used, so that `language_model.` comes back if it stood
        there. Raises ValueError if transformers cannot reverse one.
        """
        from transformers.core_model_loading import revert_weight_conversion  # slow to import

        holder: Any = self.model
        before = getattr(holder, "_weight_conversions", None)
        if all(hasattr(entry, "was_used") for entry in self.mapping):  # older transformers know all alike
            holder._weight_conversions = [entry for entry in self.mapping if entry.was_used()] or None
        try:
            return revert_weight_conversion(holder, dict(values))
        except (*_CONVERSION_ERRORS, NotImplementedError) as error:
            raise ValueError(
                f"transformers cannot undo its conversion to {self.first_target}: {error}"
            ) from error
        finally:
            holder._weight_conversions = before

    @cached_property
    def results(self) -> dict[str, Tensor]:
        """Parameter name -> meta tensor. Raises ValueError if transformers' conversion cannot be applied."""
        try:
            return self.apply(
                lambda name: torch.empty(
                    tuple(self.stored[name].shape), dtype=self.stored[name].dtype, device="meta"
                )
            )
        except _CONVERSION_ERRORS as error:
            raise ValueError(
                f"{', '.join(self.stored_names[:3])} ... cannot be converted to {self.first_target}; the "
                f"checkpoint is incomplete, quantized or of another model: {error}"
            ) from error

    @cached_property
    def row_spans(self) -> dict[str, list[RowSpan]]:
        """Parameter name -> the rows that it is made of; empty if the conversion does more than move rows.

        The conversion is run on small integer tensors that number the rows: of the stored shapes with the
        last dimension cut to six columns. The result counts only if each row comes out whole, in the real
        shape.
        """
        shapes = {name: tuple(self.stored[name].shape) for name in self.stored_names}
        if any(len(shape) < 2 for shape in shapes.values()) or len({s[-1] for s in shapes.values()}) != 1:
            return {}
        n_columns = next(iter(shapes.values()))[-1]
        first_row, total = {}, 0  # number of each tensor's first row; the gap of one ends every span with it
        for name, shape in shapes.items():
            first_row[name] = total
            total += math.prod(shape[:-1]) + 1

        def probe(name: str) -> Tensor:
            """(..., columns) -> int64 (..., 6): 6 x number of the row + number of the column."""
            lead = shapes[name][:-1]
            rows = first_row[name] + torch.arange(math.prod(lead))
            return (rows[:, None] * _COLUMNS + torch.arange(_COLUMNS)).reshape(*lead, _COLUMNS)

        try:
            moved = self.apply(probe)
        except _CONVERSION_ERRORS:
            return {}
        spans = {}
        for target, value in moved.items():
            if value.dtype != torch.int64 or value.shape != (*self.results[target].shape[:-1], _COLUMNS):
                return {}
            flat = value.reshape(-1, _COLUMNS)  # (rows of the parameter, 6)
            rows = flat[:, 0] // _COLUMNS  # (rows,): which stored row stands there
            whole = torch.equal(flat, rows[:, None] * _COLUMNS + torch.arange(_COLUMNS))
            if not whole or self.results[target].shape[-1] != n_columns:
                return {}
            spans[target] = _join_rows(rows.numpy(), first_row, n_columns)
        return spans


def _join_rows(rows: np.ndarray, first_row: Mapping[str, int], n_columns: int) -> list[RowSpan]:
    """rows: (rows of a parameter,), the number of the stored row at each place -> as few spans as can be."""
    names, firsts = list(first_row), np.array(list(first_row.values()))
    begins = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # where a row does not follow the one before
    ends = [*begins[1:].tolist(), len(rows)]
    sources = np.searchsorted(firsts, rows[begins], side="right") - 1  # the tensor that each begins in
    return [
        RowSpan(
            begin * n_columns,
            names[source],
            (int(rows[begin]) - int(firsts[source])) * n_columns,
            (end - begin) * n_columns,
        )
        for begin, end, source in zip(begins.tolist(), ends, sources.tolist(), strict=True)
    ]


def translate(
    stored: Mapping[str, Shaped], model: PreTrainedModel, loaded_names: bool = False
) -> dict[str, str | Conversion]:
    """Parameter or buffer name of `model` -> name of its stored tensor, or what makes it of several.

    stored: name in the file -> shape and dtype. model: a transformers model, on the meta device is enough.
    loaded_names: the file was written from a loaded model's state dict, so that a name that the model has is
    taken as it is. Stored tensors that the model has no place for are left out.
    Raises ValueError if transformers' conversion cannot be applied.
    """
    known = model.state_dict()
    rename, mapping, converter_of, order = _transformers_mapping(model, known)
    origins: dict[str, str | Conversion] = {}
    conversions: dict[str, Conversion] = {}
    for name in sorted(stored, key=order):
        renamed, pattern = (name, None) if loaded_names and name in known else rename(name)
        if renamed not in known:
            continue
        if pattern is None:
            origins[renamed] = name
        else:
            new = Conversion(converter_of[pattern], renamed, model, stored, mapping=mapping)
            conversions.setdefault(renamed, new).sources.append((name, pattern))
    for conversion in conversions.values():
        origins |= dict.fromkeys(conversion.results, conversion)
    return origins


def placed(names: Iterable[str], model: PreTrainedModel) -> set[str]:
    """Those of the stored names that `model` has a place for."""
    known = model.state_dict()
    rename = _transformers_mapping(model, known)[0]
    return {name for name in names if rename(name)[0] in known}


def _transformers_mapping(
    model: PreTrainedModel, known: dict[str, Tensor]
) -> tuple[Callable[[str], tuple[str, str | None]], list[Any], dict[str, Any], Callable[[str], Any]]:
    """What touches transformers' loading internals when reading (present from 5.17 to 5.23 at least).

    Returns rename(stored name) -> (name, converter's pattern or None), the transforms, pattern -> converter,
    and the sort key that puts expert 10 after expert 9, as `convert_and_load_state_dict_in_model` does.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # slow to import
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

    by_pattern = {p: entry for entry in converters for p in entry.source_patterns}
    return rename, mapping, by_pattern, dot_natural_key
