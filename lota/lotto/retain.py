"""What matters to the tasks that a sequence has learnt, in the weights that its next stage starts from."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lota.config import Config
from lota.data.batches import seeded_sample
from lota.data.examples import load_examples, with_options
from lota.data.prompts import Prompter
from lota.data.task import FindTask
from lota.lotto.config import LottoConfig
from lota.masks.extract.gradients import Collected
from lota.masks.extract.importance import importance_of, load_importance, save_importance
from lota.masks.mask import Mask
from lota.models.hashing import remembered_hash
from lota.storage import content_key, set_aside
from lota.train.run_mask import checked_mask
from lota.train.run_model import load_run_tokenizer
from lota.train.saliency_gradients import SaliencyData, collect

logger = logging.getLogger(__name__)


class Importance:
    """Of every entry of `names` to the tasks before `task`: mean squares of the gradients of training
    rows of each (retain.n_examples). It is computed when it is first asked for, by this process alone.

    start: the weights that the stage starts from. model: their structure, on the meta device.
    """

    def __init__(
        self,
        config: LottoConfig,
        find_task: FindTask,
        task: str,
        start: Path,
        model: PreTrainedModel,
        names: Sequence[str],
        device: torch.device,
    ):
        self.config, self.find_task, self.earlier = config, find_task, config.earlier(task)
        self.start, self.model, self.names, self.device = start, model, names, device

    @cached_property
    def whole(self) -> Collected:
        """fp32, on the CPU."""
        return importance_of(self._squares())

    def _squares(self) -> Iterator[Collected]:
        """Of one task after the other."""
        for task, data in zip(self.earlier, self.data, strict=True):
            logger.info("importance to %s: gradients of %d examples", task, len(data.batches))
            yield collect(data, self.names, "squares")
            gc.collect()
            torch.cuda.empty_cache()

    @cached_property
    def data(self) -> list[SaliencyData]:
        """Of each earlier task a seeded sample of the rows that it trained on, one in a batch."""
        return [self._rows(task) for task in self.earlier]

    def _rows(self, name: str) -> SaliencyData:
        run = self.config.adaptation(name, model={"archive": str(self.start)})
        tokenizer = load_run_tokenizer(run)
        task = with_options(self.find_task, name, run)
        examples = load_examples([task], "train", run, Prompter(tokenizer, run.chat_template))
        chosen = seeded_sample(examples, self.config.retain.n_examples, run.seed)
        narrow = run.model.fsdp_policy_mp == "bfloat16"
        dtype = "bfloat16" if narrow else run.model.policy_dtype
        return SaliencyData(run, tokenizer, [[one] for one in chosen], dtype, device=str(self.device))

    @property
    def key(self) -> str:
        """Hash of what decides it."""
        weights = remembered_hash(self.start, self.model)
        return content_key([weights, sorted(self.names), [data.meta for data in self.data]])

    def store(self, run: Config, mask: Mask | None) -> None:
        """Write what `run` reads of it to run.importance_path, unless it is there. mask: as in its file."""
        path, kept = Path(str(run.importance_path)), checked_mask(run, self.model, mask)
        if path.is_file():
            try:
                if load_importance(path, kept).key == self.key:
                    return
                reason = "is of other weights or rows"
            except ValueError as error:
                reason = f"cannot be used ({error})"
            logger.warning("%s %s and is now %s", path, reason, set_aside(path).name)
        save_importance(path, self.whole, kept, self.key)
