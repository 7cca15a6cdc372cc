"""A model of which each process holds a part: sharded by rows, read from disk part by part.

torch's FSDP2 (`fully_shard`) cuts every parameter along its first dimension and gathers those of a block
while the block runs. What a process holds of a parameter, its *part*, is a stretch of the flattened
parameter, its *span*; optimizers and checkpoints work on parts, as plain parameters in the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lota.distributed.processes import Processes
from lota.masks import Mask
from lota.models.loading import cast_parameters, mean_row, tied_names
from lota.models.roles import towers
from lota.models.scope import transformer_blocks
from lota.models.weights import WeightSource, all_finite, refuse_not_finite

Span = tuple[int, int]  # first entry of a flattened parameter, and the one behind the last


@dataclass(frozen=True)
class Shards:
    """A sharded model and the parts of it that this process holds. All processes call methods together."""

    model: PreTrainedModel
    mesh: DeviceMesh
    processes: Processes
    parameters: dict[str, nn.Parameter]  # name -> the model's, a DTensor
    parts: dict[str, nn.Parameter]  # name -> what this process holds of it, in the same memory
    spans: dict[str, Span]

    @property
    def holders(self) -> list[int]:
        """Ranks of the processes that hold the model together, in the order of their parts; with replicas,
        those of the first one.
        """
        return cast(list[int], self.mesh.mesh.reshape(-1, self.mesh.mesh.shape[-1])[0].tolist())

    @property
    def own_holders(self) -> list[int]:
        """The same of the replica that this process is in."""
        row = self.processes.rank // len(self.holders)
        return [rank + row * len(self.holders) for rank in self.holders]

    def refuse_uncut(self, trained: Iterable[str]) -> None:
        """Raise ValueError for a number that would train: it cannot be cut, so each process would train its
        own.
        """
        whole = [name for name in trained if not isinstance(self.parameters[name], DTensor)]
        if whole:
            raise ValueError(
                f"trainer=FSDPTrainer: {whole[0]} is a single number, which cannot be sharded: train with a "
                "mask, or with trainer=BasicTrainer"
            )

    def mask(self, mask: Mask) -> Mask:
        """What a mask of the model keeps of this process's parts."""
        return mask.part(self.spans, {name: part.shape for name, part in self.parts.items()})

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a parameter's whole tensor."""
        start, stop = self.spans[name]
        return whole.reshape(-1)[start:stop].view(self.parts[name].shape)

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        """A parameter on the CPU, made of the parts of all processes; None on all but the first one.

        part: this process's, on the CPU.
        """
        holders, rank = self.holders, self.processes.rank
        if rank not in holders:
            return None
        if not isinstance(self.parameters[name], DTensor):  # everybody has the whole
            return part if rank == holders[0] else None
        data = part.contiguous().view(-1)
        if rank != holders[0]:
            if data.numel():
                self.processes.send(data, holders[0])
            return None
        shape = self.parameters[name].shape
        found = torch.empty(shape, dtype=part.dtype).view(-1)
        found[: data.numel()] = data
        for place, holder in enumerate(holders[1:], start=1):
            start, stop = _span(shape, place, len(holders))
            if stop > start:
                self.processes.receive(found[start:stop], holder)
        return found.view(shape)

    def sum_of_parts(self, values: Tensor) -> Tensor:
        """The tensor, which now holds the sum over the processes that hold the model together."""
        last = self.mesh.ndim - 1
        if self.mesh.size(last) == 1:
            return values
        return self.processes.sum_(values, self.mesh.get_group(last))


