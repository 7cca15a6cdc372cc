"""What one process of a run needs: memory by phase, files, bytes that it sends."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from lota.config import Config
from lota.config_checks import dense_problem
from lota.models.damaged import one_line
from lota.models.loading import dtype_of
from lota.models.scope import layer_numbers
from lota.plan import shared
from lota.plan import sizes as entry_sizes
from lota.plan.sizes import Sizes
from lota.plan.trace import Traced, cut_to, trace
from lota.plan.tracker import Segment
from lota.share.delta.cli import entropy_bits

PHASES = ("load", "forward", "backward", "step", "evaluate", "save")
CUTS = (2, 3)  # blocks that are traced of a model of more


@dataclass
class Memory:
    """Live bytes of tensors at a peak."""

    peak: int
    parts: Counter[str]  # kind -> bytes


@dataclass(frozen=True)
class Setup:
    """What a plan is for, beside the run's settings."""

    device: str = "cuda"  # or cpu
    processes: int = 1
    length: int | None = None  # tokens of each example; None: max_length
    sparsity: float | None = None  # of a mask that is not there yet
    whole: bool = False  # trace every block, where two and three would do


@dataclass
class Prediction:
    """Of one process. All numbers are bytes, if not said otherwise."""

    phases: dict[str, Memory]  # on the device
    host: int  # most that the main memory holds beside a GPU: the copy that is saved
    trained: int  # entries
    blocks: str  # which were traced
    disk: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)  # per optimizer step

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].peak)

    @property
    def peak(self) -> Memory:
        return self.phases[self.peak_phase]


def predict(config: Config, skeleton: PreTrainedModel, setup: Setup) -> Prediction:
    """Trace the run and multiply its blocks; add what is arithmetic. skeleton: on the meta device.

    Raises ValueError for a mask of another model, for dense training of replicas, and for a model that cannot
    be traced.
    """
    sizes = entry_sizes.of_run(skeleton, config, setup.sparsity)
    dense = sizes is None and config.adapter.name == "none"
    if dense and setup.processes > 1 and config.trainer.name == "BasicTrainer":
        raise ValueError(dense_problem(f"mask_path={config.mask_path}", setup.processes))
    traced, how = _traced(config, skeleton, sizes, setup)
    segments, sent = traced.segments, {}
    if setup.processes > 1 and config.trainer.name == "FSDPTrainer":
        units = shared.Units.of(skeleton, config, sizes)
        sharing = shared.Sharing.of(config, setup.processes)
        segments = [shared.sharded(segment, units, sharing) for segment in segments]
        sent = shared.sent_sharded(units, sharing, config.gradient_accumulation_steps)
    elif setup.processes > 1:
        sent = shared.sent_replicated(traced.trained, traced.tensors, setup.processes)
    phases, host = _by_phase(segments), 0
    if setup.device == "cuda":  # what is written is copied into main memory first
        host = phases["save"].parts.pop("saved")
        phases["save"].peak -= host
    ordered = {phase: phases[phase] for phase in PHASES}
    disk = _disk(config, skeleton, sizes, traced, setup.processes)
    return Prediction(ordered, host, traced.trained, how, disk, sent)


# Blocks


def _traced(
    config: Config, skeleton: PreTrainedModel, sizes: Sizes | None, setup: Setup
) -> tuple[Traced, str]:
    """The trace of the whole run, of models whose blocks are alike from those of two small ones; and which
    blocks were traced.
    """
    prefixes = layer_numbers(skeleton, config.model.block_name)
    n = len(prefixes)
    if setup.whole or n <= max(CUTS) or not _alike(skeleton, prefixes, sizes):
        traced = _trace(config, copy.deepcopy(skeleton), sizes, setup)
        return traced, f"all {n} blocks"
    if sizes is not None:
        sizes = sizes.alike(prefixes)
    few, more = (_trace(config, cut_to(skeleton, k, config.model.block_name), sizes, setup) for k in CUTS)
    times = n - CUTS[0]
    whole = Traced(
        list(_multiplied(few.segments, more.segments, n)),
        few.state_bytes + times * (more.state_bytes - few.state_bytes),
        few.trained + times * (more.trained - few.trained),
        few.tensors + times * (more.tensors - few.tensors),
    )
    return whole, f"{CUTS[0]} and {CUTS[1]} of {n} blocks, multiplied"


