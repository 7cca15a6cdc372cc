"""Sparse task vector files on the command line: python -m lota.delta extract|apply|export|..."""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from lota.share.delta.apply import apply, revert, verify
from lota.share.delta.extract import extract
from lota.share.delta.indices import export_indices, import_indices
from lota.share.delta.peft_adapter import UNEVEN, export_peft, import_peft
from lota.share.delta.reader import Delta
from lota.share.hub import add_pull_flags, add_push_flags, pull_delta, push_delta
from lota.utils import with_flags

FORMATS = ("indices", "peft")
SHOWN = ("task", "base", "base_hash", "tuned", "tuned_hash", "dtype", "sparsity", "kept", "chat_template")
DELTA = "delta file, or org/name[@revision] of the hub"
Command = Callable[[argparse.Namespace], str]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `run` is the subcommand's function, which returns what to print."""
    parser = argparse.ArgumentParser(prog="python -m lota.delta", description=__doc__.partition(":")[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Command, what: str, **defaults: object) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, help=what)
        added.set_defaults(run=run, **defaults)
        return added.add_argument

    add = command("extract", run_extract, "base and tuned model -> delta file")
    add("--base", required=True, help="Hugging Face folder, hub id or policy.pt")
    add("--tuned", required=True, help="the same; taken in the dtypes of the base's files")
    add("--mask", help="mask file: a change outside of what it keeps is an error")
    add("--task", help="name to put into the file; default: the data sets of the tuned model's run")
    add("--model", help="folder with the config, if neither base nor tuned has one")
    add("--out", required=True, help="file to write, such as sql.safetensors")

    for name, write, what in (
        ("apply", apply, "base + delta -> tuned model"),
        ("revert", revert, "tuned model + delta -> base"),
    ):
        add = command(name, run_write, what, write=write)
        add("--model", required=True, help="Hugging Face folder or hub id: the very one it was taken of")
        add("--delta", required=True, help=DELTA)
        add("--out", required=True, help="folder to write")
        add("--max_shard_size", default="2GB", help="largest weight file (2GB)")

    add = command("export", run_export, "delta file -> what other tools read")
    add("--format", choices=FORMATS, required=True, help="safetensors of positions and values; or an adapter")
    add("--base", required=True, help="Hugging Face folder or hub id: the very one it was taken of")
    add("--delta", required=True, help=DELTA)
    add("--out", required=True, help="file (indices) or new folder (peft) to write")
    add(
        "--uneven",
        choices=UNEVEN,
        default="pad",
        help="peft, if layers differ in their share of changes (pad)",
    )

    add = command("import", run_import, "what other tools write -> delta file")
    add(
        "--format",
        choices=FORMATS,
        required=True,
        help="what --source is; peft: any adapter that peft merges",
    )
    add("--base", required=True, help="Hugging Face folder or hub id of the model that it changes")
    add("--source", required=True, help="file (indices) or folder (peft)")
    add("--out", required=True, help="delta file to write")

    add = command("show", run_show, "what a file holds")
    add("delta", help=DELTA)

    add = command("verify", run_verify, "check file and base, and that they give the tuned model")
    add("--base", required=True, help="Hugging Face folder, hub id or policy.pt")
    add("--delta", required=True, help=DELTA)

    add = command("push", push_delta, "delta file -> repository of the hub, with a model card")
    add("--delta", required=True, help="delta file")
    add("--mask", help="mask file that it was trained under, to go along as mask.pt")
    add_push_flags(add)

    add = command("pull", pull_delta, "repository of the hub -> delta file, checked")
    add_pull_flags(add)
    return parser.parse_args(argv)


def run_extract(args: argparse.Namespace) -> str:
    extract(args.base, args.tuned, args.out, mask=args.mask, task=args.task, model=args.model)
    return describe(Delta.open(args.out))


def run_write(args: argparse.Namespace) -> str:
    return f"wrote {args.write(args.model, args.delta, args.out, args.max_shard_size)}"


def run_export(args: argparse.Namespace) -> str:
    if args.format == "indices":
        done = export_indices(args.base, args.delta, args.out)
        found = f"{done['entries']:,} entries of {done['tensors']} tensors, {done['bytes']:,} bytes"
        return f"wrote {args.out}: {found}"
    done = export_peft(args.base, args.delta, args.out, uneven=args.uneven)
    return (
        f"wrote {args.out}: {done['entries']:,} entries of {done['tensors']} layers, {done['padding']:,} of "
        f"padding, {done['bytes']:,} bytes\n"
        f"  entries that differ from the tuned model: {done['differing']:,} if merged in the file's dtype, "
        f"{done['differing_in_float32']:,} if merged in float32 and cast"
    )


def run_import(args: argparse.Namespace) -> str:
    {"indices": import_indices, "peft": import_peft}[args.format](args.base, args.source, args.out)
    return describe(Delta.open(args.out))


def run_show(args: argparse.Namespace) -> str:
    return describe(Delta.open(args.delta))


def run_verify(args: argparse.Namespace) -> str:
    meta = verify(args.base, args.delta)
    return f"ok: {args.base} and {args.delta} give the model with the hash {meta['tuned_hash']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse(argv)
    try:
        print(args.run(args))
    except (ValueError, OSError) as error:
        print(f"error: {with_flags(error, args)}", file=sys.stderr)
        return 1
    return 0


def describe(delta: Delta) -> str:
    """Lines on a delta file: metadata, size against the entropy, share changed by kind of parameter."""
    lines = [f"{delta.path}: {delta.n_changed:,} of {delta.meta['entries']:,} entries changed"]
    lines += [f"  {key:13} {delta.meta[key]}" for key in SHOWN if delta.meta.get(key) is not None]
    size, bound = delta.path.stat().st_size, entropy_bytes(delta)
    each = f", {8 * size / delta.n_changed:.1f} bits for each changed entry" if delta.n_changed else ""
    lines.append(f"  {'size':13} {size:,} bytes{each}")
    if bound:
        lines.append(f"  {'':13} {size / bound:.3f} of the entropy of the positions + the values as they are")
    changed: Counter[str] = Counter()
    entries: Counter[str] = Counter()
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
