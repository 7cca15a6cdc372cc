"""Deltas on a model that vLLM serves: attach, detach and switch without loading a model again.

    llm = LLM(BASE, worker_extension_cls="lota.share.vllm.DeltaWorker")
    llm.collective_rpc("attach_delta", args=("sql.safetensors",))
    llm.reset_prefix_cache()  # it holds what the other weights computed

The changes go through vLLM's patches of checkpoints (vllm 0.33), as replacement values at flat positions of
the tensors that the base's files hold; how a tensor is split over workers, packed or cast is vLLM's business.
Values are made of the files that vLLM has loaded, whose hash must be that of the delta's base. Detaching
writes the base's values back. lota must be installed beside vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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

    Attached deltas change different entries. A call that fails before the first write leaves the model as it
    was. One that fails between two writes raises RuntimeError, and so does every request until
    `restore_base` has succeeded: the weights are then neither of both models.
    """

    def attach_delta(self, path: str) -> list[str]:
        """Add a delta to those that are attached; returns the paths of all.

        Raises ValueError, with the model as it was, for a file that is damaged, of another base, attached
        already, or that changes an entry of an attached one.
        """
        state = _state_of(self)
        state.go_to([*state.attached, state.opened(path)])
        return state.paths

    def detach_delta(self, path: str | None = None) -> list[str]:
        """Take a delta off, or all; returns the paths of those that stay. Raises ValueError for one that is
        not attached.
        """
        state = _state_of(self)
        if path is None:
            state.go_to([])
            return []
        unwanted = state.opened(path)
        if unwanted not in state.attached:
            raise ValueError(f"{path} is not attached; attached: {', '.join(state.paths) or 'none'}")
        state.go_to([delta for delta in state.attached if delta != unwanted])
        return state.paths

    def switch_delta(self, path: str) -> list[str]:
        """Take all others off and attach this one. Errors: as `attach_delta`."""
        state = _state_of(self)
        state.go_to([state.opened(path)])
        return state.paths

    def attached_deltas(self) -> list[str]:
        """Their paths. Raises RuntimeError if the weights are those of no model."""
        state = _state_of(self)
        state.refuse_broken()
        return state.paths

    def restore_base(self) -> None:
        """Write the base's values to every entry that a delta of this worker has changed."""
        _state_of(self).restore()


class _State:
    """What a worker has of deltas."""

    def __init__(self, worker: _Worker):
        self.worker = worker
        self.base = _loaded(worker.model_config)  # folder or hub id
        self.attached: list[Delta] = []
        self.patches: dict[Delta, list[Patch]] = {}  # of every delta used so far, so that it is decoded once
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

    def go_to(self, wanted: list[Delta]) -> None:
        """Bring the weights to the base with these deltas."""
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
        self.write(changes, "run restore_base, or start the server again")
        self.attached = wanted

    def write(self, changes: Iterable[tuple[Patch, bool]], remedy: str) -> None:
        """Write the tuned (True) or base values of the patches. On failure the worker serves no more."""
        from vllm.model_executor.model_loader.checkpoint_weight_patch import (
            CheckpointWeightPatch,
            load_checkpoint_weight_patches,
        )

        source, _ = open_folder(self.base)
        patches = [
            CheckpointWeightPatch(
                patch.name,
                source.stored[patch.name].shape,
                patch.base.dtype,
                patch.tuned if tuned else patch.base,
                patch.positions,
            )
            for patch, tuned in changes
        ]
        if not patches:
            return
        try:
            load_checkpoint_weight_patches(self.worker.get_model(), patches, max_chunk_bytes=CHUNK_BYTES)
        except BaseException as error:
            self.broken = f"a change of weights failed halfway ({error}): {remedy}"
            self.worker.execute_model = self.refuse_requests  # type: ignore[attr-defined]
            raise RuntimeError(self.broken) from error

    def restore(self) -> None:
        """The base's values at all entries that any delta changes."""
        changes = [(patch, False) for patches in self.patches.values() for patch in patches]
        self.write(changes, "start the server again")
        if self.broken is not None:
            del self.worker.execute_model  # type: ignore[attr-defined]  # the class's own again
        self.attached, self.broken = [], None

    def refuse_broken(self) -> None:
        if self.broken is not None:
            raise RuntimeError(self.broken)

    def refuse_requests(self, *args: Any, **kwargs: Any) -> None:
        """Stands for the worker's `execute_model` while its weights are those of no model."""
        self.refuse_broken()


def _loaded(config: Any) -> str:
    """Folder or hub id that vLLM has loaded; with a revision, that one in the hub's cache."""
    name, revision = str(config.model), getattr(config, "revision", None)
    if revision is None or Path(name).expanduser().exists():
        return name
    snapshot = cached_snapshot(HubFile(name, revision, "config.json"))
    if snapshot is None:
        raise ValueError(
            f"{name} is served at the revision {revision}, which the hub's cache lacks: serve a folder"
        )
    return str(snapshot)


def _state_of(worker: Any) -> _State:
    """vLLM makes the worker; its extension has no constructor that would be called."""
    if "lota_deltas" not in vars(worker):
        worker.lota_deltas = _State(worker)
    state: _State = worker.lota_deltas
    return state
