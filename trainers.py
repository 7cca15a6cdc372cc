"""Where weights live and how they are gathered; the loop itself is lota/train/trainer.py."""

from __future__ import annotations

from collections.abc import Callable

from lota.config import Config
from lota.train.sharded_trainer import ShardedTrainer
from lota.train.trainer import Trainer
from tasks import get_task


class BasicTrainer(Trainer):
    """The whole model on each process's device."""

    def __init__(self, config: Config):
        super().__init__(config, get_task)


class FSDPTrainer(ShardedTrainer):
    """The model sharded over the processes; in one process nothing is, and the numbers are BasicTrainer's."""

    def __init__(self, config: Config):
        super().__init__(config, get_task)


TRAINERS: dict[str, Callable[[Config], Trainer]] = {"BasicTrainer": BasicTrainer, "FSDPTrainer": FSDPTrainer}
