"""What several processes change: the share of each, and the bytes that each sends per optimizer step.

Sharded runs are arithmetic on the trace of one process's part of the batch: weights and state in shares,
whole for the block at work, the next one, and what stands outside of the blocks; a block's gradient whole
once as it is computed and once as it is sent. Bytes are those of ring collectives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lota.config import Config
from lota.models.loading import dtype_of
from lota.models.scope import layer_numbers
from lota.plan.sizes import Sizes

GATHERED_BLOCKS = 2  # whole at once: the one at work, and the next one, which is on its way
FP32 = 4  # bytes


@dataclass(frozen=True)
class Units:
    """Entries that are whole at once."""

    block: int  # of the largest block
    blocks: int  # of all of them
    root: int  # outside of the blocks
    trained_block: int  # of one block's parameters that train, frozen entries of theirs included
    trained: int  # of all of these

    @classmethod
    def of(cls, model: nn.Module, config: Config, sizes: Sizes | None) -> Units:
        prefixes = layer_numbers(model, config.model.block_name)
        each: Counter[str] = Counter()
        trained: Counter[str] = Counter()
        for name, p in model.named_parameters():
            place = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), "")
            each[place] += p.numel()
            if sizes is None or sizes.kept(name):
                trained[place] += p.numel()
        of_blocks = [each[prefix] for prefix in prefixes]
        return cls(
            max(of_blocks), sum(of_blocks), each[""],
            max(trained[prefix] for prefix in prefixes), sum(trained.values()),
        )  # fmt: skip


def computed_in(config: Config) -> int:
    """Bytes of an entry of a gathered weight."""
    return dtype_of(config.model.fsdp_policy_mp or config.model.policy_dtype).itemsize


def sharded(
    parts: Mapping[str, int], phase: str, units: Units, config: Config, processes: int
) -> Counter[str]:
    """Parts of one process's memory, from those of a process that holds all."""
    size = computed_in(config)
    share = {kind: -(-parts.get(kind, 0) // processes) for kind in ("weights", "state", "reference")}
    made: Counter[str] = Counter(parts)
    made.update({kind: share[kind] - parts.get(kind, 0) for kind in share})
    if phase in ("forward", "backward", "evaluate"):
        made["gathered"] = (min(units.blocks, GATHERED_BLOCKS * units.block) + units.root) * size
    if phase == "backward":
        made["gradients"] = max(made["gradients"], 2 * units.trained_block * size)
    return made


def sent_replicated(trained: int, processes: int) -> dict[str, int]:
    """The sum of all kept entries' gradients in fp32, once per step."""
    return {"gradients of kept entries": round(FP32 * trained * 2 * (processes - 1) / processes)}


def sent_sharded(units: Units, config: Config, processes: int) -> dict[str, int]:
    """Weights before each block's forward and backward pass, gradients after it, for each part of a batch."""
    size, parts, others = computed_in(config), config.gradient_accumulation_steps, (processes - 1) / processes
    twice = (
        2 * units.blocks + units.root
    )  # what stands outside of the blocks stays whole for the backward pass
    return {
        "weights gathered": round(parts * twice * size * others),
        "gradients scattered": round(parts * units.trained * size * others),
    }
