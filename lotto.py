"""Learn tasks one after the other in one model, each in weights that no earlier one keeps (LoTTO).

    python lotto.py exp_name=two tasks=[toy_sort,toy_shift] sparsity=0.9 model=tiny lr=1e-2

Settings: config/lotto.yaml, and those of a training run in config/config.yaml. The run folder is
$PROJECT_CACHE/<exp_name>/ (default ~/.cache/lota); the same command resumes an interrupted sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lota.config import Config
from lota.lotto.config import LottoConfig
from lota.lotto.config_checks import sequence_problems
from lota.settings import unknown_keys
from lota.train.cli import guarded, register, resolve
from lota.train.overrides import start
from tasks import get_task

ROOT = Path(__file__).resolve().parent
register("sequence", LottoConfig)


def typed_overrides(cfg: DictConfig) -> None:
    """Give `task_overrides` the types of the keys that they stand for. Raises ValueError for a wrong type."""
    problems = []
    for task, given in cfg.task_overrides.items():
        place = f"task_overrides.{task}"
        if not isinstance(given, DictConfig) or not given:
            problems.append(f"{place}: give it keys")
            continue
        unknown = unknown_keys(given, LottoConfig, f"{place}.")
        problems += unknown
        if not unknown:
            try:
                typed = OmegaConf.merge(OmegaConf.structured(LottoConfig), given)
                cfg.task_overrides[task] = _given_only(typed, given)
            except OmegaConfBaseException as error:
                key = f"{place}.{error.full_key}" if getattr(error, "full_key", None) else place
                problems.append(f"{key}: {str(error).splitlines()[0]}")
    if problems:
        raise ValueError("\n".join(problems))


def _given_only(values: Any, given: DictConfig) -> dict[Any, Any]:
    """The values of the keys that are given, at every depth."""
    nested = {key: _given_only(values[key], v) for key, v in given.items() if isinstance(v, DictConfig)}
    return {key: values[key] for key in given} | nested


def run(cfg: DictConfig) -> None:
    with guarded(cfg.fsdp_port):
        typed_overrides(cfg)
        config = resolve(cfg, ROOT, LottoConfig, sequence_problems, get_task)
        from lota.distributed.processes import processes  # slow to import: settings are checked first
        from lota.lotto.driver import Lotto
        from lota.lotto.together import follow
        from trainers import TRAINERS

        def train(stage: Config) -> Path | None:
            trainer = TRAINERS[stage.trainer.name](stage)
            folder = trainer.train()
            trainer.stop.check()  # asked for while the run ended: the next one shall not start
            return folder

        if processes().first:
            Lotto(config, train, get_task, processes()).run()
        else:
            follow(config, train, processes())


@hydra.main(version_base=None, config_path="config", config_name="lotto")
def main(cfg: DictConfig) -> None:
    run(cfg)


if __name__ == "__main__":
    start(main, LottoConfig, ROOT / "config" / "lotto.yaml")
