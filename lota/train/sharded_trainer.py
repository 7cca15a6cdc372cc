"""The training loop on a model that several processes hold together (lota/distributed/sharded.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationConfig, PreTrainedModel

from lota.config import Config
from lota.data.batches import Example
from lota.data.task import FindTask
from lota.distributed.global_state import Stretch, load_state, save_state, stretches
from lota.distributed.replicated import refuse_difference
from lota.distributed.sharded import PartSource, Shards, SumsOfParts, make_mesh, shard
from lota.models.causal import refuse_not_causal
from lota.models.loading import add_pad_token, dtype_of, set_pad_token_id, turn_dropout_off
from lota.models.policy import model_folder
from lota.models.weights import open_weights
from lota.optim.fused import fuse_in_backward
from lota.optim.masked import MaskedOptimizer
from lota.optim.optimizers import OPTIMIZERS
from lota.train.run_folder import Resumable
from lota.train.run_model import finish_run_model, run_skeleton
from lota.train.runlog import Meter
from lota.train.saved_model import SavedModel, Source, trained_values
from lota.train.snip import Shard
from lota.train.trainer import Trainer

STATE = "optimizer"  # folder of a checkpoint


class ShardedTrainer(Trainer):
    """Each process holds a part of the weights, and the optimizer state of the kept entries of that part.

    In one process there is nothing to shard: it trains as `Trainer` does. Optimizer state is stored so that
    any number of processes can continue.
    """

    def __init__(self, config: Config, find_task: FindTask):
        self.shards: Shards | None = None
        super().__init__(config, find_task)

    # Where weights live

    @cached_property
    def mesh(self) -> DeviceMesh:
        return make_mesh(self.processes, self.config.model.replicas)

    def load_model(
        self, archive: str | Path | None, dtype: torch.dtype, key: str = "archive"
    ) -> PreTrainedModel:
        if self.processes.count == 1:
            return super().load_model(archive, dtype, key)
        shards = self._load_sharded(archive, dtype, key)
        self.shards = self.shards or shards  # a second one is a reference
        return shards.model

    def _load_sharded(self, archive: str | Path | None, dtype: torch.dtype, key: str) -> Shards:
        config, tokenizer = self.config, self.data.tokenizer
        model = run_skeleton(config, tokenizer, key)
        if config.model.pad_token is not None:
            set_pad_token_id(model.config, add_pad_token(tokenizer, config.model.pad_token))
        with contextlib.suppress(OSError):  # it has none of its own
            folder = model_folder(config.model.name_or_path, None if archive is None else str(archive))
            model.generation_config = GenerationConfig.from_pretrained(folder)
        start = archive or config.model.name_or_path
        mixed = self.dense and config.model.fsdp_policy_mp == "bfloat16" and dtype != torch.bfloat16
        shards = shard(
            model,
            open_weights(start, model),
            self.processes,
            self.mesh,
            dtype=dtype,
            computed=torch.bfloat16 if mixed else None,
            block_name=config.model.block_name,
        )
        turn_dropout_off(model)
        refuse_not_causal(model.eval(), start)
        finish_run_model(model, config, start)
        return shards

    def snip_sharder(self) -> Shard | None:
        if self.processes.count == 1:
            return None
        return lambda dtype: self._load_sharded(self.config.model.archive, dtype, "archive")

    @property
    def dense(self) -> bool:
        return self.data.mask is None and self.config.adapter.name == "none"

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """None for a sharded model: dense training in mixed precision gathers bf16 copies of the blocks."""
        return contextlib.nullcontext() if self.shards is not None else super().precision()

    def make_optimizer(self) -> MaskedOptimizer:
        shards, mask = self.shards, self.data.mask
        if shards is None:
            optimizer = super().make_optimizer()
        else:
            trained = [
                name
                for name, p in shards.parameters.items()
                if (mask.kept(name) if mask else p.requires_grad)
            ]
            shards.refuse_uncut(trained)
            optimizer = OPTIMIZERS[self.config.optimizer](
                list(shards.parts.items()),
                None if mask is None else shards.mask(mask),
                trained=trained,
                **self.config.optimizer_settings,
            )
            parts = {shards.parameters[name]: part for name, part in shards.parts.items()}
            steps = self.config.gradient_accumulation_steps
            self.unfuse = fuse_in_backward(optimizer, steps, parts=parts)
            optimizer.peers = SumsOfParts(shards)
        self.places: dict[str, Stretch] = stretches(optimizer, self.processes, self._holders())
        for p, name in optimizer.names.items():
            optimizer.kept[p].before = self.places[name].before
        return optimizer

    def _holders(self) -> list[int]:
        """Ranks of the processes that hold the model together with this one."""
        return [self.processes.rank] if self.shards is None else self.shards.own_holders

    @property
    def n_trained(self) -> int:
        return sum(place.total for place in self.places.values())

    def base(self) -> Source:
        source = self.stored_base()
        if self.shards is None:
            return source
        return PartSource(source, self.shards, self.working_dtype)

    def refuse_difference(self) -> None:
        """Parts differ; of replicas, those of the same rows are the same."""
        if self.shards is None:
            return super().refuse_difference()
        holders = len(self.shards.holders)
        refuse_difference(self.shards.parts, self.optimizer, self.processes, self.progress.step, holders)

    # Every process takes part in every forward and backward pass, for its parts are needed

    def idle(self, examples: Sequence[Example]) -> None:
        if self.shards is not None:
            loss = self.loss(examples[:1], Meter())
            if loss.requires_grad:
                (loss * 0).backward()

    def completions(self, examples: Sequence[Example]) -> list[dict[str, str]]:
        if self.shards is None:
            return super().completions(examples)
        return self.objective.complete(examples, self.data.stop)

    # Checkpoints

    def saved_model(self) -> SavedModel:
        shards = self.shards
        if shards is None:
            return super().saved_model()
        shards.model.reshard()  # type: ignore[operator]  # FSDPModule's
        dtype = dtype_of(self.config.model.policy_dtype)
        base = self.base() if self.working_dtype.itemsize < dtype.itemsize else None
        part_of = trained_values(self.optimizer, shards.parts, dtype, base)
        state = shards.model.state_dict(keep_vars=True)
        return SavedModel(state, shards.parameters, dtype, lambda name: shards.whole(name, part_of(name)))

    def write_checkpoint(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        if self.processes.first:
            super().write_checkpoint(folder, random_states)
        else:
            self.write_state(None)

    def write_state(self, folder: Path | None) -> tuple[dict[str, str], dict[str, Any]]:
        folder = self.processes.broadcast(folder)
        assert folder is not None  # the first process's
        sums = self.write_weights(folder) if self.processes.first or self.shards is not None else {}
        return sums, save_state(self.optimizer, self.places, folder / STATE, self.processes)

    def restore_optimizer(self, resumable: Resumable) -> None:
        stored = resumable.content["optimizer"]
        if "state" not in stored:
            load_state(self.optimizer, stored, self.places, resumable.folder / STATE, self.processes)
        elif self.shards is None:  # of an earlier release
            super().restore_optimizer(resumable)
        else:
            raise ValueError(
                f"{resumable.folder} is of an earlier release, which stored the optimizer's state for one "
                "process: continue in one process until the next checkpoint"
            )
