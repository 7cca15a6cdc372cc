"""The mask of `snip=true`: computed before training, stored, reused by runs that would compute the same."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import Config
from lota.data.batches import Example
from lota.distributed.processes import ALONE, Processes
from lota.distributed.sharded import Shards
from lota.masks import Mask
from lota.masks.extract.gradients import Collected
from lota.masks.extract.saliency import SALIENCIES
from lota.masks.extract.select import Quota, Rule, select
from lota.models.hashing import remembered_hash
from lota.models.loading import dtype_of
from lota.models.pair import open_pair
from lota.models.policy import is_policy
from lota.storage import key_differences, set_aside
from lota.train.saliency_gradients import SaliencyData, collect, first_batches

logger = logging.getLogger(__name__)
Shard = Callable[[torch.dtype], Shards]
KEY = "snip_key"  # of a mask's meta


@dataclass
class SnipMask:
    """What decides the mask, known before a model loads."""

    quota: Quota  # of one sparsity
    data: SaliencyData
    key: dict[str, Any]  # a stored mask is reused if it was made under an equal one
    path: Path | None  # file that the mask is stored in; None: it is not stored

    def stored(self) -> Mask | None:
        """The mask at `path` if it was made under the same key; None if there is none.

        Raises ValueError for a file that holds something else than a mask of snip=true.
        """
        if self.path is None or not self.path.exists():
            return None
        mask = Mask.load(self.path)
        if KEY not in mask.meta:
            raise ValueError(
                f"save_snip_mask_path={self.path} holds a mask that snip=true did not make: name another "
                f"file, or train with it by mask_path={self.path} and without snip"
            )
        changed = key_differences(mask.meta[KEY], self.key)
        if changed:
            logger.info("%s is not reused: made with another %s", self.path, ", ".join(changed))
            return None
        logger.info("snip: reusing the mask %s", self.path)
        return mask

    def compute(
        self,
        device: torch.device,
        check: Callable[[], object],
        together: Processes = ALONE,
        shard: Shard | None = None,
    ) -> Mask:
        """Load the base, collect its gradients, choose, and store the mask; an older one is set aside.

        check: called for each batch; raises when the run has been asked to stop. together: the processes that
        share each batch; all choose the same, and the first one stores it. shard: loads the base in a dtype
        as one that these processes hold together; then the first one chooses, from sums that it puts on disk.
        """
        self.data.device = str(device)
        scope, kind = self.quota.pair.scope, SALIENCIES["snip"].collects
        if shard is None:
            collected = collect(self.data, scope, kind, lambda _: check(), together)
            gc.collect()  # a model refers to itself: its memory is needed for the one that trains
            mask = self._chosen(collected)
        else:
            shards = shard(dtype_of(self.data.dtype))
            parts = collect(self.data, scope, kind, lambda _: check(), together, shards.model)
            with tempfile.TemporaryFile(dir=self.data.config.cache_dir) as file:
                collected = _on_disk(shards, parts, file)
                del shards, parts
                gc.collect()
                found = together.broadcast(self._chosen(collected) if together.first else None)
            assert found is not None
            mask = found
        mask.meta |= {"base_hash": self.key["base"], KEY: self.key}
        logger.info(
            "snip: %s of %s entries kept, from the gradients of %d examples",
            f"{mask.n_kept:,}",
            f"{mask.n_total:,}",
            mask.meta["data"]["examples"],
        )
        if self.path is not None and together.first:
            if self.path.exists():
                logger.info("snip: the mask that was there is now %s", set_aside(self.path).name)
            mask.save(self.path)
            logger.info("snip: mask stored as %s", self.path)
        return mask

    def _chosen(self, collected: Collected) -> Mask:
        (mask,) = select(self.quota, with_hash=False, collected=collected).values()
        return mask


def _on_disk(shards: Shards, parts: Collected, file: BinaryIO) -> Collected:
    """The sums of all processes in the first one, mapped from the file; in the others those of parts."""
    values: dict[str, Tensor] = {}
    for name, part in parts.values.items():
        whole = shards.whole(name, part.cpu())
        if whole is None:
            continue
        start = file.tell()
        file.write(whole.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        mapped = np.memmap(file, np.uint8, "c", start, (whole.nbytes,))
        values[name] = torch.from_numpy(mapped).view(whole.dtype).view(whole.shape)
    return Collected(values or parts.values, parts.kind, parts.meta)


def prepare_snip(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    skeleton: PreTrainedModel,
    examples: Sequence[Example],
) -> SnipMask:
    """Check that the mask can be had, and find what decides it.

    skeleton: the model that will train, on the meta device. Raises ValueError if the scope or the protected
    masks leave no room for the mask.
    """
    archive = config.model.archive
    pair = open_pair(
        archive or config.model.name_or_path,
        scope=config.model.scope,
        model=config.model.name_or_path if archive is None or is_policy(archive) else None,
        needs=SALIENCIES["snip"].needs,
        block_name=config.model.block_name,
    )
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    grown = [name for name, tensor in pair.scope.items() if shapes[name] != tensor.shape]
    if grown:
        raise ValueError(
            f"snip=true with model.pad_token={config.model.pad_token}: {grown[0]} grows by it; leave it out "
            "of model.scope"
        )
    protect = [Mask.load(path) for path in config.protect_masks]
    rule = Rule("snip", protect=protect, granularity=config.snip_granularity, block=config.snip_block)
    quota = Quota(pair, [config.snip_sparsity], rule)
    data = first_batches(
        config,
        tokenizer,
        examples,
        n_batches=config.snip_batches * config.gradient_accumulation_steps,
        size=config.batch_size // config.gradient_accumulation_steps,
    )
    narrow = config.model.fsdp_policy_mp == "bfloat16"  # as weights are held under a mask
    data.dtype = "bfloat16" if narrow else config.model.policy_dtype
    key = {
        "base": remembered_hash(archive or config.model.name_or_path, skeleton),
        "scope": config.model.scope,
        "block_name": config.model.block_name,
        "sparsity": config.snip_sparsity,
        "protected": [mask.fingerprint() for mask in protect],
        "data": data.meta,
    }
    if rule.granularity != "element":  # keys of earlier releases have no such line
        key["granularity"] = f"block {rule.block}" if rule.granularity == "block" else rule.granularity
    return SnipMask(quota, data, key, config.snip_mask_file)
