"""A base and a tuned model on disk that belong together, and the scope that masks are chosen over."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lota.models.provenance import run_settings
from lota.models.scope import ScopedTensor, find_scope, meta_model
from lota.models.tensor_files import checkpoint_files
from lota.models.weights import WeightSource, open_weights

SHOWN = 4  # differences of each kind


@dataclass
class ModelPair:
    """Both sides, opened and checked against each other; made by `open_pair`."""

    sources: dict[str, WeightSource]  # `base`, and `tuned` if it is read
    scope: dict[str, ScopedTensor]  # parameters that masks are chosen over, in the order that decides ties
    shapes: dict[str, tuple[int, ...]]  # of every parameter of the base
    pattern: str | None  # regular expression that gave the scope; None: attention and MLP weights
    structure: str  # folder or hub id whose config gives the shapes


def open_pair(
    base: str | os.PathLike,
    tuned: str | os.PathLike | None = None,
    *,
    scope: str | None = None,
    model: str | os.PathLike | None = None,
    needs: Sequence[str] = ("base", "tuned"),
    block_name: str | None = None,
) -> ModelPair:
    """Index both sides and check that the scope's names and shapes are the same on either.

    needs: what the score reads. block_name: class of the transformer blocks; None finds them.
    Raises ValueError naming the first few differences both ways.
    """
    if "tuned" in needs and tuned is None:
        raise ValueError("this score compares two models: give the tuned one (--tuned)")
    sides = {"base": base, **({"tuned": tuned} if "tuned" in needs else {})}
    folders = {role: checkpoint_files(path)[1] for role, path in sides.items()}
    structure_path = _structure(sides, folders, model)
    structure = meta_model(structure_path)
    found = find_scope(structure, scope, block_name)
    expected = {name: tensor.shape for name, tensor in found.items()}
    sources = {}
    for role, path in sides.items():
        own = structure
        if folders[role] is not None and role != "base" and (folders[role] / "config.json").is_file():
            own = meta_model(folders[role])
        sources[role] = open_weights(path, own)
        partner = base if role != "base" else f"a {type(structure).__name__} of this configuration"
        _check_floating(sources[role], expected)
        _check_same(expected, _in_scope(sources[role], expected, own, scope), partner, sources[role])
    shapes = {name: tuple(parameter.shape) for name, parameter in structure.named_parameters()}
    return ModelPair(sources, found, shapes, scope, structure_path)


def open_whole(
    base: str | os.PathLike, tuned: str | os.PathLike, model: str | os.PathLike | None = None
) -> tuple[WeightSource, WeightSource]:
    """Index base and tuned and check that all their parameters have the same names and shapes.

    Weights that are no floating-point numbers must have the same dtype in both.
    model: folder whose config gives the structure, needed where neither side has one and names differ.
    Raises ValueError naming the first few differences both ways.
    """
    sides = {"base": base, "tuned": tuned}
    folders = {role: checkpoint_files(path)[1] for role, path in sides.items()}
    try:
        structure = meta_model(_structure(sides, folders, model))
    except ValueError:
        structure = None  # two policy.pt files: their own names
    own = {
        role: folder is not None and (folder / "config.json").is_file() for role, folder in folders.items()
    }
    sources = {role: open_weights(path, None if own[role] else structure) for role, path in sides.items()}
    before, after = sources["base"], sources["tuned"]
    recast = [n for n in before.names() if n in after and before.dtype(n) != after.dtype(n)]
    for source in (before, after):
        _check_floating(source, recast)
    expected, held = ({n: source.shape(n) for n in source.names()} for source in sources.values())
    held |= _further(sources["tuned"], expected)
    differing = [n for n in expected if held.get(n) != expected[n]]
    only_grown = all(
        n in held and held[n][1:] == expected[n][1:] and held[n][:1] > expected[n][:1] for n in differing
    )
    try:
        _check_same(expected, held, base, sources["tuned"])
    except ValueError as error:
        if not differing or not only_grown:
            raise
        raise ValueError(
            f"{error}\n  its vocabulary has grown: cut the new rows off first, with "
            "convert_policy_to_hf_resize.py --vocab base"
        ) from error
    return sources["base"], sources["tuned"]


def _structure(
    sides: Mapping[str, Any], folders: Mapping[str, Path | None], model: str | os.PathLike | None
) -> str:
    """Folder or hub id of the model that gives names and roles: `model`, else a side that is a folder, else
    a run's base model.
    """
    if model is not None:
        return str(model)
    for role, folder in folders.items():
        if folder is not None and (folder / "config.json").is_file():
            return str(sides[role])
    for path in sides.values():
        name = run_settings(Path(path)).base
        if name is not None:
            return name
    raise ValueError(
        f"{' and '.join(str(path) for path in sides.values())} do not say which model they are of: "
        "give a Hugging Face folder with its config (--model)"
    )


def _in_scope(
    source: WeightSource, expected: Mapping[str, tuple[int, ...]], model: nn.Module, pattern: str | None
) -> dict[str, tuple[int, ...]]:
    """What a side holds of the scope, and what it holds besides that would be in the scope of such a model.

    A policy.pt of a deeper model has names that this structure does not know; they count when another layer's
    tensor of the same name is in the scope.
    """
    own = find_scope(model, pattern)
    held = {name: source.shape(name) for name in source.names() if name in expected or name in own}
    return held | _further(source, expected)


def _further(source: WeightSource, expected: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """What a side stores besides under names such as the expected ones, of other layers: a deeper model's."""
    alike = {re.sub(r"\d+", "#", name) for name in expected}
    return {name: shape for name, shape in source.unused.items() if re.sub(r"\d+", "#", name) in alike}


def _check_floating(source: WeightSource, names: Iterable[str]) -> None:
    strange = [name for name in names if name in source and not source.dtype(name).is_floating_point]
    if strange:
        raise ValueError(
            f"{source.id}: {strange[0]} is {source.dtype(strange[0])}; quantized weights have no task "
            "vector, give the model from before quantization"
        )


def _check_same(
    expected: Mapping[str, tuple[int, ...]],
    held: Mapping[str, tuple[int, ...]],
    partner: Any,
    source: WeightSource,
) -> None:
    absent = [name for name in expected if name not in held]
    extra = [name for name in held if name not in expected]
    shapes = [
        f"{name} {expected[name]} and {held[name]}"
        for name in expected
        if name in held and tuple(held[name]) != tuple(expected[name])
    ]
    if not absent and not extra and not shapes:
        return
    lines = [f"{source.id} does not belong to {partner}:"]
    for title, names in (
        ("missing there", absent),
        ("only there", extra),
        ("of another shape", shapes),
    ):
        if names:
            more = f" ... and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {len(names)} {title}: {', '.join(names[:SHOWN])}{more}")
    raise ValueError("\n".join(lines))
