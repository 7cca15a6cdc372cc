"""One optimizer step of a run and an evaluation, traced on fake tensors through the run's own code.

The model is that of its config, with weights that have shapes and no values; optimizer, losses, reference
and LoRA are the trainer's. A tensor of the device's memory lies on the fake CPU, and `stand_ins.py` chooses
what a GPU would do.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lota.config import Config
from lota.data.batches import Batch
from lota.masks.extract.importance import Listed
from lota.models import head
from lota.models.head_logps import After, HeadLogProbs
from lota.models.loading import dtype_of, enable_activation_checkpointing, turn_dropout_off
from lota.models.scope import frozen_towers, transformer_blocks
from lota.optim.fused import fuse_in_backward
from lota.optim.masked import MaskedOptimizer
from lota.optim.optimizers import OPTIMIZERS
from lota.plan.sizes import Sizes
from lota.plan.stand_ins import OPERATIONS, Buckets, Parts, without_data
from lota.plan.tracker import Segment, Tracker
from lota.train import lora
from lota.train.loaded_run import LoadedRun
from lota.train.objectives import OBJECTIVES, Objective, PreferenceObjective
from lota.train.reference import ModelReference, SwappedReference

PASSES = 2  # of an accumulation that are traced: from the second one on, all but the last are alike


class TracedRun(LoadedRun):
    """A run whose model has no values. device: `cpu` or `cuda`, what the run would be on."""

    second: PreTrainedModel | None  # of the loss

    def __init__(self, config: Config, model: PreTrainedModel, sizes: Sizes | None):
        self.config, self.device, self.model = config, torch.device("cpu"), model
        self.data = cast(Any, SimpleNamespace(mask=sizes, resumable=None))
        turn_dropout_off(model)
        for name in frozen_towers(model, config.model.scope):
            model.get_parameter(name).requires_grad_(False)
        self.blocks = [block for _, block in transformer_blocks(model, config.model.block_name)]
        self.dtypes = dict.fromkeys(model.parameters(), self.working_dtype)  # LoRA's own stay in fp32
        self.second = _second_model(config, sizes, model)
        self.lora = lora.adapt(model, config)
        self.passes = min(config.gradient_accumulation_steps, PASSES)

    def base(self) -> Any:
        """The weights on disk, of the dtype that the config names."""
        stored = self.model.config.get_text_config().dtype
        dtype = stored if isinstance(stored, torch.dtype) else torch.float32
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        return SimpleNamespace(read=lambda name: torch.empty(shapes[name], dtype=dtype))

    def pull(self) -> None:
        counts = {name: self.optimizer.kept[p].count for p, name in self.optimizer.names.items()}
        values = {name: torch.empty(count) for name, count in counts.items()} if self.config.ewc else {}
        self.data.importance = Listed(values, None)
        super().pull()

    def fill(self, tracker: Tracker, peers: bool) -> None:
        """What `LoadedRun.load` does, with fake weights. peers: whether there are other processes."""
        with tracker.making("weights"):
            _fill(self.model, self.dtypes)
            _presume_head(self.model)
        tracker.mark("optimizer")
        with tracker.making("state"):
            rule, settings = OPTIMIZERS[self.config.optimizer], self.config.optimizer_settings
            self.optimizer = rule(self.model, cast(Any, self.data.mask), **settings)
            if self.config.activation_checkpointing:
                enable_activation_checkpointing(self.model)
            self.model.train()
            fuse_in_backward(self.optimizer, self.passes)
            self.pull()
        if peers:
            with tracker.making("gradients"):
                whole = self.config.trainer.name == "BasicTrainer"
                self.optimizer.peers = Buckets(self.optimizer) if whole else Parts()
        _label_gradients(self.optimizer, tracker)
        with tracker.making("reference"):
            self.objective = _objective(self)

    def take_step(self, tracker: Tracker, rows: int, length: int) -> None:
        """An optimizer step, in passes of `rows` examples."""
        for number in range(self.passes):
            tracker.mark("forward", number)
            losses, _ = self.objective.losses(_batch(self.config, rows, length))
            loss = losses.sum() / self.config.batch_size
            del losses
            tracker.mark("backward", number)
            tracker.in_backward = True
            loss.backward()
            tracker.in_backward = False
            del loss
        tracker.mark("step")
        with tracker.making("temporary"):
            self.optimizer.step()
        tracker.mark("idle")

    def evaluate_once(self, tracker: Tracker, length: int) -> None:
        self.model.eval()
        tracker.mark("evaluate")
        with torch.no_grad():
            self.objective.losses(_batch(self.config, self.config.eval_batch_size, length))

    @torch.no_grad()
    def save_once(self, tracker: Tracker) -> None:
        """What `Trainer.save` looks at, and what it writes, tensor by tensor."""
        tracker.mark("save")
        with tracker.making("saved"):
            for p in self.optimizer.names:
                self.optimizer.exact_values(p).isfinite().all()
            saved = self.saved_model()
            for name in saved.parameters():
                saved.whole(name)
        tracker.mark("end")


@dataclass
class Traced:
    """What tracing a run has found."""

    segments: list[Segment]
    state_bytes: int  # of the optimizer: positions, masters, averages
    trained: int  # entries that train
    tensors: int  # that have such entries


def trace(
    config: Config,
    model: PreTrainedModel,
    sizes: Sizes | None,
    *,
    device: str,
    rows: int,
    length: int,
    peers: bool = False,
) -> Traced:
    """Load, one optimizer step and an evaluation of a run.

    model: on the meta device; it is filled with fake weights. device: `cpu` or `cuda`, what the run would be
    on. rows: examples of one backward pass. length: tokens of each row; all of them count in the loss, and
    some rows are padded. peers: see `TracedRun.fill`.
    Raises what torch raises for a model whose computation depends on data in a way that is not known here.
    """
    run, tracker = TracedRun(config, model, sizes), Tracker(OPERATIONS)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, without_data(device), _labelled(tracker):
        run.fill(tracker, peers)
        with _marked_blocks(tracker, run.blocks):
            run.take_step(tracker, rows, length)
            run.evaluate_once(tracker, length)
            run.save_once(tracker)
        optimizer = run.optimizer
        return Traced(tracker.segments, optimizer.state_bytes(), optimizer.n_trained, len(optimizer.names))


# The model


def cut_to(model: PreTrainedModel, n: int, block_name: str | None = None) -> PreTrainedModel:
    """A copy of a meta model with its first n blocks."""
    model = copy.deepcopy(model)
    prefixes = [prefix for prefix, _ in transformer_blocks(model, block_name)]
    blocks = model.get_submodule(prefixes[0].rpartition(".")[0])
    for prefix in prefixes[n:]:
        del blocks._modules[prefix.rpartition(".")[2]]
    return model


def _fill(model: PreTrainedModel, dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Give a meta model fake weights and buffers. dtypes: of the weights, if not their own. Ties stay."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if p not in made:
                    made[p] = nn.Parameter(
                        torch.empty(p.shape, dtype=dtypes.get(p, p.dtype)), p.requires_grad
                    )
                module._parameters[name] = made[p]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, value in vars(module).items():  # rotary embeddings hold their first frequencies so
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype))


def _presume_head(model: PreTrainedModel) -> None:
    """All families that docs/MODELS.md lists have a head that is replaced; some cap the logits."""
    config = model.config.get_text_config()
    head.presume_head(model, After(cap=getattr(config, "final_logit_softcapping", None)))


def _reference_kind(config: Config, compact: bool) -> str:
    """As `make_reference` chooses. compact: whether a mask or LoRA trains."""
    own = config.model.reference_archive is None
    return config.model.reference or ("swap" if own and compact else "model")


def _second_model(config: Config, sizes: Sizes | None, model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy of the meta model, if the reference of the loss is one."""
    needed = config.loss.on_preferences and not config.loss.reference_free
    compact = sizes is not None or config.adapter.name == "lora"
    if not needed or _reference_kind(config, compact) != "model":
        return None
    return copy.deepcopy(model).requires_grad_(False)


