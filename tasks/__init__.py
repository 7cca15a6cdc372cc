"""Tasks by name.

A module either defines `TASK`, one task, or `TASKS`, a dict name -> task for close relatives. A name that is
not in the table below is looked up as `tasks/<name>.py`, here and in the current directory: adding a task is
adding a file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

from tasks.base import Task

__all__ = ["TASKS", "Task", "get_task"]

TASKS = {
    "gsm8k": "tasks.gsm8k",
    "alpaca_eval": "tasks.alpaca_eval",
    "toy_sort": "tasks.toy",
    "toy_shift": "tasks.toy",
}


def get_task(name: str) -> Task:
    """The task of that name; ValueError with the nearest names where there is none."""
    module = _find_module(name)
    if module is None:
        known = sorted({*TASKS, *_names_in(_here()), *_names_in(_beside())})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
        raise ValueError(f"unknown task {name!r} ({hint}); a task of your own is a file tasks/{name}.py")
    found = {**getattr(module, "TASKS", {})}
    if hasattr(module, "TASK"):
        found[module.TASK.name] = module.TASK
    if name not in found:
        listed = f"the tasks {', '.join(found)}" if found else "no TASK or TASKS"
        raise ValueError(f"{module.__file__} holds {listed}, not {name!r}")
    return found[name]


def _find_module(name: str) -> ModuleType | None:
    if name in TASKS:
        return importlib.import_module(TASKS[name])
    if not re.fullmatch(r"[\w-]+", name) or name in ("base", "__init__"):
        return None
    for folder in (_here(), _beside()):
        path = folder / f"{name}.py"
        if path.is_file():
            return _load_file(name, path)
    return None


def _load_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tasks.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _here() -> Path:
    return Path(__file__).parent


def _beside() -> Path:
    """Where users keep tasks of their own."""
    return Path.cwd() / "tasks"


def _names_in(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.py") if path.stem not in ("base", "__init__")]
