"""Deltas on a model that vLLM serves: attach, detach and switch without loading a model again.

    llm = LLM(BASE, worker_extension_cls="lota.share.vllm.DeltaWorker")
    llm.collective_rpc("attach_delta", args=("sql.safetensors",))
    llm.reset_prefix_cache()  # it holds what the other weights computed

The changes go through vLLM's patches of checkpoints (vllm 0.33), as replacement values at flat positions of
the tensors that the base's files hold; how a tensor is split over workers, packed or cast is vLLM's business.
Values are made of the files that vLLM has loaded, whose hash must be that of the delta's base. Detaching
writes the base's values back. Workers change their weights together or not at all. lota must be installed
beside vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import distributed as dist

from lota.models.hashing import remembered_hash
from lota.models.hub import HubFile, cached_snapshot
from lota.share.delta.indices import Patch, checkpoint_patches
from lota.share.delta.reader import Delta
from lota.share.hf_weights import open_folder

if TYPE_CHECKING:
    from torch import nn

CHUNK_BYTES = 256 << 20  # of whole tensors that vLLM makes at a time for the changed entries in them


class _Worker(Protocol):
    """What `DeltaWorker` uses of the worker of vLLM that it becomes a base class of."""

    model_config: Any

    def get_model(self) -> nn.Module: ...


class DeltaWorker:
    """Methods of each worker, for `llm.collective_rpc(name, args=(...))` and the server's route for it.

    Attached deltas change different entries. All workers call a method that changes weights. If one of them
    fails before the first write, each raises, the others RuntimeError that names it, and the model stays as
    it was. If one fails between two writes, each raises RuntimeError, and so does every request until
    `restore_base` has succeeded: the weights are then of neither model.
    """

    def attach_delta(self, path: str) -> list[str]:
        """Add a delta to those that are attached; returns the paths of all.

        Raises ValueError, with the model as it was, for a file that is damaged, of another base, attached
        already, or that changes an entry of an attached one, and NotImplementedError for a model whose
        weights vLLM does not patch.
        """
        return _change(self, lambda state: state.switch([*state.attached, state.opened(path)]))

    def detach_delta(self, path: str | None = None) -> list[str]:
        """Take a delta off, or all; returns the paths of those that stay. Raises ValueError for one that is
        not attached.
        """
        return _change(self, lambda state: state.switch([] if path is None else state.without(path)))

    def switch_delta(self, path: str) -> list[str]:
        """Take all others off and attach this one. Errors: as `attach_delta`."""
        return _change(self, lambda state: state.switch([state.opened(path)]))

    def attached_deltas(self) -> list[str]:
        """Their paths. Raises RuntimeError if the weights are those of no model."""
        state = _state_of(self)
        state.refuse_broken()
        return state.paths

    def restore_base(self) -> None:
        """Write the base's values to every entry that a delta of this worker has changed."""
        _change(self, lambda state: state.restoration())


class _Change(NamedTuple):
    """A change of weights that can begin."""

    wanted: list[Delta]  # attached after it
    patches: list[Any]  # of vLLM
    remedy: str  # if it fails halfway


