"""Sparse task vector files on the command line: python -m lota.delta extract|apply|revert|show|verify ..."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence

from lota.share.delta.apply import apply, revert, verify
from lota.share.delta.extract import extract
from lota.share.delta.reader import Delta


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lota.delta", description=__doc__.partition(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("extract", help="base and tuned model -> delta file").add_argument
    add("--base", required=True, help="Hugging Face folder, hub id or policy.pt")
    add("--tuned", required=True, help="the same; taken in the dtypes of the base's files")
    add("--mask", help="mask file: a change outside of what it keeps is an error")
    add("--task", help="name to put into the file; default: the data sets of the tuned model's run")
    add("--model", help="folder with the config, where neither base nor tuned has one")
    add("--out", required=True, help="file to write, such as sql.safetensors")

    for command, what in (
        ("apply", "base + delta -> tuned model"),
        ("revert", "tuned model + delta -> base"),
    ):
        add = commands.add_parser(command, help=what).add_argument
        add(
            "--model", required=True, help="Hugging Face folder or hub id, to the bit the one it was taken of"
        )
        add("--delta", required=True, help="delta file")
        add("--out", required=True, help="folder to write")
        add("--max_shard_size", default="2GB", help="largest weight file (2GB)")

    add = commands.add_parser("show", help="what a file holds").add_argument
    add("delta", help="delta file")

    add = commands.add_parser(
        "verify", help="check file and base, and that they give the tuned model"
    ).add_argument
    add("--base", required=True, help="Hugging Face folder, hub id or policy.pt")
    add("--delta", required=True, help="delta file")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Do what was asked for; returns what to print."""
    if args.command == "extract":
        extract(args.base, args.tuned, args.out, mask=args.mask, task=args.task, model=args.model)
        return report(args.out)
    if args.command == "show":
        return report(args.delta)
    if args.command == "verify":
        meta = verify(args.base, args.delta)
        return f"ok: {args.base} and {args.delta} give the model with the hash {meta['tuned_hash']}"
    write = apply if args.command == "apply" else revert
    return f"wrote {write(args.model, args.delta, args.out, args.max_shard_size)}"


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        print(run(parse(argv)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


SHOWN = ("task", "base", "base_hash", "tuned", "tuned_hash", "dtype", "sparsity", "kept", "chat_template")


def report(path: str | os.PathLike) -> str:
    """Lines on a delta file. Raises ValueError unless it is whole."""
    delta = Delta.open(path)
    lines = [f"{delta.path}: {delta.n_changed:,} of {delta.meta['entries']:,} entries changed"]
    lines += [f"  {key:13} {delta.meta[key]}" for key in SHOWN if delta.meta.get(key) is not None]
    size, bound = delta.path.stat().st_size, entropy_bytes(delta)
    each = f", {8 * size / delta.n_changed:.1f} bits for each changed entry" if delta.n_changed else ""
    lines.append(f"  {'size':13} {size:,} bytes{each}")
    if bound:
        lines.append(f"  {'':13} {size / bound:.3f} of the entropy of the positions + the values as they are")
    changed, entries = Counter(), Counter()
    for parameter in delta.parameters.values():
        kind = re.sub(r"\.\d+\.", ".*.", parameter.name)
        changed[kind] += parameter.changed
        entries[kind] += parameter.numel
    lines += [f"  {100 * changed[k] / entries[k]:8.4f} %  {k}" for k in entries if changed[k]]
    return "\n".join(lines)


def entropy_bytes(delta: Delta) -> float:
    """Bytes that the changes take if nothing is known of them but how many there are.

    The entropy of their positions among the entries of the parameters that changed, and every value in full.
    """
    parameters = [delta.parameters[name] for name in delta.names]
    values = sum(p.changed * p.dtype.itemsize for p in parameters)
    return entropy_bits(sum(p.numel for p in parameters), delta.n_changed) / 8 + values


def entropy_bits(n: int, changed: int) -> float:
    """Entropy of n independent entries of which that share changed."""
    p = changed / n if n else 0.0
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0) * n
