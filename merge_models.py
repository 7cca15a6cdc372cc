"""Merge what several fine-tunings learnt into their common base.

    python merge_models.py --base BASE --deltas DELTA DELTA --method ties --density 0.2 --out FOLDER

writes a folder that transformers loads, with merge.json, and prints what the task vectors have in common.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from lota.share.merge.folder import Merged, plan_merge
from lota.share.merge.mergekit_yaml import equivalent, write_yaml
from lota.share.merge.rules import METHODS, make_rule


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, help="Hugging Face folder or hub id that every fine-tuning started from")
    add(
        "--deltas",
        nargs="+",
        required=True,
        metavar="D",
        help="delta files, or fine-tuned models (folder, hub id, policy.pt, RUN/epoch-N); mixed as you like",
    )
    add("--method", required=True, help=" | ".join(METHODS))
    add("--weights", nargs="+", type=float, metavar="W", help="factor of each task vector (default: 1 each)")
    add("--density", nargs="+", type=float, metavar="D", help="share of entries that stay: one, or one each")
    add("--lambda", dest="scale", type=float, default=1.0, help="factor of the merged vector (default: 1)")
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide by the weights (default: yes for ties and dare_ties, else no)",
    )
    add("--seed", type=int, help="of dare's draws (default: 0)")
    add("--out", required=True, help="new folder for the merged model")
    add("--max_shard_size", default="2GB", help="largest weight file (default: 2GB)")
    add("--export-mergekit", metavar="FILE", help="also write the merge as a configuration for mergekit-yaml")
    return parser.parse_args(arguments)


def report(merged: Merged, method: str) -> str:
    """Statistics per vector and pair; whether `sum` is exact."""
    lines = [merged.statistics.table(), ""]
    if merged.exact:
        lines.append("exact: no entry is changed by two; the result is what applying each gives, bit for bit")
    elif method == "sum":
        lines.append(
            f"not exact: {merged.shared:,} entries are changed by several and hold base + their sum, rounded"
        )
    if len(merged.prompts["chat_template"]) > 1:
        lines.append(
            f"trained with chat_template {' and '.join(merged.prompts['chat_template'])}: say which by "
            "--chat_template when you evaluate; without it, prompts are written without one"
        )
    return "\n".join([*lines, f"wrote {merged.folder}"])


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        rule = make_rule(
            args.method,
            len(args.deltas),
            weights=args.weights,
            density=args.density,
            normalize=args.normalize,
            scale=args.scale,
            seed=args.seed,
        )
        plan = plan_merge(args.base, args.deltas, rule, args.out, args.max_shard_size)
        if args.export_mergekit and Path(args.export_mergekit).is_dir():
            raise ValueError(f"--export-mergekit {args.export_mergekit} is a folder: name a file")
        config = equivalent(plan) if args.export_mergekit else None
        with tqdm(total=plan.entries, unit=" entries", unit_scale=True, desc="merge", disable=None) as bar:
            merged = plan.run(bar.update)
        if config is not None:
            write_yaml(config, Path(args.export_mergekit))
    except (ValueError, OSError) as error:
        sys.exit(f"merge_models.py: {error}")
    print(report(merged, args.method))


if __name__ == "__main__":
    main()
