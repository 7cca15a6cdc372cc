"""What several processes change: the share of each, and the bytes that each sends per optimizer step.

Sharded runs are arithmetic on the trace of one process's part of the batch: weights and state in shares,
whole for the block at work, the next one, and what stands outside of the blocks; a block's gradient whole
once as it is computed and once as it is sent. Bytes are those of ring collectives.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lota.config import Config
from lota.models.loading import dtype_of, tied_names
from lota.models.scope import layer_numbers
from lota.plan.sizes import Sizes
from lota.plan.tracker import Segment

GATHERED_BLOCKS = 2  # whole at once: the one at work, and the next one, which is on its way
FP32 = 4  # bytes


@dataclass(frozen=True)
class Units:
    """Entries that are gathered together (lota/distributed/sharded.py)."""

    block: int  # of the largest block
    blocks: int  # of all of them
    embedding: int  # of one that is gathered for itself
    root: int  # of all else, which stays gathered for the backward pass
    trained_block: int  # of one block's parameters that train, frozen entries of theirs included
    trained_root: int  # of such parameters outside of blocks
    trained: int  # of all of these

    @classmethod
    def of(cls, model: PreTrainedModel, config: Config, sizes: Sizes | None) -> Units:
        prefixes = layer_numbers(model, config.model.block_name)
        embedding = None if tied_names(model) else model.get_input_embeddings().weight
        each: Counter[str] = Counter()
        trained: Counter[str] = Counter()
        for name, p in model.named_parameters():
            place = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), "root")
            place = "embedding" if p is embedding else place
            each[place] += p.numel()
            if sizes is None or sizes.kept(name):
                trained[place] += p.numel()
        of_blocks = [each[prefix] for prefix in prefixes]
        return cls(
            max(of_blocks), sum(of_blocks), each["embedding"], each["root"],
            max(trained[prefix] for prefix in prefixes), trained["root"], sum(trained.values()),
        )  # fmt: skip

    def gathered(self, name: tuple[Any, ...]) -> int:
        """Most that is whole at once in a segment of a step (lota/plan/trace.py)."""
        if name[0] not in ("forward", "backward", "evaluate"):
            return 0
        if "block" in name:
            return self.root + min(self.blocks, GATHERED_BLOCKS * self.block)
        at_the_end = "head" in name or name[0] == "backward"
        return self.root if at_the_end else self.root + self.embedding


@dataclass(frozen=True)
class Sharing:
    """How a run is shared. gathered: bytes of an entry of a weight that is gathered and of its gradient,
    which is then sent in fp32.
    """

    processes: int
    replicas: int
    gathered: int

    @classmethod
    def of(cls, config: Config, processes: int) -> Sharing:
        narrow = config.model.fsdp_policy_mp == "bfloat16"
        dtype = dtype_of("bfloat16" if narrow else config.model.policy_dtype)
        return cls(processes, config.model.replicas, dtype.itemsize)

    @property
    def holders(self) -> int:
        """Processes that hold the model together."""
        return self.processes // self.replicas


def sharded(segment: Segment, units: Units, sharing: Sharing) -> Segment:
    """A segment of one process, from that of a process that holds all."""
    parts, n = segment.parts.copy(), sharing.holders
    shares = ("weights", "state", "reference", "gradients")  # those that wait for the step
    parts.update({kind: -(-parts[kind] // n) - parts[kind] for kind in shares})
    parts["gathered"] = units.gathered(segment.name) * sharing.gathered
    if segment.name[0] == "backward" and "block" in segment.name:
        # a block's gradients, whole and as they are sent; those outside of blocks wait for the end, as the
        # trace has it where the head is tied to the embedding
        block = units.trained_block * (sharing.gathered + FP32)
        root = units.trained_root * sharing.gathered if units.embedding else 0
        parts["gradients"] += block + root
    return Segment(segment.name, segment.began, segment.peaked, sum(parts.values()), parts)


def sent_replicated(trained: int, tensors: int, count: int) -> dict[str, int]:
    """The sum of all kept entries' gradients in fp32, and a flag for each tensor, once per step."""
    return {"kept gradients": round(FP32 * (trained + tensors) * 2 * (count - 1) / count)}


def sent_sharded(units: Units, sharing: Sharing, parts: int) -> dict[str, int]:
    """Weights before each block's forward and backward pass, gradients after it, for each part of a batch."""
    n, replicas = sharing.holders, sharing.replicas
    entries = 2 * units.blocks + units.embedding + units.root
    gradients = parts * units.trained * FP32
    sent = {
        "weights gathered": round(parts * entries * sharing.gathered * (n - 1) / n),
        "gradients scattered": round(gradients * (n - 1) / n),
    }
    if replicas > 1:
        sent["gradients of replicas"] = round(gradients / n * 2 * (replicas - 1) / replicas)
    return sent