def _alike(model: PreTrainedModel, prefixes: Mapping[str, int], sizes: Sizes | None) -> bool:
    """Whether all blocks have the same parameters, of which the same are trained."""

    def kind(prefix: str) -> object:
        block = model.get_submodule(prefix)
        trained = [
            (name, p.shape, sizes is None or sizes.kept(f"{prefix}.{name}") > 0)
            for name, p in block.named_parameters()
        ]
        return type(block), trained, getattr(block, "layer_type", None)

    first, *others = map(kind, prefixes)
    one_list = len({prefix.rpartition(".")[0] for prefix in prefixes}) == 1
    return one_list and all(other == first for other in others)


def _multiplied(few: Iterable[Segment], more: Iterable[Segment], n: int) -> Iterable[Segment]:
    """Segments of n blocks. What is live in a segment grows by as much with every block.

    The blocks between the first and the last one need no segments of their own: what is live when they begin
    grows or falls by the same from one to the next, so that one of the two ends is the highest.
    """
    pairs = zip(*([s for s in found if s.name[-1] != "middle"] for found in (few, more)), strict=True)
    times = n - CUTS[0]
    for a, b in pairs:
        assert a.name == b.name, (a.name, b.name)
        parts = Counter({kind: a.parts[kind] + times * (b.parts[kind] - a.parts[kind]) for kind in b.parts})
        yield Segment(a.name, 0, 0, a.peak + times * (b.peak - a.peak), parts)


def rows_per_pass(config: Config, setup: Setup) -> int:
    """Examples of one process's part of a backward pass."""
    return math.ceil(config.batch_size / config.gradient_accumulation_steps / setup.processes)


def _trace(config: Config, model: PreTrainedModel, sizes: Sizes | None, setup: Setup) -> Traced:
    rows = rows_per_pass(config, setup)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        try:
            return trace(
                config,
                model,
                sizes,
                device=setup.device,
                rows=rows,
                length=setup.length or config.max_length,
                peers=setup.processes > 1,
            )
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced without its weights: {one_line(error)}"
            ) from error


def _by_phase(segments: Iterable[Segment]) -> dict[str, Memory]:
    phases: dict[str, Memory] = {}
    for segment in segments:
        phase = {"optimizer": "load", "idle": "step", "end": "save"}.get(segment.name[0], segment.name[0])
        if phase not in phases or segment.peak > phases[phase].peak:
            phases[phase] = Memory(segment.peak, segment.parts.copy())
    return phases


# Files


def _disk(
    config: Config, model: PreTrainedModel, sizes: Sizes | None, traced: Traced, processes: int
) -> dict[str, int]:
    weights = sum(p.numel() for p in model.parameters()) * dtype_of(config.model.policy_dtype).itemsize
    stored_as = "policy.pt" if config.save_format == "policy" else "model.safetensors"
    state_in = "optimizer/" if processes > 1 and config.trainer.name == "FSDPTrainer" else "resume.pt"
    disk = {stored_as: weights, state_in: traced.state_bytes}
    if config.adapter.name == "lora":
        disk["adapter"] = 4 * traced.trained
        return disk
    if sizes is not None:
        shapes = [math.prod(shape) for shape in sizes.shapes.values()]
        if config.freeze_layers is None:  # else there may be no mask file
            disk["mask"] = sum(math.ceil(count / 8) for count in shapes)
        disk["delta"] = _delta_bytes(sum(shapes), sizes.n_kept, config)
    return disk


def _delta_bytes(scope: int, kept: int, config: Config) -> int:
    """The entropy of the positions, and each value as it is: what the codec comes within 5 % of, from above.

    Trained models need less: their values change in few bits.
    """
    return round(entropy_bits(scope, kept) / 8) + kept * dtype_of(config.model.policy_dtype).itemsize
