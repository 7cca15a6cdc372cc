"""Which parameters a mask is chosen over: attention and MLP weights of the transformer blocks, found by role.

A parameter is in the default scope when it is the weight matrix of a linear map (`nn.Linear`, GPT-2's
`Conv1D`, a stack of expert matrices) inside a transformer block. Embeddings, output head, norms, biases and
MoE routers are outside.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lota.models.damaged import one_line, refuse_damaged_json
from lota.models.hub import refuse_absent
from lota.models.roles import (
    block_numbers,
    inside,
    is_linear_map,
    is_router,
    is_transposed,
    matrices,
    role_of,
    towers,
)
from lota.models.tensor_files import refuse_delta

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_LAYERS = 10_000  # a module of Python's is made for each
_WITH_TOWERS = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
SHARE = 0.9  # of the matrices; a scope that takes less says what it leaves out


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
    config = load_config(name_or_path)
    try:
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    except ValueError:  # of several text models, such as MusicGen's
        layers = None
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"{name_or_path}: its config.json asks for {layers:,} layers, which no model has")
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
        model.tie_weights()
    except Exception as error:
        raise ValueError(
            f"{name_or_path}: transformers makes no causal language model of its config.json: "
            f"{one_line(error)}"
        ) from error
    return model


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that makes a model of a config: of a causal LM, else of a text model with towers.

    Raises ValueError for one with towers that cannot continue a text without an image or a sound.
    """
    import transformers  # slow to import

    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM
    for name in _WITH_TOWERS:
        auto = getattr(transformers, name, None)  # the second one is new
        if auto is None or type(config) not in auto._model_mapping:
            continue
        if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
            raise ValueError(f"a model of type {config.model_type} has an encoder for its text")
        takes = inspect.signature(auto._model_mapping[type(config)].forward).parameters.values()
        needs = [p.name for p in takes if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if needs[1:] not in ([], ["input_ids"]):  # behind self
            raise ValueError(f"a model of type {config.model_type} computes nothing without {needs[1]}")
        return auto
    return transformers.AutoModelForCausalLM  # which says what it can make


def whole_model(config: PreTrainedConfig) -> PreTrainedModel | None:
    """The model with its towers, on the meta device, of a config whose causal LM is the text tower alone.

    None where the causal LM is all that there is. Such a checkpoint holds weights that the LM never loads.
    """
    import transformers  # slow to import

    mapping: Any = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping or mapping[type(config)].config_class is type(config):
        return None
    for name in _WITH_TOWERS:
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(config)
    return None


def transformer_blocks(model: nn.Module, block_name: str | None = None) -> list[tuple[str, nn.Module]]:
    """(prefix, block) of every transformer block of the text tower in order.

    block_name: class of the blocks; None finds them. Raises ValueError when there are none.
    """
    return [(prefix, model.get_submodule(prefix)) for prefix in layer_numbers(model, block_name)]


def layer_numbers(model: nn.Module, block_name: str | None = None) -> dict[str, int]:
    """Prefix of every transformer block -> number of its layer; see `transformer_blocks`."""
    if block_name is None:
        return block_numbers(model)
    named = [prefix for prefix, m in model.named_modules() if type(m).__name__ == block_name]
    if not named:
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        choices = dict.fromkeys(type(entry).__name__ for entries in lists for entry in entries)
        raise ValueError(
            f"block_name={block_name}: {type(model).__name__} has no module of this class;"
            f" use null (the blocks are found) or one of {', '.join(choices)}"
        )
    return {prefix: number for number, prefix in enumerate(named)}


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
        layers = layer_numbers(model, block_name)
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
            scope[name] = ScopedTensor(shape, role, layer, type(owner).__name__, is_transposed(owner))
    if not scope:
        raise ValueError(f"scope={pattern!r} matches no parameter of {type(model).__name__}")
    return scope


def frozen_towers(model: nn.Module, pattern: str | None = None) -> list[str]:
    """Parameters of towers for images and sound, which a text does not train; `pattern` can name some.

    pattern: as for `find_scope`.
    """
    elsewhere = towers(model)
    return [
        name
        for name, _ in model.named_parameters()
        if inside(name, elsewhere) and not (pattern and re.search(pattern, name))
    ]


def _role(
    name: str, parameter: Tensor, block: str | None, modules: dict[str, nn.Module], model: nn.Module
) -> str:
    if block is None:
        return "other"
    # names and modules between the block and the parameter: ["mlp", "up_proj"] and [LlamaMLP, Linear]
    owner_path, _, leaf = name.rpartition(".")
    below = owner_path[len(block) + 1 :].split(".") if owner_path != block else []
    path = [modules[".".join([block, *below[: i + 1]])] for i in range(len(below))]
    if not path or not is_linear_map(path[-1], leaf, parameter) or is_router(below, path, model):
        return "other"
    return role_of(below, path, [block.rpartition(".")[0].rpartition(".")[2], type(modules[block]).__name__])


@dataclass(frozen=True)
class ScopeShare:
    """How much of a model's matrices a scope takes; embeddings, output head and routers do not count."""

    taken: int  # entries of matrices in the scope
    total: int  # entries of all matrices
    left_out: tuple[tuple[str, int], ...]  # (name, with # for numbers, or tower; entries), the largest first

    @property
    def share(self) -> float:
        return self.taken / self.total if self.total else 1.0

    @property
    def largest(self) -> str:
        """The largest matrices left out, in words; "" if there are none."""
        return ", ".join(f"{name} ({entries:,} entries)" for name, entries in self.left_out[:3])


def share_sentence(share: float, largest: str, remedy: str | None) -> str:
    """What is said of a scope: its share of the matrices, and what it leaves out if that is much.

    largest: as in `ScopeShare`. remedy: what chooses other weights; None for a scope that somebody chose.
    """
    text = f"the scope takes {100 * share:.1f} % of the matrices outside embeddings, output head and routers"
    if share >= SHARE or remedy is None:
        return text
    return f"{text}; the largest left out are {largest}, and {remedy} chooses other weights"


def scope_share(model: nn.Module, scope: Iterable[str]) -> ScopeShare:
    """How much of the matrices of `model` (a meta-device model will do) the parameters of `scope` are.

    Matrices of the same name in every layer are one entry of `left_out`, as is a whole tower.
    """
    taken, total, chosen, other = 0, 0, set(scope), towers(model)
    left: Counter[str] = Counter()
    for name, parameter in matrices(model):
        total += parameter.numel()
        if name in chosen:
            taken += parameter.numel()
        else:
            tower = next((tower for tower in other if inside(name, [tower])), None)
            left[re.sub(r"\d+", "#", name) if tower is None else tower] += parameter.numel()
    return ScopeShare(taken, total, tuple(left.most_common()))
