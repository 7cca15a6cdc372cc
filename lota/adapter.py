"""LoRA through peft, inside the training loop: which layers it adapts, its files, its weights merged for
saving.

LoRA (arXiv 2106.09685) leaves a weight W as it is and computes with W + (alpha / r) B A, where only A (r, in)
and B (out, r) train. peft puts a layer with both around each adapted one, inside the model that it is given;
that model stays what the loop, generation and checkpointing work with.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lota.checkpoint import saved_state
from lota.scope import find_scope

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = "adapter"  # beside policy.pt
logger = logging.getLogger(__name__)


def lora_targets(model: nn.Module, pattern: str | None = None, block_name: str | None = None) -> list[str]:
    """Paths of the linear layers whose weights lie in the scope (a meta-device model will do).

    What peft has no LoRA layer for (stacks of expert matrices, classes of a model's own) is left frozen, and
    logged. Raises ValueError when nothing is left to adapt.
    """
    modules = dict(model.named_modules())
    found, passed_over = [], {}
    for name, tensor in find_scope(model, pattern, block_name).items():
        path, _, key = name.rpartition(".")
        if key == "weight" and (isinstance(modules[path], nn.Linear) or _is_conv1d(modules[path])):
            found.append(path)
        elif len(tensor.shape) > 1:
            passed_over.setdefault(tensor.module_type, []).append(name)
    for kind, names in passed_over.items():
        logger.info("LoRA adapts linear layers only: %d of %s stay frozen (%s)", len(names), kind, names[0])
    if not found:
        raise ValueError(
            f"adapter=lora: {type(model).__name__} has no linear layer in the scope (model.scope={pattern})"
        )
    return found


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear map, its weight stored (in, out)


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
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(_is_conv1d(modules[path]) for path in targets),
    )
    with warnings.catch_warnings():  # a mixed model's nn.Linear layers get the right setting all the same
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return get_peft_model(model, settings)


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


def merged_state(model: nn.Module, dtype: torch.dtype, base: Any | None = None) -> dict[str, Tensor]:
    """policy.pt's `state`: the plain model's keys on the CPU in `dtype`, adapted weights merged.

    W + (alpha / r) B A is computed in fp32 on a copy: training weights keep every bit. base: a weight source from which W is
    read where the model holds it in less precision than `dtype`.
    """
    layers = lora_layers(model)

    def add_delta(name: str, value: Tensor) -> None:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            delta = layer.get_delta_weight(layer.active_adapters[0]).detach().to("cpu", torch.float32)
            value.copy_(value.float() + delta)

    state = {plain: tensor for plain, tensor in _plain(model.state_dict().items(), layers)}
    names = {p.data_ptr(): plain for plain, p in _plain(model.named_parameters(), layers)}
    return saved_state(state, names, dtype, add_delta, base)


def _plain(items: Iterable[tuple[str, Tensor]], layers: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The model's own tensors under the names that they had before LoRA; A and B are left out."""
    for name, tensor in items:
        path = next((path for path in layers if name.startswith(f"{path}.")), None)
        if path is None:
            yield name, tensor
        elif name.startswith(f"{path}.base_layer."):
            yield name.replace(".base_layer.", ".", 1), tensor


def save_adapter(adapter: PeftModel, folder: Path) -> None:
    """Write what `PeftModel.from_pretrained` loads: adapter_model.safetensors, adapter_config.json."""
    adapter.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card, empty of anything about the run


def load_adapter(adapter: PeftModel, folder: Path) -> None:
    """Restore A and B from `folder`, bit for bit. Raises ValueError when they are another adapter's."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    saved, own = load_file(file), get_peft_model_state_dict(adapter, save_embedding_layers=False)
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (saved, own)]
    if shapes[0] != shapes[1]:
        differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:3]
        raise ValueError(f"{file} holds another adapter than this run trains: {differing}")
    set_peft_model_state_dict(adapter, saved)
