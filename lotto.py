"""Learn tasks one after the other in one model, each in weights that no earlier one keeps (LoTTO).

    python lotto.py exp_name=two tasks=[toy_sort,toy_shift] sparsity=0.9 model=tiny lr=1e-2

Settings: config/lotto.yaml, and those of a training run in config/config.yaml. The run folder is
$PROJECT_CACHE/<exp_name>/ (default ~/.cache/lota); the same command continues it.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lota.config import Config
from lota.config_checks import unknown_keys
from lota.lotto.config import LottoConfig
from lota.train.cli import guarded, resolve

SCHEMA = "schema"  # the node that config/config.yaml starts from
ConfigStore.instance().store(name=SCHEMA, node=LottoConfig)


def typed_overrides(cfg: DictConfig) -> None:
    """Give `task_overrides` the types of the keys that they stand for. Raises ValueError where that fails."""
    problems = []
    for task, given in OmegaConf.to_container(cfg.task_overrides).items():
        place = f"task_overrides.{task}"
        given = given if isinstance(given, dict) else {}
        lines = unknown_keys(given, LottoConfig, f"{place}.") if given else [f"{place}: give it keys"]
        if not lines:
            try:
                typed = OmegaConf.merge(OmegaConf.structured(LottoConfig), given)
                cfg.task_overrides[task] = _given_only(OmegaConf.to_container(typed), given)
            except OmegaConfBaseException as error:
                key = f"{place}.{error.full_key}" if getattr(error, "full_key", None) else place
                lines = [f"{key}: {str(error).splitlines()[0]}"]
        problems += lines
    if problems:
        raise ValueError("\n".join(problems))


def _given_only(values: dict, given: dict) -> dict:
    return {k: _given_only(values[k], v) if isinstance(v, dict) else values[k] for k, v in given.items()}


def run(cfg: DictConfig) -> None:
    with guarded():
        typed_overrides(cfg)
        config = resolve(cfg, Path(__file__).resolve().parent, LottoConfig)
        from lota.lotto.driver import Lotto  # slow to import: settings are checked first
        from tasks import get_task
        from trainers import TRAINERS

        def train(stage: Config) -> Path | None:
            trainer = TRAINERS[stage.trainer.name](stage)
            folder = trainer.train()
            trainer.stop.check()  # asked for while the run ended: the next one shall not start
            return folder

        Lotto(config, train, get_task).run()


@hydra.main(version_base=None, config_path="config", config_name="lotto")
def main(cfg: DictConfig) -> None:
    run(cfg)


if __name__ == "__main__":
    main()
