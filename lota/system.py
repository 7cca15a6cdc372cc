"""Versions of code and packages, the device, and peak memory."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "numpy",
    "hydra-core",
)
_ASSUMED: ContextVar[str | None] = ContextVar("assumed", default=None)


def device_kind(device: torch.device) -> str:
    """`cpu`, `cuda` or another type of device, for which a way of computing is chosen: the tensor's own, or
    the one that is assumed."""
    return _ASSUMED.get() or device.type


@contextlib.contextmanager
def assumed_device(kind: str | None) -> Iterator[None]:
    """Choose ways of computing as on this type of device, wherever tensors are: a plan traces a GPU's step on
    a machine that has none. None: as ever.
    """
    token = _ASSUMED.set(kind)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on a CUDA device, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would start from what the parent process used
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` start anew: a multirun has several runs in one process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def package_versions() -> dict[str, str | None]:
    """Of PACKAGES; None for one that is not installed."""
    installed: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def code_hash() -> str:
    """sha256 of the library's source files."""
    digest, folder = hashlib.sha256(), Path(__file__).resolve().parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def versions(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Code, packages and device of a run, for the record beside its results."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        **package_versions(),
        "device": f"{device.type} ({name})",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
