"""Extract masks from a base and a fine-tuned model: which entries may train at each sparsity.

    python extract_masks.py --base BASE --tuned TUNED --sparsities 0.5 0.9 0.99 --name gsm8k

writes masks/gsm8k/0.5_mask.pt, 0.9_mask.pt, 0.99_mask.pt and summary.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from lota.atomic import write_json
from lota.masks import Mask
from lota.pairing import Pair, open_pair
from lota.scores import SCORES
from lota.selection import PER, Rule, check_sparsities, select
from lota.units import GRANULARITIES


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, help="Hugging Face folder, hub id or policy.pt that training started from")
    add("--tuned", help="the fine-tuned one: folder, hub id, policy.pt or epoch-N/; task_vector needs it")
    add("--sparsities", nargs="+", required=True, metavar="S", help="frozen shares of the scope, in [0, 1)")
    add("--name", required=True, help="folder under --out, usually the task")
    add("--out", default="masks", help="where mask folders stand (default: masks)")
    add("--scope", help="regular expression over parameter names (default: attention and MLP weights)")
    add("--per", choices=PER, default="global", help="one threshold, or one per tensor or layer")
    add(
        "--granularity",
        choices=GRANULARITIES,
        default="element",
        help="keep single entries, or whole rows (output neurons) or columns (input neurons)",
    )
    add("--smallest", action="store_true", help="keep the smallest nonzero scores instead of the largest")
    add("--score", default="task_vector", help=f"what rates an entry: {', '.join(SCORES)}")
    add("--seed", type=int, default=0, help="of --score random")
    add("--format", choices=["packed", "dense"], default="packed", help="dense: name -> bool, True = frozen")
    add("--protect", nargs="*", default=[], metavar="MASK", help="masks whose kept entries are left alone")
    add("--model", help="folder whose config gives the structure, where neither side is a folder")
    return parser.parse_args(arguments)


def write_masks(args: argparse.Namespace, pair: Pair, masks: dict[float, Mask]) -> Path:
    """Mask files named by the sparsities as typed, and summary.json; returns the folder."""
    folder = Path(args.out) / args.name
    summary = {"entries": next(iter(masks.values())).n_total, "format": args.format, "masks": {}}
    for typed in dict.fromkeys(args.sparsities):
        mask = masks[float(typed)]
        mask.save(folder / f"{typed}_mask.pt", format=args.format, all_shapes=pair.shapes)
        per_tensor = {name: {"kept": mask.kept(name), "entries": mask.numel(name)} for name in mask.names}
        rows = {"per_tensor": per_tensor, "per_layer": pair.by_layer(mask)}
        summary["masks"][typed] = {"file": f"{typed}_mask.pt", **mask.meta, **rows}
    write_json(folder / "summary.json", summary)
    return folder


def print_table(args: argparse.Namespace, folder: Path, masks: dict[float, Mask]) -> None:
    print(f"{'sparsity':>9} {'kept':>15} {'of':>15} {'threshold':>12}  file")
    for typed in dict.fromkeys(args.sparsities):
        mask = masks[float(typed)]
        threshold = mask.meta["threshold"]
        shown = (
            f"{threshold:.4g}" if isinstance(threshold, float) else f"per {args.per}" if threshold else "-"
        )
        short = f"  ({mask.meta['shortfall']:,} fewer than asked for)" if mask.meta["shortfall"] else ""
        print(
            f"{typed:>9} {mask.n_kept:>15,} {mask.n_total:>15,} {shown:>12}  {folder}/{typed}_mask.pt{short}"
        )
    typed = "0.9" if "0.9" in args.sparsities else args.sparsities[-1]
    print(
        "\nnext, adapt (a mask wants about ten times the learning rate of dense training):\n"
        f"  python -u train_single_gpu.py mask_path={folder}/{typed}_mask.pt loss=sft model=blank_model "
        f"model.name_or_path={args.model or args.base} 'datasets=[TASK]' exp_name={args.name}_{typed} lr=1e-4"
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        sparsities = check_sparsities(args.sparsities)
        rule = Rule(
            args.score,
            args.per,
            args.smallest,
            args.seed,
            [Mask.load(path) for path in args.protect],
            args.granularity,
        )
        needs = SCORES[args.score].needs
        pair = open_pair(args.base, args.tuned, scope=args.scope, model=args.model, needs=needs)
        total = 2 * sum(pair.sources["base"].numel(name) for name in pair.scope)
        with tqdm(total=total, unit=" entries", unit_scale=True, desc="extract", disable=None) as bar:
            masks = select(pair, sparsities, rule, progress=bar.update)
        folder = write_masks(args, pair, masks)
    except (ValueError, OSError) as error:
        sys.exit(f"extract_masks.py: {error}")
    print_table(args, folder, masks)


if __name__ == "__main__":
    main()
