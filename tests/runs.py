"""Training runs for tests: the embedded model, a small task, settings as on the command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from lota.config import Config
from lota.config_checks import validated
from lota.masks import Mask
from lota.models.scope import find_scope, meta_model
from lota.train.cli import register

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny-llama"
SMALL = (
    f"model.name_or_path={MODEL}", "datasets=[mini]", "batch_size=8", "warmup_steps=2", "lr=1e-3",
    "minimum_log_interval_secs=0", "do_first_eval=false", "eval_batch_size=8",
)  # fmt: skip
register("training", Config)


def with_mini_task(folder: Path) -> Path:
    """Make `folder` a working directory with tasks/mini.py and tasks/pairs.py; returns it."""
    (folder / "tasks").mkdir(exist_ok=True)
    for name, file in (("mini", "mini_task.py"), ("pairs", "pair_task.py")):
        shutil.copy(Path(__file__).with_name(file), folder / "tasks" / f"{name}.py")
    return folder


def composed(*overrides: str) -> Config:
    """The checked settings of a training command, called `run` if nothing else names it."""
    named = any(override.startswith(("exp_name=", "+experiment=")) for override in overrides)
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        cfg = compose("config", overrides=[*overrides] if named else ["exp_name=run", *overrides])
        return validated(OmegaConf.to_object(cfg))


def settings(*overrides: str) -> Config:
    return composed(*SMALL, *overrides)


def train(*overrides: str):
    """Run a trainer to its end; returns (trainer, last checkpoint folder)."""
    from trainers import TRAINERS

    config = settings(*overrides)
    trainer = TRAINERS[config.trainer.name](config)
    return trainer, trainer.train()


@contextlib.contextmanager
def stopped_after(step: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Inside the block a run gets a signal once it has made that many steps, and stops with Interrupted."""
    from lota.train.interrupt import Interrupted
    from lota.train.trainer import Trainer

    agree = Trainer.agree

    def stopping(trainer):
        if trainer.progress.step == step:
            os.kill(os.getpid(), number)
        return agree(trainer)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "agree", stopping)
        yield


def write_mask(path: Path, density: float = 0.1, seed: int = 0, model: Path = MODEL) -> Mask:
    """A random mask over the scope of a model, saved at path."""
    generator = torch.Generator().manual_seed(seed)
    scope = find_scope(meta_model(model))
    mask = Mask.from_dense({n: torch.rand(t.shape, generator=generator) < density for n, t in scope.items()})
    mask.save(path)
    return mask


def base(dtype: torch.dtype = torch.float32, model: Path = MODEL) -> torch.nn.Module:
    """The embedded model, or another one."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def assert_frozen(mask: Mask, state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """What the mask freezes has the bits of the start; returns how much of what it keeps has moved."""
    moved = 0
    assert state.keys() == start.keys()
    for name, value in state.items():
        kept = mask.dense(name) if name in mask else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(value[~kept], start[name][~kept]), name
        moved += (value[kept] != start[name][kept]).sum().item()
    return moved / mask.n_kept


def policy(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "policy.pt", weights_only=True)["state"]


def metrics(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
