"""A model's keys and values in buffers with room for the tokens to come: a step copies none of the old."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

BLOCK = 64  # tokens that the room grows by at least


class RoomyLayer(DynamicLayer):
    """A DynamicLayer that writes new tokens into a buffer; DynamicLayer joins old and new at every step.

    keys, values: (rows, heads, tokens, width), views of the part of the buffers that is filled.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self._buffers = (layer.keys, layer.values)  # full: the first update makes room

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[-2]
        keys, values = self.open_slot(key_states.shape[-2])
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def open_slot(self, n: int = 1) -> tuple[Tensor, Tensor]:
        """Keys and values with n more columns, for the caller to fill."""
        end = self.keys.shape[-2] + n
        if end > self._buffers[0].shape[-2]:
            self._buffers = _with_room(self.keys, end), _with_room(self.values, end)
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        keys, values = self._buffers
        self._buffers = keys[indices], values[indices]
        self._show(self.keys.shape[-2])

    def _show(self, length: int) -> None:
        keys, values = self._buffers
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]


def _with_room(filled: Tensor, length: int) -> Tensor:
    """A buffer that begins with `filled`, with room for `length` tokens and some more."""
    rows, heads, old, width = filled.shape
    buffer = filled.new_empty(rows, heads, length + max(BLOCK, length // 8), width)
    buffer[:, :, :old] = filled
    return buffer


# Subclasses carry more state (linear attention, quantised blocks), and selecting rows may leave that behind.
SELECTABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)


def give_room(cache: object) -> None:
    """Replace, in a cache that a model has filled, the plain layers by ones that grow without copying."""
    layers = getattr(cache, "layers", None) or []
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and isinstance(layer.keys, torch.Tensor) and layer.keys.dim() == 4:
            layers[i] = RoomyLayer(layer)


def can_drop_rows(cache: object) -> bool:
    return cache is None or all(
        type(layer) in SELECTABLE_LAYERS for layer in getattr(cache, "layers", [None])
    )
