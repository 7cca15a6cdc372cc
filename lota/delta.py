"""Sparse task vectors as files: the entries that a task changed, bit for bit.

    from lota.delta import Delta, extract, apply, revert

    extract("base", "run/epoch-1/policy.pt", "sql.safetensors")
    apply("base", "sql.safetensors", "tuned")          # bit for bit what the converter writes
    revert("tuned", "sql.safetensors", "base_again")

The command line is `python -m lota.delta`; loaded models switch tasks with `lota.attach`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; _HOMES is what happens
    from lota.share.delta.apply import apply as apply
    from lota.share.delta.apply import revert as revert
    from lota.share.delta.apply import verify as verify
    from lota.share.delta.extract import extract as extract
    from lota.share.delta.reader import Delta as Delta

_HOMES = {
    "Delta": "lota.share.delta.reader",
    "apply": "lota.share.delta.apply",
    "extract": "lota.share.delta.extract",
    "revert": "lota.share.delta.apply",
    "verify": "lota.share.delta.apply",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lota.delta' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


if __name__ == "__main__":
    raise SystemExit(import_module("lota.share.delta.cli").main())
