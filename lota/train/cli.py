"""What the training commands share: settings resolved and checked, errors and stops, the closing words."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lota.config import Config
from lota.config_checks import unknown_keys
from lota.train.interrupt import Interrupted
from lota.train.runlog import to_console

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Config)


def resolve(cfg: DictConfig, root: Path, schema: type[T] = Config) -> T:
    """The checked configuration. Raises ValueError with all its problems.

    root: folder of the checkout, where an embedded model is looked for.
    """
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        given = ", ".join(f"{key}=..." for key in sorted(missing))
        raise ValueError(f"not given: {given} (config/config.yaml tells what each key means)")
    unknown = unknown_keys(OmegaConf.to_container(cfg), schema)
    if unknown:
        raise ValueError("\n".join(unknown))
    config = OmegaConf.to_object(cfg)
    if in_multirun():
        config.exp_name = f"{config.exp_name}/{_folder_name(HydraConfig.get().job.override_dirname)}"
    embedded = root / config.model.name_or_path  # model=tiny works from any folder
    if not Path(config.model.name_or_path).exists() and (embedded / "config.json").is_file():
        config.model.name_or_path = str(embedded)
    config.resolve_paths()
    return config


def in_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _folder_name(overrides: str) -> str:
    """The job's overrides as one folder name; slashes and over-long names are replaced."""
    name = overrides.replace("/", "-") or "default"
    if len(name) <= 200:
        return name
    return name[:180] + "-" + hashlib.sha256(name.encode()).hexdigest()[:12]


def closing_words(trainer, folder: Path | None) -> str:
    """What was made and what to do next."""
    from lota.models.policy import model_folder  # slow to import: settings are checked first

    config = trainer.config
    if folder is None:
        return "debug run: nothing was saved"
    optimizer = getattr(trainer, "optimizer", None)
    trained = f"trained entries: {optimizer.n_trained:,}" if optimizer else "the run was finished before"
    base = shlex.quote(config.model.archive or config.model.name_or_path)
    folder = shlex.quote(str(folder))
    if trainer.data.mask is None and config.adapter.name == "none":
        step = (
            f"python extract_masks.py --base {base} --tuned {folder} --sparsities 0.5 0.9 0.99 "
            f"--name {config.datasets[0]}"
        )
    else:
        model = shlex.quote(model_folder(config.model.name_or_path, config.model.archive))
        step = (
            f"python convert_policy_to_hf_resize.py --model_path {model} --policy_path {folder}/policy.pt "
            f"--save_path {folder}"
        )
    return f"\ncheckpoint:      {folder}\n{trained}\nnext:            {step}"


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Log to the console, and turn a user's mistake into one message and a stop into its exit code."""
    to_console()
    try:
        yield
    except (ValueError, OSError) as error:
        survives = "" if isinstance(error, ValueError) else "; checkpoints written before are whole"
        logger.error("error: %s%s", error, survives)
        if in_multirun():
            raise  # the other jobs run all the same
        sys.exit(1)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
