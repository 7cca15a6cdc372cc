"""Sequences of tasks for tests: the embedded model, small tasks, settings as on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from hydra import compose, initialize_config_dir
from runs import MODEL, ROOT

from lota.config import Config
from lota.lotto.config import LottoConfig
from lota.lotto.config_checks import sequence_problems
from lota.lotto.driver import Lotto
from lota.masks import Mask
from lota.train.cli import resolve
from lotto import typed_overrides
from tasks import get_task

SMALL = (
    f"model.name_or_path={MODEL}", "tasks=[one,two]", "batch_size=8", "warmup_steps=1", "lr=1e-2",
    "n_examples=24", "minimum_log_interval_secs=0", "do_first_eval=false", "n_eval_examples=6",
    "exp_name=sequence",
)  # fmt: skip
NAMES = ("one", "two", "three")


def with_tasks(folder: Path) -> Path:
    """Make `folder` a working directory with small tasks of these names, each with rows of its own."""
    (folder / "tasks").mkdir(exist_ok=True)
    text = Path(__file__).with_name("mini_task.py").read_text()
    for at, name in enumerate(NAMES):
        own = text.replace('"mini"', f'"{name}"\n    max_new_tokens = 4').replace(
            "7 * i", f"{7 + 2 * at} * i"
        )
        (folder / "tasks" / f"{name}.py").write_text(own.replace('" ->"', f'" {name} ->"'))
    return folder


def settings(*overrides: str) -> LottoConfig:
    """As the command lotto.py resolves them."""
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        cfg = compose("lotto", overrides=[*SMALL, *overrides])
        typed_overrides(cfg)
        return resolve(cfg, ROOT, LottoConfig, sequence_problems, get_task)


class Trainings:
    """Runs trainings and remembers their settings."""

    def __init__(self) -> None:
        self.configs: list[Config] = []

    def __call__(self, config: Config) -> Path:
        from trainers import TRAINERS

        self.configs.append(config)
        return TRAINERS[config.trainer.name](config).train()

    @property
    def names(self) -> list[str]:
        return [config.exp_name.partition("/")[2] for config in self.configs]


def run(*overrides: str) -> tuple[Lotto, Trainings]:
    """A sequence to its end."""
    trainings = Trainings()
    lotto = Lotto(settings(*overrides), trainings, get_task)
    lotto.run()
    return lotto, trainings


def ledger(lotto: Lotto) -> list[dict]:
    return json.loads((lotto.folder / "ledger.json").read_text())["tasks"]


def mask(lotto: Lotto, at: int) -> Mask:
    return Mask.load(lotto.folder / ledger(lotto)[at]["mask"])
