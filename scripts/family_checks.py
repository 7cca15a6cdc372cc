"""What must hold of a family that went through the whole method: bits, names and logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Wrong(Exception):
    """A check does not hold."""


def check(work: Path, mask_path: Path, policy_path: Path) -> tuple[str, float]:
    """The model's class and the share that its scope takes.

    work: folder with base/, converted/, applied/ and reverted/. Raises Wrong for the first thing that is not
    as it should be.
    """
    from lota.masks import Mask
    from lota.models.policy import read_policy
    from lota.models.scope import scope_share

    base, expected = load(work / "base")
    mask, state = Mask.load(mask_path), read_policy(policy_path).state
    check_logps(base)
    check_trained(base, state, mask)
    check_gradients(base, mask)
    converted, found = load(work / "converted")
    if found != expected or expected["missing_keys"]:
        raise Wrong(f"transformers finds {found} in the converted folder, and {expected} in the base")
    check_converted(base, converted, state)
    same_tensors(work / "converted", work / "applied")
    same_tensors(work / "base", work / "reverted")
    return type(base).__name__, round(scope_share(base, mask.names).share, 3)


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    from lota.models.scope import auto_class, load_config

    model, info = auto_class(load_config(folder)).from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


def check_logps(model: Any) -> None:
    """The log-probabilities that training sees are those of the model's logits."""
    from lota.models.head import logps_of_logits, token_logps

    ids = torch.arange(20).view(2, 10) + 4
    targets = ids + 1
    targets[:, -1] = targets[0, :4] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        found, expected = (
            token_logps(model, inputs, targets),
            logps_of_logits(model(**inputs).logits, targets),
        )
    if (found - expected).abs().max() > 1e-4:
        raise Wrong("log-probabilities from the head differ from those of the logits")


def check_trained(base: Any, state: dict[str, Tensor], mask: Any) -> None:
    """Frozen entries, and all else that the mask does not list, have the base's bits; kept ones changed."""
    own, first = base.state_dict(), first_names(base)
    if own.keys() != state.keys():
        raise Wrong(f"policy.pt has other names: {sorted(own.keys() ^ state.keys())[:3]}")
    changed = kept_in_all = 0
    for name, before in own.items():
        differ = bits(state[name]) != bits(before)
        listed = first.get(name, name)
        kept = mask.dense(listed) if listed in mask else torch.zeros_like(differ)
        if (differ & ~kept).any():
            raise Wrong(f"{int((differ & ~kept).sum())} frozen entries of {name} have changed")
        changed, kept_in_all = changed + int((differ & kept).sum()), kept_in_all + int(kept.sum())
    if changed < 0.9 * kept_in_all:
        raise Wrong(f"only {changed} of {kept_in_all} kept entries have changed")


def check_gradients(base: Any, mask: Any) -> None:
    """Kept gradients that layers and stacks of experts compute themselves are autograd's, up to rounding."""
    import lota

    sides: list[dict[str, Tensor]] = []
    for compact in (True, False):
        model = copy.deepcopy(base)
        # `global` clipping holds the gradients until the step that does not come
        optimizer = lota.MaskedSGD(model, mask, lr=0.0, grad_norm_strategy="global", max_grad_norm=1.0)
        lota.fuse_in_backward(optimizer, compact_linear=compact)
        run(model).float().square().mean().backward()
        sides.append({optimizer.names[p]: gradient for p, (gradient, _) in optimizer._pending.items()})
    ours, autograds = sides
    if ours.keys() != autograds.keys():
        raise Wrong(f"gradients are missing of {sorted(ours.keys() ^ autograds.keys())[:3]}")
    for name, gradient in autograds.items():
        if not (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max():
            raise Wrong(f"the compact gradient of {name} is not autograd's")


def first_names(model: Any) -> dict[str, str]:
    """Name of each parameter -> the first of the names that it has, by which masks call it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def check_converted(base: Any, converted: Any, state: dict[str, Tensor]) -> None:
    """The converted folder loads as the trained model: the same bits, the same logits."""
    found = converted.state_dict()
    for name in state:
        if name not in found or not torch.equal(bits(found[name]), bits(state[name])):
            raise Wrong(f"converted: {name} is not what training wrote")
    before = logits(base)
    base.load_state_dict(state)
    after = logits(base)
    if not torch.equal(logits(converted), after):
        raise Wrong("converted: its logits are not the trained model's")
    if torch.equal(before, after):
        raise Wrong("training has not changed the logits")


def bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.dtype.itemsize])


def logits(model: Any) -> Tensor:
    """On a copy: where tensors begin in memory may decide the order of a sum."""
    with torch.no_grad():
        return run(copy.deepcopy(model))


def run(model: Any) -> Tensor:
    """Logits of two rows of ten ids."""
    ids = torch.arange(20).view(2, 10) + 4
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def same_tensors(expected: Path, found: Path) -> None:
    """Raise Wrong unless two folders hold the same tensors, to the last bit, under the same names."""
    from safetensors.torch import load_file

    sides: list[dict[str, Tensor]] = []
    for folder in (expected, found):
        sides.append({})
        for file in sorted(folder.glob("*.safetensors")):
            sides[-1] |= load_file(file)
    one, other = sides
    if one.keys() != other.keys():
        raise Wrong(
            f"{found.name} has other names than {expected.name}: {sorted(one.keys() ^ other.keys())[:3]}"
        )
    for name, tensor in one.items():
        if other[name].dtype != tensor.dtype or not torch.equal(bits(other[name]), bits(tensor)):
            raise Wrong(f"{found.name}: {name} is not the one of {expected.name}")
