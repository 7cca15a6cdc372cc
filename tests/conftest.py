"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for library in ("OMP", "MKL", "OPENBLAS"):  # before torch is loaded: on tiny models threads only wait
    os.environ.setdefault(f"{library}_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# files whose module fixture takes many seconds: the commands of a pipeline, mergekit's merges, a sequence
TOGETHER = ("test_pipeline.py", "test_mergekit.py", "test_lotto.py", "test_plot_runs.py")


def pytest_report_header() -> str:
    import torch

    level, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"torch {torch.__version__}, CPU capability {level}, threads per process: {threads}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker takes the next test when it is free; a file with a dear fixture goes to one worker whole.

    (--dist loadgroup is for that, but pytest 9.2 ignores the names that pytest-xdist 3.8 gives to groups.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class FilesOfDearFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.rpartition("/")[2] in TOGETHER else nodeid

    return FilesOfDearFixtures(config, log)


def pytest_unconfigure() -> None:
    import prepared

    prepared.stop()


@pytest.fixture
def shared() -> Path:
    """Folder with real data and a real pretrained model, beside the project; tests that need it skip
    without it.
    """
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture
def stories(shared: Path) -> Path:
    """stories260K, a real pretrained Llama of 260K parameters."""
    return shared / "models" / "stories260K"


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run folders of a test go to its own temporary folder."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """What a command sets on the project's loggers ends with its test."""
    names = ("lota", "tasks", "trainers", "__main__")
    before = [(log, list(log.handlers), log.level, log.propagate) for log in map(logging.getLogger, names)]
    yield
    for log, handlers, level, propagate in before:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files end at 40 KB: writing beyond raises OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tasks `mini` and `pairs`."""
    from runs import with_mini_task

    monkeypatch.chdir(with_mini_task(tmp_path))
    return tmp_path


@pytest.fixture
def mask(workplace: Path):
    """A random mask that keeps one entry of ten, in the working directory as 0.9_mask.pt."""
    from runs import write_mask

    return write_mask(workplace / "0.9_mask.pt")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run may load a model: for what should be refused before."""
    monkeypatch.setattr("lota.train.run_model.load_model", None)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded, and there is no hub: for commands that should refuse before either."""
    import datasets

    import lota.evaluate.cli

    def offline(**arguments):
        raise ConnectionError("no network")

    def loaded(*arguments, **more):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(lota.evaluate.cli, "load_model", loaded)
