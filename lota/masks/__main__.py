"""Look at mask files and make new ones of them.

    python -m lota.masks show masks/gsm8k/0.9_mask.pt --png figures
    python -m lota.masks compare masks/gsm8k/0.9_mask.pt masks/arc/0.9_mask.pt --png figures
    python -m lota.masks union|intersect FILE FILE ... --out NEW.pt
    python -m lota.masks flip FILE --out NEW.pt
    python -m lota.masks random-like FILE --seed 0 --out NEW.pt
    python -m lota.masks push FILE --to ORG/NAME
    python -m lota.masks pull ORG/NAME --out NEW.pt

A FILE may be hub:org/name[@revision][/FILE]. show: kept entries by layer and module; of masks of whole rows,
columns or blocks also where these lie. compare: entries that two masks share, and how many random masks with
the same count in each tensor would share. random-like: such a random mask. push, pull: to a repository of the
hub, with a model card, and from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

from torch import nn

from lota.masks import Mask
from lota.masks.combine import TOOLS, combine
from lota.masks.extract.select import DEFAULT_SCOPE
from lota.masks.files import check_target
from lota.masks.unit_views import draw as draw_units
from lota.masks.unit_views import kept_units, unit_counts
from lota.masks.views import density, draw_overlap, overlap, overlap_table
from lota.models.scope import find_scope, meta_model, scope_share, share_sentence
from lota.plots import is_drawn_here
from lota.share.hub import add_pull_flags, add_push_flags, pull_mask, push_mask
from lota.storage import refuse_foreign
from lota.utils import aligned, first_few, short_names, with_flags


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lota.masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name in ("show", "compare", *TOOLS):
        tool = tools.add_parser(name)
        tool.set_defaults(run={"show": show, "compare": compare}.get(name, make))
        add = tool.add_argument
        add("files", nargs="+", metavar="FILE", help="mask files of one model, of either layout")
        add("--model", help="folder or hub id that the masks must fit; the older layout gets its scope")
        add("--scope", help="with --model: regular expression over names, instead of attention and MLP")
        if name in TOOLS:
            add("--out", required=True, metavar="NEW.pt", help="mask file to write")
            add(
                "--format", choices=["packed", "dense"], default="packed", help="its layout; dense: the older"
            )
        else:
            add("--png", metavar="FOLDER", help="folder for pictures")
        if name == "random-like":
            add("--seed", type=int, default=0, help="of the draw (default: 0)")
    for name, run, add_flags in (("push", push_mask, add_push_flags), ("pull", pull_mask, add_pull_flags)):
        tool = tools.add_parser(name)
        tool.set_defaults(run=lambda args, model, run=run: print(run(args)), model=None, scope=None)
        if name == "push":
            tool.add_argument("file", metavar="FILE", help="mask file")
        add_flags(tool.add_argument)
    return parser.parse_args(arguments)


def load_masks(
    paths: Sequence[str], model: nn.Module | None = None, pattern: str | None = None
) -> list[Mask]:
    """Returns masks of one model, their bits left on disk until they are looked at.

    model: checks them, and masks of the older layout get its scope (or that of `pattern`).
    Raises ValueError naming the file that cannot be read or does not belong.
    """
    masks = [Mask.load(path, mapped=True) for path in paths]
    if model is not None:
        masks = [_in_scope(path, mask, model, pattern) for path, mask in zip(paths, masks, strict=True)]
    for (path, mask), (other_path, other) in combinations(zip(paths, masks, strict=True), 2):
        try:
            mask.check_same_model(other)
        except ValueError as error:
            raise ValueError(f"{path} and {other_path}: {error}") from error
    return masks


def _in_scope(path: str, mask: Mask, model: nn.Module, pattern: str | None) -> Mask:
    scope = find_scope(model, pattern)
    try:
        mask.check(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if mask.meta.get("layout") != "dense":
        return mask
    lost = [name for name in mask.names if mask.kept(name) and name not in scope]
    if lost:
        raise ValueError(
            f"{path} keeps entries outside of the scope: {first_few(lost)}; give a --scope that covers them"
        )
    return Mask(mask.bits, mask.shapes, {"scope": pattern or DEFAULT_SCOPE}).only(scope)


def show(args: argparse.Namespace, model: nn.Module | None) -> None:
    masks = load_masks(args.files, model, args.scope)
    for path, name, mask in zip(args.files, short_names(args.files), masks, strict=True):
        found = density(mask)
        print("\n".join([f"{path}: {_counts(mask)}", *_origin(mask.meta), *_share(mask, model)]))
        print("kept entries (%) by layer and module:", *aligned(found.table()), sep="\n", end="\n\n")
        stem = name.removesuffix(".pt").replace("/", "_")
        if args.png:
            _picture(args.png, f"density_{stem}.png", partial(found.draw, title=f"Density of {name}"))
        _show_units(mask, args.png, name, stem)


def _show_units(mask: Mask, folder: str | None, name: str, stem: str) -> None:
    """Kept rows, columns or blocks by layer and module, and a picture of where they lie."""
    try:
        found = kept_units(mask)
    except ValueError as error:
        print(f"{error}\n")
        return
    if not found:
        return
    kind, side = mask.meta["granularity"], mask.meta.get("block")
    kinds = f"blocks of {side} x {side}" if kind == "block" else f"{kind}s"
    print(f"kept {kinds} by layer and module:", *aligned(unit_counts(found).counts()), sep="\n", end="\n\n")
    if folder:
        title = f"Kept {kinds} of {name}, matrices as they are stored"
        _picture(folder, f"{kind}s_{stem}.png", partial(draw_units, found, title=title))


def _picture(folder: str, name: str, draw: Callable[[Path], object]) -> None:
    path = Path(folder) / name
    refuse_foreign("png", path, "picture of masks", is_drawn_here)
    draw(path)
    print(f"picture: {path}\n")


def _counts(mask: Mask) -> str:
    share = f"{100 * mask.density:.4g} %, sparsity {1 - mask.density:.6g}"
    return f"{mask.n_kept:,} of {mask.n_total:,} entries kept ({share})"


def _origin(meta: Mapping[str, object]) -> list[str]:
    if meta.get("layout") == "dense":
        return [
            "older layout, without a scope: all parameters count (--model FOLDER: attention and MLP only)"
        ]
    known = {key: value for key, value in meta.items() if isinstance(value, str | float | int)}
    said = [f"{key}: {value}" for key, value in known.items() if key not in ("scope_share", "left_out")]
    return [", ".join(said)] if said else []


def _share(mask: Mask, model: nn.Module | None) -> list[str]:
    """How much of the model's matrices the mask's scope takes: as recorded, or as `model` shows."""
    meta = mask.meta
    if meta.get("layout") == "dense":
        return []
    if model is not None:
        found = scope_share(model, mask.names)
        share, largest = found.share, found.largest
    elif "scope_share" in meta and "left_out" in meta:
        share, largest = meta["scope_share"], meta["left_out"]
    else:
        return ["the scope's share of the matrices is not recorded (--model FOLDER computes it)"]
    remedy = "extract_masks.py --scope REGEX" if meta["scope"] in (None, DEFAULT_SCOPE) else None
    return [share_sentence(share, largest, remedy)]


def compare(args: argparse.Namespace, model: nn.Module | None) -> None:
    if len(args.files) < 2:
        raise ValueError("compare: give at least two mask files")
    masks, names = load_masks(args.files, model, args.scope), short_names(args.files)
    found = {(i, j): overlap(masks[i], masks[j]) for i, j in combinations(range(len(masks)), 2)}
    for name, mask in zip(names, masks, strict=True):
        print(f"{name}: {_counts(mask)}")
    print("", *aligned(overlap_table(names, found), left=2), sep="\n")
    print("shared: entries that both keep; by chance: random masks that keep as many entries of each tensor,")
    print("+- standard deviation; IoU: shared entries over those that either keeps")
    if args.png:
        picture = Path(args.png) / "overlap.png"
        refuse_foreign("png", picture, "picture of masks", is_drawn_here)
        draw_overlap(names, found, picture)
        print(f"\npicture: {picture}")


def make(args: argparse.Namespace, model: nn.Module | None) -> None:
    """union, intersect, flip, random-like: write a new mask. Raises ValueError if nothing would be kept."""
    out = Path(args.out)
    if out.exists() and any(Path(file).exists() and out.samefile(file) for file in args.files):
        raise ValueError(f"--out {out} is one of the masks that it is made of: give another name")
    check_target(args.out)
    masks = load_masks(args.files, model, args.scope)
    made = combine(args.tool, masks, args.files, getattr(args, "seed", 0))
    if not made.n_kept:
        raise ValueError(
            f"{made.meta['made_by']} keeps no entry, and nothing would train: no file is written"
        )
    if args.format == "dense" and model is None and made.meta.get("layout") != "dense":
        raise ValueError("--format dense lists every parameter of the model: give --model FOLDER")
    shapes = None if model is None else {name: p.shape for name, p in model.named_parameters()}
    made.save(args.out, format=args.format, all_shapes=shapes)
    print(f"{made.meta['made_by']}: {_counts(made)}\nwritten: {args.out}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        if args.scope is not None and args.model is None:
            raise ValueError(f"--scope {args.scope}: needs the model's names, give --model FOLDER")
        args.run(args, None if args.model is None else meta_model(args.model))
    except (ValueError, OSError) as error:
        sys.exit(f"lota.masks {args.tool}: {with_flags(error, args)}")


if __name__ == "__main__":
    main()
