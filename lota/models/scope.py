"""Which parameters a mask is chosen over: attention and MLP weights of the transformer blocks, found by role.

A parameter is in the default scope when it is the weight matrix of a linear map (`nn.Linear`, GPT-2's
`Conv1D`, a stack of expert matrices) inside a transformer block. Embeddings, output head, norms, biases and
MoE routers are outside.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lota.models.damaged import one_line, refuse_damaged_json
from lota.models.hub import refuse_absent
from lota.models.tensor_files import refuse_delta

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ATTENTION = re.compile(r"attn|attention|deltanet|mamba", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"router|gating", re.IGNORECASE)
_ROUTER_NAMES = {"router", "gate", "shared_expert_gate"}
MOST_LAYERS = 10_000  # a module of Python's is made for each
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ScopedTensor:
    """A parameter of the scope."""

    shape: tuple[int, ...]
    role: str  # attention, mlp, or other if a pattern chose it
    layer: int | None  # index of its transformer block, None outside
    module_type: str  # class name of the module that holds it
    transposed: bool = False  # matrices are stored (in, out) instead of (out, in)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The model's config. Raises ValueError for a folder or hub id that has none, or a damaged one."""
    from transformers import AutoConfig  # slow to import

    refuse_no_model(name_or_path)
    folder = Path(name_or_path).expanduser()
    try:
        return AutoConfig.from_pretrained(str(name_or_path))
    except Exception as error:  # its checks of values raise exceptions of their own kinds
        refuse_damaged_json(folder, ["config.json"])
        if (folder / "config.json").is_file():
            raise ValueError(
                f"{folder / 'config.json'} is refused by transformers: {one_line(error)}"
            ) from error
        raise ValueError(
            f"no causal language model at {name_or_path}: give a folder with config.json and weights, or a "
            f"hub id that this machine can reach. Cause: {one_line(error)}"
        ) from error


def refuse_no_model(name_or_path: str | Path) -> None:
    """Raise ValueError for a path where nothing is, a checkpoint that is not converted, or an adapter."""
    refuse_absent(name_or_path)
    folder = Path(name_or_path).expanduser()
    policy = folder if folder.is_file() else folder / "policy.pt"
    if not policy.is_file() and (folder / "config.yaml").is_file():  # a run: the last of its checkpoints
        policy = max(folder.glob("*-*/policy.pt"), key=lambda path: path.stat().st_mtime_ns, default=policy)
    if policy.is_file() and not (folder / "config.json").is_file():
        refuse_delta(policy)
        raise ValueError(
            f"{name_or_path} holds a policy.pt and no model with a config: convert it first, with "
            f"convert_policy_to_hf_resize.py --model_path BASE --policy_path {policy} --save_path "
            f"{policy.parent}"
        )
    if (folder / "adapter_config.json").is_file():  # transformers would load the base that it names
        raise ValueError(
            f"{name_or_path} holds a PEFT adapter (adapter_config.json), which changes another model: merge "
            "it into its base first (peft: merge_and_unload, then save_pretrained)"
        )


def meta_model(name_or_path: str | Path) -> PreTrainedModel:
    """The causal LM of a Hugging Face folder or hub id on the meta device: names, shapes, no memory.

    Raises ValueError for what has no config, or one that no causal LM can be made of.
    """
    from transformers import AutoModelForCausalLM  # slow to import

    config = load_config(name_or_path)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"{name_or_path}: its config.json asks for {layers:,} layers, which no model has")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except Exception as error:
        raise ValueError(
            f"{name_or_path}: transformers makes no causal language model of its config.json: "
            f"{one_line(error)}"
        ) from error
    return model


def transformer_blocks(model: nn.Module, block_name: str | None = None) -> list[tuple[str, nn.Module]]:
    """(prefix, block) of every transformer block in order.

    block_name: class of the blocks; None takes the module list that holds the most parameters.
    Raises ValueError when there are none.
    """
    lists = [(prefix, m) for prefix, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if block_name is not None:
        named = [(prefix, m) for prefix, m in model.named_modules() if type(m).__name__ == block_name]
        if not named:
            choices = dict.fromkeys(type(entry).__name__ for _, entries in lists for entry in entries)
            raise ValueError(
                f"block_name={block_name}: {type(model).__name__} has no module of this class;"
                f" use null (the blocks are found) or one of {', '.join(choices)}"
            )
        return named
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks; give scope as a regular expression"
        )
    prefix, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{prefix}.{index}", block) for index, block in enumerate(blocks)]


