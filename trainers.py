"""Where weights live and how they are gathered; the loop itself is lota/train/trainer.py."""

from __future__ import annotations

from lota.config import Config
from lota.train.trainer import Trainer
from tasks import get_task


class BasicTrainer(Trainer):
    """The whole model on each process's device."""

    def __init__(self, config: Config):
        super().__init__(config, get_task)


class FSDPTrainer(BasicTrainer):
    """Weights that may be sharded over processes. In one process there is nothing to shard: BasicTrainer's
    numbers.
    """


TRAINERS: dict[str, type[BasicTrainer]] = {"BasicTrainer": BasicTrainer, "FSDPTrainer": FSDPTrainer}
