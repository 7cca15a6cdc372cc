"""What the training commands share: settings resolved and checked, errors and stops, the closing words."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from lota.config import Config
from lota.config_checks import own_rank, problems_of, started_processes, validated
from lota.distributed.submitted import export_variables
from lota.settings import unknown_keys
from lota.train.interrupt import Interrupted
from lota.utils import LONGEST_NAME, Problems

if TYPE_CHECKING:
    from lota.data.task import FindTask
    from lota.train.trainer import Trainer

logger = logging.getLogger(__name__)
C = TypeVar("C", bound=Config)


def register(name: str, schema: type[Config]) -> None:
    """Let `defaults: - /schema: NAME` of a YAML file mean the keys, types and defaults of a schema."""
    ConfigStore.instance().store(group="schema", name=name, node=schema, package="_global_")


def resolve(
    cfg: DictConfig,
    root: Path,
    schema: type[C],
    problems: Callable[[C], Iterator[str]] = problems_of,
    find_task: FindTask | None = None,
) -> C:
    """Returns the configuration of a command. Raises ValueError with all that `problems` finds in it.

    root: folder of the checkout, where an embedded model is looked for. find_task: if there are problems,
    unknown tasks and unreadable masks are told with them, not only when they are mended.
    """
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        names = ", ".join(f"{key}=..." for key in sorted(missing))
        raise ValueError(f"not given: {names} (docs/SETTINGS.md tells what each key means)")
    given = OmegaConf.to_container(cfg)
    assert isinstance(given, dict)
    unknown = unknown_keys({str(key): value for key, value in given.items()}, schema)
    if unknown:
        raise ValueError("\n".join(unknown))
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, schema)

    def all_problems(c: C) -> Iterator[str]:
        found = list(problems(c))
        yield from found
        if found and find_task is not None:
            yield from _file_problems(c, find_task)

    validated(config, all_problems)
    if in_multirun():
        config.exp_name = f"{config.exp_name}/{_folder_name(HydraConfig.get().job.override_dirname)}"
    embedded = root / config.model.name_or_path  # model=tiny works from any folder
    if not Path(config.model.name_or_path).exists() and (embedded / "config.json").is_file():
        config.model.name_or_path = str(embedded)
    config.resolve_paths()
    if started_processes() > 1:
        _refuse_other_command(config)
    return config


def _refuse_other_command(config: Config) -> None:
    """Raise ValueError unless all processes have the same settings, code and packages."""
    from lota.distributed.processes import processes
    from lota.storage import content_key
    from lota.system import code_hash, package_versions

    together = processes()
    together.same("the command or its configuration", content_key(asdict(config)))
    together.same("the code of lota", code_hash())
    together.same("a version of a package", content_key(package_versions()))


def _file_problems(config: Config, find_task: FindTask) -> list[str]:
    """A line per task that is not known and mask that cannot be read."""
    from lota.masks.trainable import mask_or_dense  # slow to import: torch

    problems = Problems()
    for name in config.task_names:
        problems.attempt(find_task, name)
    for path in config.mask_files:
        problems.attempt(mask_or_dense, path)
    return problems.found


def in_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _folder_name(overrides: str) -> str:
    """The job's overrides as one folder name; slashes and over-long names are replaced."""
    name = overrides.replace("/", "-").lstrip(".") or "default"
    encoded = name.encode()
    if len(encoded) <= LONGEST_NAME:
        return name
    cut = encoded[: LONGEST_NAME - 20].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(encoded).hexdigest()[:12]}"


def closing_words(trainer: Trainer, folder: Path | None) -> str:
    """Returns what was made and what to do next."""
    from lota.models.policy import model_folder  # slow to import: settings are checked first

    config = trainer.config
    if folder is None:
        return "debug run: nothing was saved"
    loaded = hasattr(trainer, "optimizer")
    trained = f"trained entries: {trainer.n_trained:,}" if loaded else "the run was finished before"
    base = shlex.quote(config.model.archive or config.model.name_or_path)
    made, policy = shlex.quote(str(folder)), shlex.quote(str(folder / "policy.pt"))
    if trainer.data.mask is None and config.adapter.name == "none":
        step = (
            f"python extract_masks.py --base {base} --tuned {made} --sparsities 0.5 0.9 0.99 "
            f"--name {shlex.quote(config.datasets[0])}"
        )
    elif config.save_format == "folder":
        step = f"python eval_model_all.py --model {made} --datasets {','.join(config.datasets)}"
    else:
        model = shlex.quote(model_folder(config.model.name_or_path, config.model.archive))
        step = (
            f"python convert_policy_to_hf_resize.py --model_path {model} --policy_path {policy} "
            f"--save_path {made}"
        )
    return f"\ncheckpoint:      {made}\n{trained}\nnext:            {step}"


class JobFailed(Exception):
    """A job of a multirun ended with an error that it has told."""


@contextlib.contextmanager
def guarded(port: int | None = None) -> Iterator[None]:
    """`_guarded`; a job of several processes that submitit has started also leaves them at its end."""
    alone = not export_variables()
    with contextlib.nullcontext() if alone else left_at_the_end(), _guarded(port):
        yield


@contextlib.contextmanager
def _guarded(port: int | None) -> Iterator[None]:
    """Join the other processes, log to the console, turn a user's mistake into one message and a stop into
    its exit code.

    Of several processes the first is the one that logs, and one tells an error. port: see `join`.
    """
    to_console()
    several = started_processes() > 1
    try:
        if several:
            from lota.distributed.processes import join

            join(port)
        yield
    except (ValueError, OSError) as error:
        survives = "" if isinstance(error, ValueError) else "; checkpoints written before are whole"
        if not several or _tells():
            logger.error("error: %s%s", error, survives)
        if in_multirun() and (not several or _all_fail()):
            raise JobFailed(str(error)) from error  # the other jobs run all the same
        sys.exit(1)
    except Interrupted as stop:
        if several:
            _leave()
        sys.exit(0 if stop.passed_on() else stop.exit_code)
    except Exception as error:
        if not several:
            raise
        from lota.distributed.processes import is_loss
        from lota.distributed.watch import MESSAGE

        if getattr(error, "told", False) or not _tells():
            sys.exit(1)
        if not is_loss(error):
            raise  # the only traceback: if the others have one, it is most often the same
        logger.error(MESSAGE)
        sys.exit(1)


@contextlib.contextmanager
def left_at_the_end() -> Iterator[None]:
    """Leave the other processes, which the jobs of the block have joined: when all do, or at once if this one
    has failed.
    """
    if started_processes() == 1:
        yield
        return
    failed = True
    try:
        yield
        failed = False
    finally:
        _leave(failed)


def _leave(failed: bool = False) -> None:
    from lota.distributed.processes import ProcessLost, leave

    try:
        leave(failed)
    except ProcessLost:  # which has told its error, or was killed while this one was at its end
        sys.exit(1)


def _tells() -> bool:
    from lota.distributed.processes import processes

    return processes().tells()


def _all_fail() -> bool:
    from lota.distributed.processes import processes

    return processes().all_fail(f"job {HydraConfig.get().job.num}")


def to_console(level: int = logging.INFO) -> None:
    """Send the project's log messages to standard error, one plain line each; of several processes, those of
    the first and errors.
    """
    if own_rank():
        level = logging.ERROR
        warnings.simplefilter("ignore")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if started_processes() > 1:  # torch, when it is loaded, would tell of each connection that breaks
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("lota", "tasks", "trainers", "__main__"):
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.setLevel(level)
        log.propagate = False


class _TqdmHandler(logging.Handler):
    """Prints above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