def find_scope(
    model: nn.Module, pattern: str | None = None, block_name: str | None = None
) -> dict[str, ScopedTensor]:
    """Parameters that masks are chosen over, in the order of `named_parameters()`.

    pattern: regular expression searched in the parameter's name instead of the default rule.
    block_name: class of the transformer blocks; None finds them.
    Raises ValueError for a pattern that does not compile or matches nothing, or a model without such weights.
    """
    try:
        regex = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise ValueError(f"scope={pattern!r} is not a regular expression: {error}") from error
    modules = dict(model.named_modules())
    try:
        layers = {prefix: i for i, (prefix, _) in enumerate(transformer_blocks(model, block_name))}
    except ValueError:
        if regex is None or block_name is not None:
            raise
        layers = {}  # a pattern needs no blocks
    scope = {}
    for name, parameter in model.named_parameters():
        block = next((b for b in layers if name.startswith(b + ".")), None)
        role = _role(name, parameter, block, modules, model)
        if (role != "other") if regex is None else regex.search(name):
            owner = modules[name.rpartition(".")[0]]
            layer = None if block is None else layers[block]
            shape = tuple(parameter.shape)
            scope[name] = ScopedTensor(shape, role, layer, type(owner).__name__, _is_transposed(owner))
    if not scope:
        raise ValueError(f"scope={pattern!r} matches no parameter of {type(model).__name__}")
    return scope


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear map, its weight stored (in, out); by its name, without transformers."""
    if type(module).__name__ != "Conv1D":
        return False
    return isinstance(module.weight, Tensor) and module.weight.ndim == 2 and module.bias is not None


def _role(
    name: str, parameter: Tensor, block: str | None, modules: dict[str, nn.Module], model: nn.Module
) -> str:
    if block is None:
        return "other"
    # names and modules between the block and the parameter: ["mlp", "up_proj"] and [LlamaMLP, Linear]
    owner_path = name.rpartition(".")[0]
    below = owner_path[len(block) + 1 :].split(".") if owner_path != block else []
    path = [modules[".".join([block, *below[: i + 1]])] for i in range(len(below))]
    if not path or not _is_matrix(path[-1], parameter) or _is_router(below, path, model):
        return "other"
    words = [*below, *(type(module).__name__ for module in path)]  # either may say "attention"
    return "attention" if any(_ATTENTION.search(word) for word in words) else "mlp"


def _is_matrix(owner: nn.Module, parameter: Tensor) -> bool:
    kind = type(owner).__name__
    if isinstance(owner, nn.Linear) or is_conv1d(owner) or kind.endswith("Linear"):
        return parameter.ndim == 2
    return parameter.ndim == 3 and "expert" in kind.lower()  # (experts, out, in)


def _is_transposed(owner: nn.Module) -> bool:
    """Whether a module stores its matrices as (in, out): GPT-2's Conv1D, the experts of gpt-oss and Llama 4.

    transformers says so of most experts; of the others the shapes tell: gate_up_proj has twice the inner
    width among its outputs, which are down_proj's inputs.
    """
    if is_conv1d(owner):
        return True
    stated = getattr(owner, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    # stored (experts, in, out): up (experts, hidden, 2 inner), down (experts, inner, hidden)
    up, down = getattr(owner, "gate_up_proj", None), getattr(owner, "down_proj", None)
    if not (isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 3):
        return False
    return up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]


def _is_router(below: list[str], path: list[nn.Module], model: nn.Module) -> bool:
    if any(_ROUTER_CLASS.search(type(module).__name__) for module in path):
        return True
    if not _ROUTER_NAMES.intersection(below):
        return False
    # a layer called "gate" is a router if it has an output per expert, or one for the shared expert
    config = getattr(model, "config", None)
    sizes = {1, *(getattr(config, key, None) for key in _EXPERT_COUNTS)}
    return path[-1].get_parameter("weight").shape[0] in sizes
