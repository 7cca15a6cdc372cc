"""Train a language model on tasks, densely or only the entries that a mask keeps.

    python train_single_gpu.py exp_name=my_run loss=sft model=tiny datasets=[toy_sort]
    mask_path=masks/my/0.9_mask.pt

On several GPUs: torchrun --standalone --nproc-per-node 8 train_single_gpu.py ... (docs/SCALING.md).
Settings: config/config.yaml. The run folder is $PROJECT_CACHE/<exp_name>/ (default ~/.cache/lota).
"""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

# On a CPU, bf16 kernels are cached per shape, in two caches of 1024: with batches of every length that grows
# by gigabytes. The variables are read once, when torch is loaded.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

import hydra
from omegaconf import DictConfig

from lota.config import Config
from lota.train.cli import closing_words, guarded, register, resolve
from lota.train.overrides import start
from tasks import get_task

logger = logging.getLogger(__name__)
register("training", Config)
ROOT = Path(__file__).resolve().parent


def run(cfg: DictConfig) -> None:
    with guarded(cfg.fsdp_port):
        config = resolve(cfg, ROOT, Config, find_task=get_task)
        from trainers import TRAINERS  # slow to import: settings are checked first

        trainer = TRAINERS[config.trainer.name](config)
        logger.info(closing_words(trainer, trainer.train()))
        del trainer
        gc.collect()  # the next job of a multirun needs the memory of this one


@hydra.main(version_base=None, config_path="config", config_name="config")
def main(cfg: DictConfig) -> None:
    run(cfg)


if __name__ == "__main__":
    start(main, Config, ROOT / "config" / "config.yaml")
