"""Which parameters a mask is chosen over: attention and MLP weights of the transformer blocks, found by role.

A parameter is in the default scope when it is the weight matrix of a linear map (`nn.Linear`, GPT-2's
`Conv1D`, a stack of expert matrices) inside a transformer block. Embeddings, output head, norms, biases and
MoE routers are outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_ATTENTION = re.compile(r"attn|attention|deltanet|mamba", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"router|gating", re.IGNORECASE)
_ROUTER_NAMES = {"router", "gate", "shared_expert_gate"}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ScopedTensor:
    """A parameter of the scope. layer: index of its block, None outside; role: attention, mlp or other;
    transposed: matrices are stored (in, out) instead of (out, in).
    """

    shape: tuple[int, ...]
    role: str
    layer: int | None
    module_type: str
    transposed: bool = False


def meta_model(name_or_path: str | Path, trust_remote_code: bool = False) -> nn.Module:
    """The causal LM of a Hugging Face folder or hub id on the meta device: names, shapes, no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def transformer_blocks(model: nn.Module, class_name: str | None = None) -> list[tuple[str, nn.Module]]:
    """(prefix, block) of every transformer block in order.

    class_name: what the blocks' class is called; None takes the module list that holds the most parameters.
    Raises ValueError when there are none.
    """
    if class_name is not None:
        named = [(prefix, m) for prefix, m in model.named_modules() if type(m).__name__ == class_name]
        if not named:
            raise ValueError(f"{type(model).__name__} has no module of class {class_name}")
        return named
    best: tuple[int, str, nn.ModuleList] | None = None
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = (size, prefix, module)
    if best is None:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks; give scope as a regular expression"
        )
    return [(f"{best[1]}.{index}", block) for index, block in enumerate(best[2])]


def find_scope(
    model: nn.Module, pattern: str | None = None, class_name: str | None = None
) -> dict[str, ScopedTensor]:
    """Parameters that masks are chosen over, in the order of `named_parameters()`.

    pattern: regular expression searched in the parameter's name instead of the default rule.
    class_name: class of the transformer blocks; None finds them.
    Raises ValueError for a pattern that does not compile or matches nothing, or a model without such weights.
    """
    try:
        regex = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise ValueError(f"scope={pattern!r} is not a regular expression: {error}") from error
    modules = dict(model.named_modules())
    try:
        layers = {prefix: i for i, (prefix, _) in enumerate(transformer_blocks(model, class_name))}
    except ValueError:
        if regex is None:
            raise
        layers = {}
    scope = {}
    for name, parameter in model.named_parameters():
        block = next((b for b in layers if name.startswith(b + ".")), None)
        role = _role(name, parameter, block, modules, model)
        if (role != "other") if regex is None else regex.search(name):
            owner = modules[name.rpartition(".")[0]]
            scope[name] = ScopedTensor(
                tuple(parameter.shape), role, layers.get(block), type(owner).__name__, _is_transposed(owner)
            )
    if not scope:
        raise ValueError(f"scope={pattern!r} matches no parameter of {type(model).__name__}")
    return scope


def _role(
    name: str, parameter: torch.Tensor, block: str | None, modules: dict[str, nn.Module], model: nn.Module
) -> str:
    if block is None:
        return "other"
    owner_path = name.rpartition(".")[0]
    below = owner_path[len(block) + 1 :].split(".") if owner_path != block else []
    path = [modules[".".join([block, *below[: i + 1]])] for i in range(len(below))]
    if not path or not _is_matrix(path[-1], parameter) or _is_router(below, path, model):
        return "other"
    words = [*below, *(type(module).__name__ for module in path)]
    return "attention" if any(_ATTENTION.search(word) for word in words) else "mlp"


def _is_matrix(owner: nn.Module, parameter: torch.Tensor) -> bool:
    kind = type(owner).__name__
    if isinstance(owner, nn.Linear) or kind == "Conv1D" or kind.endswith("Linear"):
        return parameter.ndim == 2
    return parameter.ndim == 3 and "expert" in kind.lower()  # (experts, out, in)


def _is_transposed(owner: nn.Module) -> bool:
    """Whether a module stores its matrices as (in, out): GPT-2's Conv1D, the experts of gpt-oss and Llama 4.

    transformers says so of most experts; of the others the shapes tell: gate_up_proj has twice the inner
    width among its outputs, which are down_proj's inputs.
    """
    if type(owner).__name__ == "Conv1D":
        return True
    if isinstance(getattr(owner, "is_transposed", None), bool):
        return owner.is_transposed
    up, down = getattr(owner, "gate_up_proj", None), getattr(owner, "down_proj", None)
    if not (isinstance(up, torch.Tensor) and isinstance(down, torch.Tensor) and up.ndim == down.ndim == 3):
        return False
    return up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]


def _is_router(below: list[str], path: list[nn.Module], model: nn.Module) -> bool:
    if any(_ROUTER_CLASS.search(type(module).__name__) for module in path):
        return True
    if not _ROUTER_NAMES.intersection(below):
        return False
    config = getattr(model, "config", None)
    sizes = {1, *(getattr(config, key, None) for key in _EXPERT_COUNTS)}
    return path[-1].weight.shape[0] in sizes
