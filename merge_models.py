"""Merge what several fine-tunings learnt into their common base.

    python merge_models.py --base BASE --deltas DELTA DELTA --method ties --density 0.2 --out FOLDER

writes a folder that transformers loads, with merge.json, and prints what the task vectors have in common.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from lota.places import holding
from lota.share.merge.folder import MergeResult, prepare_merge
from lota.share.merge.mergekit_yaml import check_target, mergekit_config, write_yaml
from lota.share.merge.rules import METHODS, MergeRule, make_rule
from lota.utils import with_flags


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


def describe(result: MergeResult, method: str) -> str:
    """Statistics per vector and pair; whether `sum` is exact."""
    lines = [result.statistics.table(), ""]
    if result.exact:
        lines.append("exact: no entry is changed by two; the result is what applying each gives, bit for bit")
    elif method == "sum":
        lines.append(
            f"not exact: {result.shared:,} entries are changed by several and hold base + their sum, rounded"
        )
    templates = result.prompts["chat_template"]
    if len(templates) > 1:
        lines.append(
            f"trained with chat_template {' and '.join(templates)}: set --chat_template when you evaluate; "
            "without it, prompts are written without a template"
        )
    return "\n".join([*lines, f"wrote {result.folder}"])


def merge(args: argparse.Namespace, rule: MergeRule) -> MergeResult:
    """Check everything, then write the folder, and the configuration for mergekit before it if asked for."""
    prepared = prepare_merge(args.base, args.deltas, rule, args.out, args.max_shard_size)
    if args.export_mergekit:
        check_target(Path(args.export_mergekit))
        write_yaml(mergekit_config(prepared), Path(args.export_mergekit))
    total = prepared.source.n_entries
    with tqdm(total=total, unit=" entries", unit_scale=True, desc="merge", disable=None) as bar:
        return prepared.run(bar.update)


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
        with holding(Path(args.out).expanduser()):
            result = merge(args, rule)
    except (ValueError, OSError) as error:
        other_words = {"scale": "lambda", "export_mergekit": "export-mergekit"}
        sys.exit(f"merge_models.py: {with_flags(error, args, **other_words)}")
    print(describe(result, args.method))


if __name__ == "__main__":
    main()
