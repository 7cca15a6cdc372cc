"""Tasks by name.

A module either defines `TASK`, one task, or `TASKS`, a dict name -> task for close relatives. A name that is
not in the table below is looked up as `tasks/<name>.py`, here and in the current directory: adding a task is
adding a file (docs/TASKS.md).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from tasks.base import Task

__all__ = ["EVALUATED_ON", "TASKS", "Task", "evaluation_names", "get_task"]

TASKS = {
    "gsm8k": "tasks.gsm8k",
    "metamathqa": "tasks.metamathqa",
    "mathinstruct": "tasks.mathinstruct",
    "AQuA": "tasks.math_choice",
    "mathqa": "tasks.math_choice",
    "AddSub": "tasks.math_word",
    "MultiArith": "tasks.math_word",
    "SingleEq": "tasks.math_word",
    "SVAMP": "tasks.math_word",
    "mawps": "tasks.math_word",
    "arc": "tasks.arc",
    "commonsense": "tasks.commonsense",
    "boolq": "tasks.commonsense",
    "piqa": "tasks.commonsense",
    "social_i_qa": "tasks.commonsense",
    "ARC-Challenge": "tasks.commonsense",
    "ARC-Easy": "tasks.commonsense",
    "openbookqa": "tasks.commonsense",
    "hellaswag": "tasks.commonsense",
    "winogrande": "tasks.commonsense",
    "samsum": "tasks.samsum",
    "sql": "tasks.sql",
    "sharegpt": "tasks.sharegpt",
    "sharegpt4": "tasks.sharegpt",
    "shareclaude": "tasks.sharegpt",
    "hh": "tasks.preferences",
    "shp": "tasks.preferences",
    "se": "tasks.preferences",
    "ultrafeedback": "tasks.preferences",
    "ultrafeedbacknarrow": "tasks.preferences",
    "ultrachat": "tasks.instructions",
    "alpaca": "tasks.instructions",
    "dolly": "tasks.instructions",
    "wikitext": "tasks.wikitext",
    "finewiki": "tasks.finewiki",
    "purebad": "tasks.safety",
    "hexphi": "tasks.safety",
    "alpaca_eval": "tasks.alpaca_eval",
    "toy_sort": "tasks.toy",
    "toy_shift": "tasks.toy",
    "toy_reverse": "tasks.toy",
}

# Task to train on -> the tasks that show what was learnt.
EVALUATED_ON = {
    "commonsense": (
        "boolq",
        "piqa",
        "social_i_qa",
        "ARC-Challenge",
        "ARC-Easy",
        "openbookqa",
        "hellaswag",
        "winogrande",
    ),
    "mathinstruct": ("gsm8k",),
    "purebad": ("hexphi",),
}

# Files of this folder that hold no task of their name: what tasks share, and families listed above.
_SHARED = {"__init__", "base", "chat", "choices", "hub", "prompts", "rouge", "rows", "sqlite"}
_NO_TASKS = _SHARED | {module.removeprefix("tasks.") for module in TASKS.values()}


def evaluation_names(names: str | Iterable[str]) -> list[str]:
    """Names of tasks to evaluate, each once, from a list or text with commas; aliases are resolved."""
    listed = names.split(",") if isinstance(names, str) else names
    given = [name.strip() for name in listed if name.strip()]
    return list(dict.fromkeys(full for name in given for full in EVALUATED_ON.get(name, (name,))))


def get_task(name: str) -> Task:
    """The task of that name. Raises ValueError with the nearest names if there is none."""
    module = _find_module(name)
    if module is None:
        own = (path.stem for folder in _folders() for path in folder.glob("*.py"))
        known = sorted({*TASKS, *(stem for stem in own if stem not in _NO_TASKS)})
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
    if not re.fullmatch(r"[\w-]+", name) or name in _NO_TASKS:
        return None
    for folder in _folders():
        path = folder / f"{name}.py"
        if path.is_file():
            return _load_file(name, path)
    return None


def _load_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tasks.{name}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folders() -> tuple[Path, Path]:
    """Where tasks stand: here, and beside the user's own work."""
    return Path(__file__).parent, Path.cwd() / "tasks"