def make_mesh(processes: Processes, replicas: int = 1) -> DeviceMesh:
    """The processes in rows of those that hold the model together; one row, or `replicas` of them."""
    kind, count = processes.device.type, processes.count
    if replicas == 1:
        return init_device_mesh(kind, (count,))
    return init_device_mesh(kind, (replicas, count // replicas), mesh_dim_names=("replicas", "parts"))


def shard(
    model: PreTrainedModel,
    source: WeightSource,
    processes: Processes,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    computed: torch.dtype | None = None,
    block_name: str | None = None,
) -> Shards:
    """Shard a model on the meta device and read this process's parts from `source`.

    dtype: of the parameters. computed: dtype that blocks are gathered and computed in, if another. Raises
    ValueError for a model that cannot be sharded, and for NaN or infinity among its weights.
    """
    cast_parameters(model, dtype)
    _keep_wide(model, dtype)
    narrow = (computed or dtype).itemsize < torch.float32.itemsize  # a sum would be rounded at every process
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32 if narrow else None)
    _shard_blocks(model, mesh, policy, block_name)
    model.to_empty(device=processes.device)
    model.tie_weights()  # which to_empty has undone
    _compute_buffers(model)
    parameters = dict(model.named_parameters())
    place, count = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    spans = {
        name: _span(p.shape, place, count) if isinstance(p, DTensor) else (0, p.numel())
        for name, p in parameters.items()
    }
    parts = {name: nn.Parameter(_local(p).detach(), requires_grad=False) for name, p in parameters.items()}
    shards = Shards(model, mesh, processes, parameters, parts, spans)
    _fill(shards, source, dtype)
    model.register_forward_hook(_reshard_without_gradients)
    return shards


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def _span(shape: torch.Size, place: int, count: int) -> Span:
    """Of the part number `place` of `count`: whole rows, as many in each but the last ones."""
    row = shape[1:].numel()
    rows = -(-shape[0] // count)
    return min(place * rows, shape[0]) * row, min((place + 1) * rows, shape[0]) * row


def _keep_wide(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that transformers loads in fp32 whatever dtype one asks for."""
    patterns = set(model._keep_in_fp32_modules_strict or ()) if dtype.itemsize == 2 else set()
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    wide = [name for name, _ in model.named_parameters() if any(_has_part(name, text) for text in patterns)]
    for name in wide:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()


def _has_part(name: str, pattern: str) -> bool:
    return re.search(rf"(^|\.){pattern}(\.|$)", name) is not None


def _shard_blocks(
    model: PreTrainedModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy, block_name: str | None
) -> None:
    """A group per transformer block; embeddings that are not tied, and towers, of their own; the rest is the
    root's, gathered from the forward pass's begin to the backward pass's end.
    """
    blocks = [block for _, block in transformer_blocks(model, block_name)]
    _refuse_unshardable(model, blocks)
    small = {p for p in model.parameters() if p.dim() == 0}  # which cannot be cut
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": small}
    for block in blocks:
        fully_shard(block, reshard_after_forward=True, **options)
    for name in towers(model):  # which a text does not run: gathered by nobody
        fully_shard(model.get_submodule(name), reshard_after_forward=True, **options)
    embedding = model.get_input_embeddings()
    if not tied_names(model) and embedding is not model and not isinstance(embedding, FSDPModule):
        fully_shard(embedding, reshard_after_forward=True, **options)
        cast(FSDPModule, embedding).set_unshard_in_backward(False)  # an embedding's backward reads no weight
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are summed; the loss is divided by the number of examples. NCCL's own division returns
            # zeros in bf16 for factors that are powers of two.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if hasattr(module, "set_reduce_scatter_unused_params"):  # torch 2.13
                module.set_reduce_scatter_unused_params(True)  # such as an expert that got no token here


def _refuse_unshardable(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> None:
    owners: dict[nn.Parameter, nn.Module] = {}
    for block in blocks:
        for name, p in block.named_parameters():
            if owners.setdefault(p, block) is not block:
                raise ValueError(
                    f"trainer=FSDPTrainer: blocks of {type(model).__name__} share {name}, and cannot "
                    "be gathered one at a time: use trainer=BasicTrainer"
                )


def _compute_buffers(model: PreTrainedModel) -> None:
    """What is computed and not stored, such as rotary frequencies, as transformers' loader does it."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # it comes from disk
    with torch.random.fork_rng():
        model.initialize_weights()


def _fill(shards: Shards, source: WeightSource, dtype: torch.dtype) -> None:
    reader = PartSource(source, shards, dtype)
    bad: list[str] = []
    with torch.no_grad():
        for name, part in shards.parts.items():
            values = reader.read(name).to(part.dtype)
            if not all_finite(values):
                bad.append(name)
            part.copy_(values)
        for name, stored in source.buffers.items():
            shards.model.get_buffer(name).copy_(source.read_stored(stored))
    everywhere = [name for names in shards.processes.gather(bad) for name in names]
    if everywhere:  # the same error on each process
        name = everywhere[0]
        refuse_not_finite(source.read(name), name, source.file_of(name))
        raise ValueError(
            f"{source.id}: {name} has values that {shards.parts[name].dtype} cannot hold: choose bfloat16 or "
            "float32"
        )


def _reshard_without_gradients(model: nn.Module, inputs: object, output: object) -> None:
    """After an evaluation the root's parameters go too: the next forward pass may want changed ones."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, model).reshard()


class PartSource:
    """Weights on disk, of which a process reads its own parts. Rows that the files do not have (a vocabulary
    grown by a pad token) are the mean of those that they have.

    dtype: that the model is held in, in which the mean is taken.
    """

    def __init__(self, source: WeightSource, shards: Shards, dtype: torch.dtype):
        self.source, self.shards, self.dtype = source, shards, dtype

    def read(self, name: str) -> Tensor:
        """The part, in the file's dtype."""
        start, stop = self.shards.spans[name]
        if start == stop:
            return torch.empty(self.shards.parts[name].shape, dtype=self.source.dtype(name))
        stored = min(self.source.numel(name), stop)
        values = self.source.read_flat(name, min(start, stored), stored)
        if stored < stop:
            row = mean_row(self.source.read(name).to(self.dtype)).to(values.dtype).flatten()
            values = torch.cat([values, row.repeat((stop - max(start, stored)) // row.numel())])
        return values.view(self.shards.parts[name].shape)


class SumsOfParts:
    """`optimizer.peers` of a sharded model: norms are of all parts together, gradients are this part's."""

    parts = True

    def __init__(self, shards: Shards):
        self.shards = shards

    def begin(self, p: nn.Parameter, grad: Tensor) -> Tensor:
        # of a whole tensor it may be a view of all that FSDP2 has summed for its block, which would stay too
        shares = grad.untyped_storage().nbytes() > grad.nbytes
        return grad.clone() if shares else grad

    def complete(self, p: nn.Parameter) -> None:
        pass

    def gradients(self, grads: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        return grads

    def squares(self, squares: Tensor) -> Tensor:
        return self.shards.sum_of_parts(squares)
