"""Extract masks from a base and a fine-tuned model: which entries may train at each sparsity.

    python extract_masks.py --base BASE --tuned TUNED --sparsities 0.5 0.9 0.99 --name gsm8k

writes masks/gsm8k/0.5_mask.pt, 0.9_mask.pt, 0.99_mask.pt and summary.json. Without a tuned model:

    python extract_masks.py --base BASE --score snip --datasets gsm8k --sparsities 0.9 --name gsm8k_snip
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

from lota.masks import Mask
from lota.masks.extract.saliency import DATA_DRIVEN, SALIENCIES
from lota.masks.extract.select import PER, Quota, Rule, check_sparsities, kept_by_layer, select
from lota.masks.extract.units import DEFAULT_BLOCK, GRANULARITIES
from lota.masks.files import check_target, read
from lota.models.hashing import remembered_hash
from lota.models.pair import ModelPair, open_pair
from lota.models.provenance import run_settings
from lota.models.scope import meta_model, share_sentence
from lota.places import working_in
from lota.share.hf_weights import check_writable
from lota.storage import write_json
from lota.train.saliency_gradients import SaliencySettings, collect, data_flags, load_saliency_data
from lota.utils import Problems, aligned, name_problem, with_flags
from tasks import get_task


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
    add("--score", default="task_vector", help=f"what rates an entry: {', '.join(SALIENCIES)}")
    add("--smallest", action="store_true", help="keep the smallest nonzero scores instead of the largest")
    add("--per", default="global", help=f"one threshold, or one for each: {', '.join(PER)}")
    wholes = "row: whole output neurons; column: whole inputs; block: squares of a matrix"
    add("--granularity", default="element", help=f"what is kept: {', '.join(GRANULARITIES)} ({wholes})")
    add("--block", type=int, help=f"with --granularity block: entries on each side ({DEFAULT_BLOCK})")
    add("--seed", type=int, help="of --score random, and of the examples of a data-driven score (0)")
    add("--format", choices=["packed", "dense"], default="packed", help="dense: name -> bool, True = frozen")
    add("--protect", nargs="*", default=[], metavar="MASK", help="masks whose kept entries are left alone")
    add("--model", help="folder whose config gives the structure, where neither side is a folder")
    group = parser.add_argument_group("data-driven scores", f"{', '.join(DATA_DRIVEN)}: no tuned model")
    for flag, default, text in data_flags():
        if isinstance(default, bool):
            group.add_argument(f"--{flag}", action="store_const", const=True, help=text)
        else:
            shown = text if default is None else f"{text} ({default})"
            group.add_argument(f"--{flag}", type=str if default is None else type(default), help=shown)
    return parser.parse_args(arguments)


def unused_flags(args: argparse.Namespace) -> list[str]:
    """Flags that were given and that this score does not read."""
    data_driven = args.score in DATA_DRIVEN
    readers = {flag: data_driven for flag, *_ in data_flags()}
    readers["block"] = args.granularity == "block"
    readers |= {"tuned": args.score == "task_vector", "seed": data_driven or args.score == "random"}
    return [f"--{flag}" for flag, reads in readers.items() if getattr(args, flag) is not None and not reads]


def check_name(name: str) -> None:
    if problem := name_problem(name):
        raise ValueError(f"name={name:.60}: {problem}; masks are written into --out/--name")


def check_replaced(args: argparse.Namespace, structure: PreTrainedModel) -> None:
    """Raise ValueError if a file that will be written exists and is no mask, or one of another base."""
    own = None
    for typed in dict.fromkeys(args.sparsities):
        file = Path(args.out) / args.name / f"{typed}_mask.pt"
        check_target(file, "name")
        made_of = read(file, mapped=True).meta.get("base_hash") if file.exists() else None
        if made_of is None:
            continue
        own = own or remembered_hash(args.base, structure)
        if made_of != own:
            raise ValueError(f"name={args.name}: {file} is a mask of another base: give another name")


def make_masks(args: argparse.Namespace) -> tuple[ModelPair, dict[float, Mask]]:
    """Check everything, then collect gradients and select. Raises one ValueError with all problems found."""
    problems = Problems()
    attempt = problems.attempt
    attempt(check_name, args.name)
    sparsities = attempt(check_sparsities, args.sparsities)
    protect = [attempt(Mask.load, path) for path in args.protect]
    kept = [mask for mask in protect if mask is not None]
    kind = (args.granularity, DEFAULT_BLOCK if args.block is None else args.block)
    rule = attempt(Rule, args.score, args.per, args.smallest, args.seed or 0, kept, *kind)
    needs = SALIENCIES[args.score].needs if args.score in SALIENCIES else ("base",)
    pair = attempt(open_pair, args.base, args.tuned, scope=args.scope, model=args.model, needs=needs)
    quota = attempt(Quota, pair, sparsities, rule) if pair and sparsities and rule else None
    if pair:
        structure = meta_model(pair.structure)
        # else what the mask trains could not be turned into a folder like the base
        attempt(check_writable, pair.sources["base"], structure)
        if not name_problem(args.name):
            attempt(check_replaced, args, structure)
    data, collected = None, None
    if pair and args.score in DATA_DRIVEN:
        given = {flag: getattr(args, flag) for flag, *_ in data_flags() if getattr(args, flag) is not None}
        settings = SaliencySettings(**given, seed=args.seed or 0)
        data = attempt(load_saliency_data, settings, get_task, args.base, pair.structure)
    problems.refuse()
    assert pair is not None and quota is not None
    if data is not None:
        with tqdm(total=len(data.batches), unit=" batches", desc="gradients", disable=None) as bar:
            collected = collect(data, pair.scope, SALIENCIES[args.score].collects, progress=bar.update)
    total = 2 * sum(quota.sizes.values())
    with tqdm(total=total, unit=" entries", unit_scale=True, desc="extract", disable=None) as bar:
        masks = select(quota, progress=bar.update, collected=collected)
    check_kept(masks)
    return pair, masks


def check_kept(masks: dict[float, Mask]) -> None:
    """Raise ValueError for masks with which nothing would train."""
    empty = [str(sparsity) for sparsity, mask in masks.items() if not mask.n_kept]
    if empty:
        raise ValueError(
            f"sparsity={', '.join(empty)}: no entry would be kept, and nothing would train: the share is "
            "less than one entry (or row), or base equals tuned where entries are free; no file is written"
        )


def write_masks(args: argparse.Namespace, folder: Path, pair: ModelPair, masks: dict[float, Mask]) -> None:
    """Write mask files, named by the sparsities as typed, and summary.json."""
    entries = {}
    for typed in dict.fromkeys(args.sparsities):
        mask, file = masks[float(typed)], f"{typed}_mask.pt"
        mask.save(folder / file, format=args.format, all_shapes=pair.shapes)
        per_tensor = {name: {"kept": mask.kept(name), "entries": mask.numel(name)} for name in mask.names}
        per_layer = kept_by_layer(pair, mask)
        entries[typed] = {"file": file, **mask.meta, "per_tensor": per_tensor, "per_layer": per_layer}
    n_total = next(iter(masks.values())).n_total
    write_json(folder / "summary.json", {"entries": n_total, "format": args.format, "masks": entries})


def print_table(args: argparse.Namespace, folder: Path, masks: dict[float, Mask]) -> None:
    lines = [["file", "sparsity", "kept", "of", "too few by", "threshold"]]
    for typed in dict.fromkeys(args.sparsities):
        mask = masks[float(typed)]
        counts = [f"{n:,}" for n in (mask.n_kept, mask.n_total, mask.meta["shortfall"])]
        threshold = mask.meta["threshold"]  # a number, or one for each tensor or layer
        if isinstance(threshold, dict):
            shown = f"per {args.per}"
        else:
            shown = "-" if threshold is None else f"{threshold:.4g}"
        lines.append([f"{folder}/{typed}_mask.pt", typed, *counts, shown])
    print(*aligned(lines), sep="\n")


def override(key: str, value: str) -> str:
    """A setting as a shell takes it, the value quoted for Hydra where it needs that."""
    plain = key == "datasets" or re.fullmatch(r"[\w./~+-]+", value)
    return shlex.quote(f"{key}={value}" if plain else f'{key}="{value}"')


def print_next_command(args: argparse.Namespace, folder: Path, structure: str) -> None:
    typed = "0.9" if "0.9" in args.sparsities else args.sparsities[-1]
    settings = {
        "mask_path": f"{folder}/{typed}_mask.pt",
        "loss": "sft",
        "model": "blank_model",
        "model.name_or_path": structure,
        # weights without a config and a tokenizer of their own
        "model.archive": args.base if structure != args.base else None,
        "datasets": "[TASK]",
        "data_dir": args.data_dir or (run_settings(Path(args.tuned)).data_dir if args.tuned else None),
        "exp_name": f"{args.name}_{typed}",
        "lr": "1e-4",
    }
    given = [override(key, value) for key, value in settings.items() if value is not None]
    print(
        "\nnext, adapt (a mask wants about ten times the learning rate of dense training):\n"
        f"  python -u train_single_gpu.py {' '.join(given)}"
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    unused = unused_flags(args)
    if unused:
        print(
            f"not used here: {', '.join(unused)} (--score {args.score} --granularity {args.granularity})",
            file=sys.stderr,
        )
    folder = Path(args.out) / args.name
    try:
        with contextlib.nullcontext() if name_problem(args.name) else working_in(folder):
            pair, masks = make_masks(args)
            write_masks(args, folder, pair, masks)
    except (ValueError, OSError) as error:
        other_words = {"sparsity": "sparsities", "model.policy_dtype": "dtype"}
        sys.exit(f"extract_masks.py: {with_flags(error, args, **other_words)}")
    remedy = "--scope REGEX" if args.scope is None else None
    print(share_sentence(pair.share.share, pair.share.largest, remedy))
    print_table(args, folder, masks)
    print_next_command(args, folder, pair.structure)


if __name__ == "__main__":
    main()