def _objective(run: TracedRun) -> Objective:
    """The run's objective, with its reference."""
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0, unk_token_id=0)
    objective = OBJECTIVES[run.config.loss.name](run.config, tokenizer, run.model, run.precision)
    if isinstance(objective, PreferenceObjective) and not run.config.loss.reference_free:
        objective.reference = _reference(run, objective)
    return objective


def _reference(run: TracedRun, objective: PreferenceObjective) -> Any:
    if run.second is None:
        if run.config.model.reference == "precomputed":
            return lambda batch: torch.zeros(len(batch))
        return SwappedReference(cast(Any, run), objective)
    name = run.config.model.reference_dtype
    dtype = run.working_dtype if name is None else dtype_of(name)
    _fill(run.second, dict.fromkeys(run.second.parameters(), dtype))
    _presume_head(run.second)
    reference = ModelReference.__new__(ModelReference)  # which would load one
    reference.model, reference.precision = run.second, run.precision
    return reference


def _batch(config: Config, examples: int, length: int) -> Batch:
    """Rows of tokens that all count, as the objective gets them."""
    rows = examples * (2 if config.loss.on_preferences else 1)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    kind = _Unpadded if config.packing else Batch
    return kind(ids, torch.ones_like(ids), torch.zeros_like(ids), rows * length)


class _Unpadded(Batch):
    """Packed rows attend as rows without padding do."""

    @property
    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "use_cache": False}


# Where the step is, and what its tensors are


@contextlib.contextmanager
def _marked_blocks(tracker: Tracker, blocks: list[nn.Module]) -> Iterator[None]:
    """Mark where each block's forward and backward pass begins, and where the last forward pass ends."""
    last = len(blocks) - 1
    handles = []
    for number, block in enumerate(blocks):
        place = "first" if number == 0 else "last" if number == last else "middle"

        def before(_: nn.Module, __: Any, place: str = place) -> None:
            if not tracker.in_backward:
                tracker.mark(tracker.segments[-1].name[0], "block", place)

        def after(_: nn.Module, __: Any, output: Any, place: str = place) -> None:
            if tracker.in_backward:
                return
            if place == "last":
                tracker.mark(tracker.segments[-1].name[0], "head")
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: tracker.mark("backward", "block", place))

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _labelled(tracker: Tracker) -> Iterator[None]:
    """What the head makes beside its results is called logits."""
    originals = {name: vars(HeadLogProbs)[name] for name in ("forward", "backward")}

    def labelled(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            with tracker.making("logits"):
                return original(*arguments)

        return function

    for name, original in originals.items():
        setattr(HeadLogProbs, name, staticmethod(labelled(original.__func__)))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(HeadLogProbs, name, original)


def _label_gradients(optimizer: MaskedOptimizer, tracker: Tracker) -> None:
    """The gradients of weights are called so once the optimizer has them."""
    accumulate, put_aside = optimizer.accumulate, optimizer.put_aside

    def accumulated(p: nn.Parameter, grad: Tensor, squares: Tensor | None = None) -> None:
        tracker.count(grad, "gradients")
        accumulate(p, grad, squares)

    def aside(p: nn.Parameter, grad: Tensor) -> None:
        tracker.count(grad, "gradients")
        put_aside(p, grad)

    optimizer.accumulate, optimizer.put_aside = accumulated, aside  # type: ignore[method-assign]
