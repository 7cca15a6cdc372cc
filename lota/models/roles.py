"""What parts of a model are: linear maps, routers, towers for images and sound, stacks of transformer blocks.

Found by structure and by the words with which modules are named, so that a new family needs no line here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_ATTENTION = re.compile(r"attn|attention|deltanet|mamba", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|moe|intermediate", re.IGNORECASE)
# What mixes positions where other blocks attend: state spaces, recurrences, short convolutions.
_MIXER = re.compile(r"mixer|recurrent|lstm|rglru|rg_lru|ssm|conv", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"router|gating$", re.IGNORECASE)  # MoshiGatingMLP is none
_ROUTER_NAMES = {"router", "gate", "shared_expert_gate"}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOWER = re.compile(r"vision|visual|image|img|video|audio|speech|acoustic|vq_?(model|vae)", re.IGNORECASE)
# Parameters of modules that are no linear layers: a projection, by its own name, or one letter as XLNet's q.
_PROJECTION = re.compile(r"(proj|projection|weight|gate)$|^[a-z]$")
_NO_MAP_CLASS = re.compile(r"conv|norm|embed|position|router|gating$", re.IGNORECASE)
# What has two dimensions and is added or multiplied entry by entry: biases, scales, state-space tables.
_TABLE = re.compile(r"bias|_log$|^D$|emb|scale|mix", re.IGNORECASE)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear map, its weight stored (in, out); by its name, without transformers."""
    if type(module).__name__ != "Conv1D":
        return False
    return isinstance(module.weight, Tensor) and module.weight.ndim == 2 and module.bias is not None


