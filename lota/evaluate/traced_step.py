"""A decoding step recorded once and replayed without Python: for small models on a CPU half the time.

Recording fixes every decision that Python takes in the model's forward pass; so it is done for architectures
known to take none that depends on the data, and its result is checked at other sizes before it is used.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from lota.evaluate.kv_cache import RoomyLayer

logger = logging.getLogger(__name__)
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")
FIXED_ROPES = ("default", "linear", "llama3")  # others change with the length
TRACE_AFTER = 64  # steps of a call to `generate`: recording takes as long as about twice so many


class TracedStep:
    """Decides whether a model's steps are recorded, and replays them; for one call to `generate`."""

    def __init__(self, model) -> None:
        self.model, self.steps = model, 0
        self.possible = _traceable(model)
        self.replay: torch.jit.ScriptModule | None = None

    def ready(self, cache: object) -> bool:
        """Whether the next step is one to replay; counts the steps."""
        self.steps += 1
        return (
            self.possible
            and self.steps > TRACE_AFTER
            and all(type(layer) is RoomyLayer for layer in getattr(cache, "layers", None) or [None])
        )

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache) -> Tensor:
        """Scores after one more token per row: (rows, vocabulary), fp32; its keys and values join the cache.

        ids, positions: (rows, 1); mask: (rows, tokens), 1 for tokens that count.
        """
        dtype = self.model.dtype
        shut = torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask == 0, torch.finfo(dtype).min)
        stored = [tensor for layer in cache.layers for tensor in layer.open_slot()]
        inputs = (ids, shut[:, None, None], positions, *stored)
        if self.replay is None and self.possible:
            self._record(inputs)
        return self.replay(*inputs) if self.replay is not None else _Step(self.model)(*inputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        step = _Step(self.model)
        try:
            with warnings.catch_warnings(), _quiet_transformers():
                warnings.simplefilter("ignore")  # deprecated, with no successor that needs no compiler
                replay = torch.jit.trace(step, inputs, check_trace=False)
                same = all(_agree(replay, step, other) for other in _other_sizes(inputs))
        except Exception as error:  # whatever a model's code does under the recorder: it works without
            logger.debug("steps are not recorded: %s", error)
            same = False
        self.possible, self.replay = same, replay if same else None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """The recorder reads every attribute of a model; some remark on that."""
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


class _Step(nn.Module):
    """A model's forward pass for one token, from and to plain tensors."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *stored: Tensor) -> Tensor:
        cache = DynamicCache()
        cache.layers = [_Slot(k, v) for k, v in zip(stored[::2], stored[1::2], strict=True)]
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].float()


class _Slot(DynamicLayer):
    """A layer whose last column is for the token of this step."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] - 1


def _other_sizes(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Copies with other numbers of rows, and tokens; copies, because a step writes into the cache."""
    ids, mask, positions, *stored = inputs
    fewer = [tensor[:1].clone() for tensor in inputs]
    shorter = [ids, mask[..., 1:], positions, *(tensor[:, :, 1:].clone() for tensor in stored)]
    more = [torch.cat([tensor, tensor]) for tensor in inputs]
    return [tuple(fewer), tuple(shorter), tuple(more)]


def _agree(replay: nn.Module, step: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    return torch.allclose(replay(*inputs), step(*inputs), rtol=1e-4, atol=1e-4)


def _traceable(model) -> bool:
    """A known architecture on a CPU, as transformers built it: no hooks, no modules of others inside."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ARCHITECTURES or type(model).__module__ != f"transformers.models.{kind}.modeling_{kind}":
        return False
    rope = getattr(model.config, "rope_parameters", None) or {}
    return (
        model.device.type == "cpu"
        and model.config._attn_implementation == "sdpa"
        and rope.get("rope_type", "default") in FIXED_ROPES
        and all(_untouched(module) for module in model.modules())
    )


def _untouched(module: nn.Module) -> bool:
    return (
        type(module).__module__.startswith(("torch.nn.modules.", "transformers."))
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )
