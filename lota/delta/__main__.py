"""Sparse task vector files on the command line: python -m lota.delta extract|apply|revert|show|verify ..."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from lota import delta
from lota.delta.report import report


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
        delta.extract(args.base, args.tuned, args.out, mask=args.mask, task=args.task, model=args.model)
        return report(args.out)
    if args.command == "show":
        return report(args.delta)
    if args.command == "verify":
        meta = delta.verify(args.base, args.delta)
        return f"ok: {args.base} and {args.delta} give the model with the hash {meta['tuned_hash']}"
    write = delta.apply if args.command == "apply" else delta.revert
    return f"wrote {write(args.model, args.delta, args.out, args.max_shard_size)}"


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        print(run(parse(argv)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
