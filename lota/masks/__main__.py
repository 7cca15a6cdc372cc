"""Look at mask files and make new ones of them.

    python -m lota.masks show masks/gsm8k/0.9_mask.pt --png figures
    python -m lota.masks compare masks/gsm8k/0.9_mask.pt masks/arc/0.9_mask.pt --png figures
    python -m lota.masks union|intersect FILE FILE ... --out NEW.pt
    python -m lota.masks flip FILE --out NEW.pt
    python -m lota.masks random-like FILE --seed 0 --out NEW.pt

show: kept entries by layer and module. compare: entries that two masks share, and how many random masks with
the same count in each tensor would share. random-like: such a random mask.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from lota.masks import Mask
from lota.masks.combine import MAKE, made_of
from lota.masks.extract.select import DEFAULT_SCOPE
from lota.masks.statistics import density, overlap
from lota.masks.views import density_text, draw_density, draw_overlap, overlap_text
from lota.models.scope import find_scope, meta_model
from lota.utils import first_few, short_names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lota.masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name in ("show", "compare", *MAKE):
        add = tools.add_parser(name).add_argument
        add("files", nargs="+", metavar="FILE", help="mask files of one model, of either layout")
        add("--model", help="folder or hub id that the masks must fit; the older layout gets its scope")
        add("--scope", help="with --model: regular expression over names, instead of attention and MLP")
        if name in MAKE:
            add("--out", required=True, metavar="NEW.pt", help="mask file to write")
            add(
                "--format", choices=["packed", "dense"], default="packed", help="its layout; dense: the older"
            )
        else:
            add("--png", metavar="FOLDER", help="where to put pictures")
        if name == "random-like":
            add("--seed", type=int, default=0, help="of the draw (default: 0)")
    return parser.parse_args(arguments)


def load_masks(paths: Sequence[str], model: str | None = None, pattern: str | None = None) -> list[Mask]:
    """Masks of one model, their bits left on disk until they are looked at.

    model: folder or hub id to check them against; masks of the older layout then get its scope (or that of
    `pattern`). Raises ValueError naming the file that cannot be read or does not belong.
    """
    if pattern is not None and model is None:
        raise ValueError(f"--scope {pattern}: needs the model's names, give --model FOLDER")
    masks = [Mask.load(path, mapped=True) for path in paths]
    if model is not None:
        structure = meta_model(model)
        shapes = {name: tuple(p.shape) for name, p in structure.named_parameters()}
        scope = list(find_scope(structure, pattern))
        masks = [
            _in_scope(path, mask, shapes, scope, pattern) for path, mask in zip(paths, masks, strict=True)
        ]
    for (path, mask), (other_path, other) in combinations(zip(paths, masks, strict=True), 2):
        try:
            mask.check_same_model(other)
        except ValueError as error:
            raise ValueError(f"{path} and {other_path}: {error}") from error
    return masks


def _in_scope(
    path: str, mask: Mask, shapes: dict[str, tuple[int, ...]], scope: list[str], pattern: str | None
) -> Mask:
    try:
        mask.check(shapes)
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


def show(args: argparse.Namespace) -> None:
    masks = load_masks(args.files, args.model, args.scope)
    for path, name, mask in zip(args.files, short_names(args.files), masks, strict=True):
        table = density(mask)
        print("\n".join([f"{path}: {_counts(mask)}", *_origin(mask), *density_text(table)]), end="\n\n")
        if args.png:
            picture = Path(args.png) / f"density_{name.removesuffix('.pt').replace('/', '_')}.png"
            draw_density(table, picture, f"Density of {name}")
            print(f"picture: {picture}\n")


def _counts(mask: Mask) -> str:
    share = f"{100 * mask.density:.4g} %, sparsity {1 - mask.density:.6g}"
    return f"{mask.n_kept:,} of {mask.n_total:,} entries kept ({share})"


def _origin(mask: Mask) -> list[str]:
    if mask.meta.get("layout") == "dense":
        return [
            "older layout, without a scope: all parameters count (--model FOLDER: attention and MLP only)"
        ]
    told = [f"{key}: {value}" for key, value in mask.meta.items() if isinstance(value, str | float | int)]
    return [", ".join(told)] if told else []


def compare(args: argparse.Namespace) -> None:
    if len(args.files) < 2:
        raise ValueError("compare: give at least two mask files")
    masks, names = load_masks(args.files, args.model, args.scope), short_names(args.files)
    found = {(i, j): overlap(masks[i], masks[j]) for i, j in combinations(range(len(masks)), 2)}
    for name, mask in zip(names, masks, strict=True):
        print(f"{name}: {_counts(mask)}")
    print("\n" + "\n".join(overlap_text(names, found)))
    if args.png:
        draw_overlap(names, found, Path(args.png) / "overlap.png")
        print(f"\npicture: {args.png}/overlap.png")


def make(args: argparse.Namespace) -> None:
    """union, intersect, flip, random-like: write a new mask."""
    masks = load_masks(args.files, args.model, args.scope)
    shapes = None
    if args.model is not None:
        shapes = {name: p.shape for name, p in meta_model(args.model).named_parameters()}
    made = made_of(args.tool, masks, args.files, getattr(args, "seed", 0))
    if args.format == "dense" and shapes is None and made.meta.get("layout") != "dense":
        raise ValueError("--format dense lists every parameter of the model: give --model FOLDER")
    made.save(args.out, format=args.format, all_shapes=shapes)
    print(f"{made.meta['made_by']}: {_counts(made)}\nwritten: {args.out}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        {"show": show, "compare": compare}.get(args.tool, make)(args)
    except (ValueError, OSError) as error:
        sys.exit(f"lota.masks {args.tool}: {error}")


if __name__ == "__main__":
    main()