def is_linear_map(owner: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter is the matrix of a linear map, or a stack of such: (stack, out, in).

    owner: the module that holds it; name: its name there.
    """
    kind = type(owner).__name__
    if isinstance(owner, nn.Linear) or is_conv1d(owner):
        return parameter.ndim == 2
    if isinstance(owner, _ConvNd | nn.Embedding) or _TABLE.search(name) or parameter.ndim not in (2, 3):
        return False
    if kind.endswith("Linear") or "expert" in kind.lower():
        return True
    return not _NO_MAP_CLASS.search(kind) and _PROJECTION.search(name) is not None


def is_transposed(owner: nn.Module) -> bool:
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


def role_of(below: list[str], path: list[nn.Module], block: list[str]) -> str:
    """`attention` or `mlp`: what a linear map inside a block serves.

    below, path: names and modules between the block and the parameter, e.g. ["mlp", "up_proj"] and
    [LlamaMLP, Linear]. block: name of the block's list and class, which tell where these do not: XLM's
    blocks are attentions and MLPs. A state-space or recurrent mixer stands where attention would.
    """
    kinds = [type(module).__name__ for module in path]  # ZambaAttentionDecoderLayer holds an MLP too
    words = [*below, *(kind for kind in kinds if not kind.endswith("DecoderLayer"))]  # either may tell
    for said in (words, block):
        for pattern, role in ((_ATTENTION, "attention"), (_MLP, "mlp"), (_MIXER, "attention")):
            if any(pattern.search(word) for word in said):
                return role
    return "mlp"


def is_router(below: list[str], path: list[nn.Module], model: nn.Module) -> bool:
    """Whether a linear map chooses experts. below, path: as for `role_of`."""
    if any(_ROUTER_CLASS.search(type(module).__name__) for module in path):
        return True
    if not _ROUTER_NAMES.intersection(below):
        return False
    # a layer called "gate" is a router if it has an output per expert, or one for the shared expert
    config: Any = getattr(model, "config", None)
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    sizes = {1, *(getattr(c, key, None) for c in configs for key in _EXPERT_COUNTS)}
    weight = getattr(path[-1], "weight", None)
    return isinstance(weight, Tensor) and weight.shape[0] in sizes


def towers(model: nn.Module) -> list[str]:
    """Names of the outermost modules for images and sound; none of them holds the token embedding."""
    text, found = _homes_of(model, "get_input_embeddings"), list[str]()
    for name, module in model.named_modules():
        if not name or name in text or inside(name, found):
            continue
        modalities = getattr(module, "input_modalities", "text")  # transformers says it of nested models
        says = [modalities] if isinstance(modalities, str) else list(modalities or ["text"])
        if "text" not in says or _TOWER.search(name.rpartition(".")[2]):
            found.append(name)
    return found


def inside(name: str, modules: list[str]) -> bool:
    """Whether a module or parameter is one of these modules or in one of them; "" holds everything."""
    return any(not module or name == module or name.startswith(f"{module}.") for module in modules)


def head_and_embeddings(model: nn.Module) -> list[str]:
    """Names of the modules of the output head and of the token embedding, projections of the head included.

    The head is the largest module that holds the output embedding and no token embedding.
    """
    inputs, outputs = (_homes_of(model, f"get_{side}_embeddings") for side in ("input", "output"))
    head = [name for name in outputs if name not in inputs]
    return [*inputs[-1:], *head[:1]]


def _homes_of(model: nn.Module, getter: str) -> list[str]:
    """Names of the modules that hold an embedding layer, outermost first, its own name last."""
    try:
        layer = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # no transformers model, or one without the layer
        return []
    name = next((name for name, module in model.named_modules() if module is layer), None)
    if name is None:
        return []
    parts = name.split(".")
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def block_numbers(model: nn.Module) -> dict[str, int]:
    """Name of every transformer block of the text tower -> number of its layer, in the order of modules.

    The tower is the whole model; beside towers for images or sound, and what connects them, it is the
    smallest module with the token embedding and the largest list of modules. Its lists of blocks count one
    after the other; lists side by side of one length hold the parts of the same layers.
    Raises ValueError when there are none.
    """
    elsewhere = towers(model)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not inside(name, elsewhere)
    }
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks; give scope as a regular expression"
        )
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    homes = [home for home in _homes_of(model, "get_input_embeddings") if inside(largest, [home])]
    tower = homes[-1:] if elsewhere else [""]
    outermost: list[str] = []
    for name in lists:
        if name != largest and (not inside(name, tower) or inside(name, outermost)):
            continue
        outermost.append(name)
    stacks = {(_parent(name), len(lists[name])) for name in outermost if _holds_maps(lists[name])}
    numbers: dict[str, int] = {}
    first: dict[tuple[str, int], int] = {}  # stack -> number of its first layer
    for name in outermost:
        stack = (_parent(name), len(lists[name]))
        if stack in stacks:
            start = first.setdefault(stack, 1 + max(numbers.values(), default=-1))
            numbers |= {f"{name}.{i}": start + i for i in range(len(lists[name]))}
    return numbers or {f"{largest}.{i}": i for i in range(len(lists[largest]))}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _holds_maps(entries: nn.ModuleList) -> bool:
    """Whether there are linear maps inside the entries, so that these are blocks and not layers."""
    return any(
        name and is_linear_map(module, leaf, parameter)
        for entry in entries
        for name, module in entry.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    )


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every matrix or stack of matrices outside embeddings, output head and routers.

    Kernels of convolutions, and tables that are added or multiplied entry by entry, are none.
    """
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    outside = head_and_embeddings(model)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = modules[path]
        if math.prod(sorted(parameter.shape)[:-1]) == 1 or inside(path, outside):
            continue  # a vector, whatever its dimensions
        if isinstance(owner, nn.Embedding | _ConvNd) or _TABLE.search(leaf):
            continue
        if not isinstance(owner, nn.Linear) and _NO_MAP_CLASS.search(type(owner).__name__):
            continue
        below = path.split(".")
        parents = [modules[".".join(below[: i + 1])] for i in range(len(below))]
        if not is_router(below, parents, model):
            yield name, parameter
