"""Sparse task vectors as files: the entries that a task changed, bit for bit.

    from lota.delta import Delta, extract, apply, revert

    extract("base", "run/epoch-1/policy.pt", "sql.safetensors")
    apply("base", "sql.safetensors", "tuned")          # bit for bit what the converter writes
    revert("tuned", "sql.safetensors", "base_again")

The command line is `python -m lota.delta`; loaded models switch tasks with `lota.attach`.
"""

from lota.delta.extraction import extract
from lota.delta.reader import Delta

__all__ = ["Delta", "extract"]
