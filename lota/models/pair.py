"""A base and a tuned model on disk that belong together, and the scope that masks are chosen over."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lota.models.opening import COMPUTED
from lota.models.provenance import recorded_base, run_settings
from lota.models.scope import ScopedTensor, ScopeShare, find_scope, meta_model, scope_share
from lota.models.tensor_files import config_folder
from lota.models.weights import WeightSource, open_weights, refuse_misfit

logger = logging.getLogger(__name__)


@dataclass
class ModelPair:
    """Both sides, opened and checked against each other; made by `open_pair`."""

    sources: dict[str, WeightSource]  # `base`, and `tuned` if it is read
    scope: dict[str, ScopedTensor]  # parameters that masks are chosen over, in the order that decides ties
    shapes: dict[str, tuple[int, ...]]  # of every parameter of the base
    pattern: str | None  # regular expression that gave the scope; None: attention and MLP weights
    structure: str  # folder or hub id whose config gives the shapes
    share: ScopeShare  # of the matrices that the scope takes


def open_pair(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str] | None = None,
    *,
    scope: str | None = None,
    model: str | os.PathLike[str] | None = None,
    needs: Sequence[str] = ("base", "tuned"),
    block_name: str | None = None,
) -> ModelPair:
    """Index both sides and check that the scope's names and shapes are the same on either.

    needs: the sides that the saliency reads. block_name: class of the transformer blocks; None finds them.
    Raises ValueError naming the first few differences both ways.
    """
    sides = {"base": base}
    if "tuned" in needs:
        if tuned is None:
            raise ValueError("tuned=None: this score compares two models; give the tuned one")
        if same_place(base, tuned):
            raise ValueError(f"tuned={tuned} is the base itself: give the fine-tuned model")
        sides["tuned"] = tuned
        warn_if_swapped(base, tuned)
    structure_path = _structure(list(sides.values()), model)
    structure = meta_model(structure_path)
    found = find_scope(structure, scope, block_name)
    expected = {name: tensor.shape for name, tensor in found.items()}
    sources = {}
    for role, path in sides.items():
        folder = config_folder(path) if role == "tuned" else None
        own = structure if folder is None else meta_model(folder)
        sources[role] = source = open_weights(path, own)
        _check_floating(source, expected)
        # What this side has of the scope, and what it has besides that would be in the scope of such a model.
        wanted = {*expected, *find_scope(own, scope)}
        held = {name: source.shape(name) for name in source.names() if name in wanted}
        partner = f"a {type(structure).__name__} of this configuration" if role == "base" else base
        refuse_misfit(source.id, partner, expected, held | _further(source, expected))
    shapes = {name: tuple(parameter.shape) for name, parameter in structure.named_parameters()}
    return ModelPair(sources, found, shapes, scope, structure_path, scope_share(structure, found))


def open_whole(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
) -> tuple[WeightSource, WeightSource]:
    """Index base and tuned and check that all their parameters have the same names and shapes.

    Weights that are no floating-point numbers must have the same dtype in both.
    model: folder whose config gives the structure, needed if neither side has one and names differ.
    Raises ValueError naming the first few differences both ways.
    """
    warn_if_swapped(base, tuned)
    try:
        structure = meta_model(_structure([base, tuned], model))
    except ValueError:
        structure = None  # two policy.pt files: their own names
    before, after = (open_weights(p, None if config_folder(p) else structure) for p in (base, tuned))
    recast = [n for n in before.names() if n in after and before.dtype(n) != after.dtype(n)]
    for source in (before, after):
        _check_floating(source, recast)
    expected, held = ({n: source.shape(n) for n in source.names()} for source in (before, after))
    held |= _further(after, expected)
    differing = [n for n in expected if held.get(n) != expected[n]]
    grown = differing and all(
        n in held and held[n][1:] == expected[n][1:] and held[n][:1] > expected[n][:1] for n in differing
    )
    remedy = "its vocabulary has grown: cut the new rows off first, with convert_policy_to_hf_resize.py"
    refuse_misfit(after.id, base, expected, held, f"{remedy} --vocab base" if grown else "")
    if structure is not None:
        _refuse_changed_towers(before, after, type(structure).__name__)
    return before, after


def _refuse_changed_towers(before: WeightSource, after: WeightSource, model: str) -> None:
    """Raise ValueError if the sides differ, in the base's dtype, in weights that the model does not load."""
    learnt = [name for name in before.strange if not re.search("|".join(COMPUTED), name)]
    for name in [name for name in learnt if name in after.strange]:
        own, other = before.read_stored(name), after.read_stored(name)
        if not torch.equal(own, other.to(own.dtype)):
            raise ValueError(
                f"{after.id}: {name} is not that of {before.id}, and a {model} does not load it, so that its "
                "change would be lost: give a model that was tuned in its text tower alone"
            )


def same_place(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths mean one file or folder, or two hub ids one model."""
    return str(one) == str(other) or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def warn_if_swapped(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> None:
    """Log a warning if the base's own record says that it was trained from the tuned model."""
    origin = recorded_base(Path(base))
    if origin is not None and same_place(origin, tuned):
        logger.warning("%s was trained from %s by its own record: are base and tuned swapped?", base, tuned)


def _structure(sides: Sequence[str | os.PathLike[str]], model: str | os.PathLike[str] | None) -> str:
    """Folder or hub id that gives names and roles: `model`, else a side with a config, else a run's base."""
    if model is not None:
        return str(model)
    for path in sides:
        if config_folder(path):
            return str(path)
    for path in sides:
        name = run_settings(Path(path)).base
        if name is not None:
            return name
    raise ValueError(
        f"{' and '.join(str(path) for path in sides)} do not say which model they are of: "
        "give model=FOLDER, a Hugging Face folder with its config"
    )


def _further(source: WeightSource, expected: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """What a side stores besides under names such as the expected ones, of other layers: a deeper model's.

    A policy.pt of a deeper model has names that this structure does not know.
    """
    alike = {re.sub(r"\d+", "#", name) for name in expected}
    return {name: shape for name, shape in source.strange.items() if re.sub(r"\d+", "#", name) in alike}


def _check_floating(source: WeightSource, names: Iterable[str]) -> None:
    strange = [name for name in names if name in source and not source.dtype(name).is_floating_point]
    if strange:
        raise ValueError(
            f"{source.id}: {strange[0]} is {source.dtype(strange[0])}; quantized weights have no task "
            "vector, give the model from before quantization"
        )
