"""Turn a run's policy.pt, or a delta, into a folder that transformers loads (AutoModelForCausalLM, AutoTokenizer).

python convert_policy_to_hf_resize.py --model_path BASE --policy_path RUN/epoch-1/policy.pt --save_path RUN/epoch-1/
"""  # noqa: E501

from __future__ import annotations

import argparse
import logging
import shlex
import sys

from lota.delta import apply
from lota.models.loading import DTYPES, dtype_of
from lota.share.convert import VOCABULARIES, convert_policy
from lota.utils import with_flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model_path", required=True, help="the base: folder or hub id (config, names, dtypes)"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--policy_path", help="policy.pt, or the folder that holds it")
    what.add_argument(
        "--delta", help="delta file of the base, or org/name[@revision], instead of a policy.pt"
    )
    parser.add_argument("--save_path", required=True, help="folder to write; may be the one with policy.pt")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of every weight (default: as in the base's files)"
    )
    parser.add_argument("--tokenizer_path", help="folder or hub id (default: the run's, else the base's)")
    parser.add_argument("--max_shard_size", default="2GB", help="largest weight file (default 2GB)")
    parser.add_argument(
        "--vocab",
        choices=VOCABULARIES,
        default="checkpoint",
        help="embedding rows to write: the checkpoint's (default), or cut back to the base's",
    )
    parser.add_argument("--pad_token", help="token that training added (default: the run's model.pad_token)")
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in ("dtype", "tokenizer_path", "pad_token") if getattr(args, name)]
    if args.delta and given:
        parser.error(
            f"{', '.join(given)}: a delta keeps the base's dtypes and tokenizer; drop it, or --delta"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    """Convert, say what was written and which command comes next."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if args.delta:
            print(f"wrote {apply(args.model_path, args.delta, args.save_path, args.max_shard_size)}")
            return
        done = convert_policy(
            args.model_path,
            args.policy_path,
            args.save_path,
            dtype=dtype_of(args.dtype) if args.dtype else None,
            tokenizer_path=args.tokenizer_path,
            max_shard_size=args.max_shard_size,
            vocab=args.vocab,
            pad_token=args.pad_token,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {with_flags(error, args, out='save_path')}")
    dtype, datasets = str(done.dtype).removeprefix("torch."), ",".join(done.datasets) or "gsm8k"
    print(f"wrote {done.folder} ({dtype}, {done.rows} embedding rows, step {done.step_idx})")
    folder = shlex.quote(str(done.folder))
    data = f" --data_dir {shlex.quote(done.data_dir)}" if done.data_dir else ""
    print(f"next: python eval_model_all.py --model {folder} --datasets {shlex.quote(datasets)}{data}")


if __name__ == "__main__":
    main()
