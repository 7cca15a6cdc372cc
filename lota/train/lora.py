"""LoRA through peft, inside the training loop: which layers it adapts, its files, its weights merged for
saving.

LoRA (arXiv 2106.09685) leaves a weight W as it is and computes with W + (alpha / r) B A, where only A (r, in)
and B (out, r) train. peft puts a layer with both around each adapted one, inside the model that it is given;
that model stays what the loop, generation and checkpointing work with.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lota.config import Config
from lota.models.roles import is_conv1d
from lota.models.scope import find_scope
from lota.train.saved_model import SavedModel, Source, stored_value

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = "adapter"  # beside policy.pt


def lora_targets(
    model: nn.Module, pattern: str | None = None, block_name: str | None = None
) -> tuple[list[str], list[str]]:
    """(paths of the linear layers whose weights lie in the scope, names of scoped weights that stay frozen).

    The latter are what peft's LoRA layers do not fit: stacks of expert matrices, classes of a model's own.
    A meta-device model will do. Raises ValueError if there is no layer to adapt.
    """
    modules = dict(model.named_modules())
    found, frozen = [], []
    for name in find_scope(model, pattern, block_name):
        path, _, key = name.rpartition(".")
        adaptable = isinstance(modules[path], nn.Linear) or is_conv1d(modules[path])
        if adaptable and key == "weight":
            found.append(path)
        else:
            frozen.append(name)
    if not found:
        raise ValueError(
            f"adapter=lora: {type(model).__name__} has no linear layer in the scope (model.scope={pattern})"
        )
    return found, frozen


def refuse_rank(rank: int, model: nn.Module, targets: Iterable[str]) -> None:
    """Raise ValueError for a rank that no matrix of the layers at `targets` can have."""
    most = max(min(model.get_submodule(path).get_parameter("weight").shape) for path in targets)
    if rank > most:
        raise ValueError(
            f"lora_rank={rank}: no adapted matrix of this model has a rank above {most}; choose at most "
            "that, or train the weights themselves (adapter=none)"
        )


def add_lora(
    model: nn.Module, targets: Iterable[str], *, rank: int, alpha: float, dropout: float
) -> PeftModel:
    """Adapt the layers at `targets` inside `model`; returns peft's wrapper, which its files go through.

    Only A and B require a gradient afterwards, both fp32. A is drawn from torch's global generator, B is 0:
    at first the model computes what it did.
    """
    from peft import LoraConfig, get_peft_model

    targets = list(targets)
    modules = dict(model.named_modules())
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared int; peft divides it by the rank
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(is_conv1d(modules[path]) for path in targets),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft sets it right itself
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, settings)


def adapt(model: nn.Module, config: Config, checkpoint: Path | None = None) -> PeftModel | None:
    """The adapter of a run, put into `model`; None with adapter=none. checkpoint: of a continued run."""
    if config.adapter.name == "none":
        return None
    targets, _ = lora_targets(model, config.model.scope, config.model.block_name)
    adapter = add_lora(
        model, targets, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout
    )
    if checkpoint is not None:
        restore(adapter, checkpoint)
    return adapter


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> peft's layer around each adapted one."""
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model as it was before LoRA, within the block: DPO's reference without a second model."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def saved_model(model: nn.Module, dtype: torch.dtype, base: Source | None = None) -> SavedModel:
    """What a checkpoint stores: the plain model's keys in `dtype`, adapted weights merged.

    W + (alpha / r) B A is computed in fp32 on a copy: training weights keep every bit. base: weights from
    which W is read if the model holds it in less precision than `dtype`.
    """
    layers = lora_layers(model)
    parameters = dict(_plain(model.named_parameters(), layers))

    def value_of(name: str) -> Tensor:
        value = stored_value(name, parameters[name], dtype, base)
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            delta = layer.get_delta_weight(layer.active_adapters[0]).detach().to("cpu", torch.float32)
            value.copy_(value.float() + delta)
        return value

    state = dict(_plain(model.state_dict(keep_vars=True).items(), layers))
    return SavedModel(state, parameters, dtype, value_of)


def _plain(items: Iterable[tuple[str, Tensor]], layers: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The model's own tensors under the names that they had before LoRA; A and B are left out."""
    for name, tensor in items:
        path = next((path for path in layers if name.startswith(f"{path}.")), None)
        if path is None:
            yield name, tensor
        elif name.startswith(f"{path}.base_layer."):
            yield name.replace(".base_layer.", ".", 1), tensor


def save(adapter: PeftModel | None, checkpoint: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which `PeftModel.from_pretrained` loads, into
    a folder of the checkpoint; nothing without an adapter.
    """
    if adapter is None:
        return
    folder = checkpoint / FOLDER
    adapter.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card, empty of anything about the run


def restore(adapter: PeftModel, checkpoint: Path) -> None:
    """Set A and B to what `save` wrote, bit for bit. Raises ValueError if they are another adapter's."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = checkpoint / FOLDER / "adapter_model.safetensors"
    saved, own = load_file(file), get_peft_model_state_dict(adapter, save_embedding_layers=False)
    there, here = ({(name, t.shape) for name, t in state.items()} for state in (saved, own))
    if there != here:
        raise ValueError(f"{file} holds another adapter than this run trains: {sorted(there ^ here)[:3]}")
    set_peft_model_state_dict(adapter, saved)
