"""A masked optimizer's state from a checkpoint: what fits is taken over unchanged, else it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lota.optim.kept import Kept, Tiles


class OwnState(NamedTuple):
    """What an optimizer that loads state has of a parameter."""

    name: str
    state: dict[str, Any]  # as after its construction, or later
    kept: Kept
    device: torch.device


def matching_states(state_dict: dict[str, Any], own: Sequence[OwnState]) -> list[dict[str, Any]]:
    """The saved state of each parameter of `own`, in that order, on its device; own itself stays as it is.

    Raises ValueError if the state belongs to another mask, another set of parameters or another rule.
    """
    loaded = [index for group in state_dict["param_groups"] for index in group["params"]]
    if len(loaded) != len(own):
        raise ValueError(f"optimizer state of {len(loaded)} parameters, but {len(own)} train here")
    return [_matching(state_dict["state"].get(i), mine) for i, mine in zip(loaded, own, strict=True)]


def _matching(saved: dict[str, Any] | None, own: OwnState) -> dict[str, Any]:
    name, current = own.name, own.state
    if saved is not None and isinstance(own.kept, Tiles):
        saved = _as_tiles(saved, own.kept)
    if saved is None or set(saved) != set(current):
        found = sorted(saved) if saved else "nothing"
        raise ValueError(f"optimizer state of {name}: expected {sorted(current)}, found {found}")
    state = {k: v.to(own.device).clone() if torch.is_tensor(v) else v for k, v in saved.items()}
    for key, value in current.items():
        if torch.is_tensor(value) and (state[key].shape, state[key].dtype) != (value.shape, value.dtype):
            other = "mask" if state[key].shape != value.shape else "optimizer_state"
            raise ValueError(
                f"optimizer state of {name}: {key} is {tuple(state[key].shape)} {state[key].dtype}, "
                f"expected {tuple(value.shape)} {value.dtype}: it belongs to another {other}"
            )
    for key, value in own.kept.state.items():
        same = torch.equal(state[key], value) if torch.is_tensor(value) else tuple(state[key]) == value
        if not same:
            raise ValueError(f"optimizer state of {name} belongs to another mask: the kept {key} differ")
        state[key] = value  # one copy
    return state


def _as_tiles(saved: dict[str, Any], kept: Tiles) -> dict[str, Any]:
    """State by positions, as earlier releases saved it for every mask, in the order of tiles.

    What belongs to other positions is returned as it is.
    """
    if "positions" not in saved:
        return saved
    ascending, order = kept.positions().sort()
    before: Tensor = saved["positions"].to(ascending.device)
    if not torch.equal(before.long(), ascending):
        return saved
    state = {**kept.state}
    for key, value in saved.items():
        if torch.is_tensor(value) and key != "positions":
            state[key] = torch.empty_like(value).scatter_(0, order.to(value.device), value)
        elif key != "positions":
            state[key] = value
    return state