class _State:
    """What a worker has of deltas."""

    def __init__(self, worker: _Worker):
        self.worker = worker
        self.base = _loaded(worker.model_config)  # folder or hub id
        self.attached: list[Delta] = []
        self.patches: dict[Delta, list[Patch]] = {}  # of every delta used so far, so that it is decoded once
        self.tried: set[str] = set()  # tensors that vLLM is known to patch
        self.broken: str | None = None  # why the weights are those of no model

    @property
    def paths(self) -> list[str]:
        return [str(delta.path) for delta in self.attached]

    def opened(self, path: str | os.PathLike[str]) -> Delta:
        """The delta, once its base is found to be the model that is served and its changes are decoded."""
        self.refuse_broken()
        delta = Delta.open(path)
        if delta not in self.patches:
            source, structure = open_folder(self.base)
            found = remembered_hash(self.base, structure)
            if found != delta.meta["base_hash"]:
                raise ValueError(
                    f"{path} is of another base than {self.base}: that has the hash {found[:12]}, not "
                    f"{delta.meta['base_hash'][:12]} ({delta.meta['base']})"
                )
            self.patches[delta] = list(checkpoint_patches(source, delta))
        return delta

    def without(self, path: str) -> list[Delta]:
        """The attached deltas but one."""
        unwanted = self.opened(path)
        if unwanted not in self.attached:
            raise ValueError(f"{path} is not attached; attached: {', '.join(self.paths) or 'none'}")
        return [delta for delta in self.attached if delta != unwanted]

    def switch(self, wanted: list[Delta]) -> _Change:
        """The change that brings the weights to the base with these deltas."""
        self.refuse_broken()
        twice = next((delta for i, delta in enumerate(wanted) if delta in wanted[:i]), None)
        if twice is not None:
            raise ValueError(f"{twice.path} is attached already")
        off = [delta for delta in self.attached if delta not in wanted]
        on = [delta for delta in wanted if delta not in self.attached]
        for delta in on:
            for other in wanted:
                if other != delta and (shared := delta.overlap(other)):
                    raise ValueError(f"{delta.path} changes {shared:,} entries of {other.path}")
        changes = [(patch, False) for delta in off for patch in self.patches[delta]]
        changes += [(patch, True) for delta in on for patch in self.patches[delta]]
        return self.prepared(wanted, changes, "run restore_base, or start the server again")

    def restoration(self) -> _Change:
        """The change to the base's values at all entries that any delta changes."""
        changes = [(patch, False) for patches in self.patches.values() for patch in patches]
        return self.prepared([], changes, "start the server again")

    def prepared(self, wanted: list[Delta], changes: list[tuple[Patch, bool]], remedy: str) -> _Change:
        """The change to the tuned (True) or base values of patches, once vLLM is known to take each tensor.

        What vLLM refuses, such as a quantized weight, it may notice at the first write alone. So a tensor is
        first patched at no position, by which every entry keeps its value, whatever fails.
        """
        if not changes:
            return _Change(wanted, [], remedy)
        from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

        stored = open_folder(self.base)[0].stored
        patches = [
            CheckpointWeightPatch(
                patch.name,
                stored[patch.name].shape,
                patch.base.dtype,
                patch.tuned if tuned else patch.base,
                patch.positions,
            )
            for patch, tuned in changes
        ]
        none = torch.empty(0, dtype=torch.int64)
        new = {patch.name: patch for patch in patches if patch.name not in self.tried}
        self.load([CheckpointWeightPatch(p.name, p.shape, p.dtype, p.values[:0], none) for p in new.values()])
        self.tried.update(new)
        return _Change(wanted, patches, remedy)

    def load(self, patches: list[Any]) -> None:
        """Write patches of vLLM."""
        if not patches:
            return
        from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

        load_checkpoint_weight_patches(self.worker.get_model(), patches, max_chunk_bytes=CHUNK_BYTES)

    def make(self, change: _Change) -> None:
        """Write a change that all workers have prepared. If one fails, none of them serves any more."""
        failure: BaseException | None = None
        try:
            self.load(change.patches)
        except BaseException as error:
            failure = error
        try:
            told = _gathered(_told(failure))
        except Exception as error:  # another worker is gone, and how far it came is unknown
            failure = failure or error
            told = [_told(failure)]
        found = next((message for message in told if message is not None), None)
        if found is not None:
            self.broken = f"a change of weights failed halfway ({found}): {change.remedy}"
            self.worker.execute_model = self.refuse_requests  # type: ignore[attr-defined]
            raise RuntimeError(self.broken) from failure
        if self.broken is not None:
            del self.worker.execute_model  # type: ignore[attr-defined]  # the class's own again
        self.attached, self.broken = change.wanted, None

    def refuse_broken(self) -> None:
        if self.broken is not None:
            raise RuntimeError(self.broken)

    def refuse_requests(self, *args: Any, **kwargs: Any) -> None:
        """Stands for the worker's `execute_model` while its weights are those of no model."""
        self.refuse_broken()


def _change(worker: Any, plan: Callable[[_State], _Change]) -> list[str]:
    """Make a change on all workers, or on none; returns the paths of the attached deltas."""
    refusal: Exception | None = None
    checksums: list[str] = []
    try:
        state = _state_of(worker)
        change = plan(state)
        checksums = [delta.checksum for delta in change.wanted]
    except Exception as error:  # told to the others, who wait, and raised
        refusal = error
    told = _gathered((_told(refusal), checksums))
    if refusal is not None:
        raise refusal
    for rank, (message, found) in enumerate(told):
        if message is not None:
            raise RuntimeError(f"worker {rank} cannot make this change, so none has made it: {message}")
        if found != checksums:
            raise ValueError(f"worker {rank} has read other deltas: give all workers the same files")
    state.make(change)
    return state.paths


def _told(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def _gathered(item: Any) -> list[Any]:
    """The items of all workers of vLLM in the order of their ranks; called by all of them."""
    if not dist.is_initialized():
        return [item]
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group().cpu_group
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def _loaded(config: Any) -> str:
    """The folder that vLLM has loaded; of a hub id, the snapshot that the hub's cache has at this moment.

    It is found without asking the hub, where a branch may have moved since.
    """
    name, revision = str(config.model), getattr(config, "revision", None)
    if Path(name).expanduser().exists():
        return name
    snapshot = cached_snapshot(HubFile(name, revision, "config.json"))
    if snapshot is None:
        raise ValueError(
            f"{name} is served at the revision {revision or 'main'}, which the hub's cache lacks: "
            "serve a folder"
        )
    return str(snapshot)


def _state_of(worker: Any) -> _State:
    """vLLM makes the worker; its extension has no constructor that would be called."""
    if "lota_deltas" not in vars(worker):
        worker.lota_deltas = _State(worker)
    state: _State = worker.lota_deltas
    return state
