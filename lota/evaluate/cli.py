"""Arguments that the commands with a model share, and what is loaded by them."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lota.config import CHAT_TEMPLATES, default_cache
from lota.data.prompts import Limits, Prompter, recorded_choice
from lota.models.loading import cast_parameters, dtype_of, load_config, load_model, load_tokenizer
from lota.share.delta.attach import attach
from lota.share.delta.format import common_dtype
from lota.share.delta.reader import Delta


def load_model_and_tokenizer(
    name_or_path: str,
    *,
    tokenizer: Any = None,
    tokenizer_path: str | None = None,
    archive: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    deltas: Sequence[Delta] = (),
) -> tuple[Any, Any]:
    """Model and tokenizer as the scripts name them; None stands for the model's dtype, a GPU if there is one.

    tokenizer: one that is loaded already. deltas: put on top, before weights are cast to a narrower dtype
    than that of their files. Errors: ValueError, for the tokenizer, dtype or device before the model loads.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(tokenizer_path or name_or_path)
    chosen = dtype_of(dtype) if dtype else load_config(name_or_path).dtype or torch.float32
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    wide = functools.reduce(common_dtype, (delta.widest for delta in deltas if delta.names), chosen)
    model = load_model(name_or_path, archive=archive, dtype=wide, device=device, tokenizer=tokenizer)
    attach(model, *deltas)
    if wide != chosen:
        cast_parameters(model, chosen)
    return model, tokenizer


def results_folder(model: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Where results go: `out`, else the model's own folder, else $PROJECT_CACHE/results/<hub id>."""
    if out is not None:
        return Path(out).expanduser()
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else Path(default_cache()).expanduser() / "results" / model


Add = Callable[..., Any]  # argparse's add_argument


def add_shared(add: Add) -> None:
    """Where data, tokenizer and results are; how the model is loaded and prompted."""
    add("--delta", nargs="+", default=[], help="delta files to put on top of the model, which is their base")
    add("--tokenizer_path", help="where the tokenizer is, if not with the model")
    add(
        "--data_dir",
        default=default_cache(),
        help="holds tasks/<task>/<split>.* and sharegpt_data/; default $PROJECT_CACHE, else ~/.cache/lota",
    )
    add(
        "--out",
        help="folder of what is written; default: the model's; $PROJECT_CACHE/results/ID for a hub id; "
        "with --delta NAME.safetensors NAME_results beside it",
    )
    add(
        "--chat_template",
        choices=CHAT_TEMPLATES,
        help="prompts in the tokenizer's chat template; default: as the model's run had it, else never",
    )
    add("--dtype", help="float32, bfloat16 or float16; default: the model's own")
    add("--device", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")


def trained_as(args: argparse.Namespace, model: str) -> str:
    """What records how the model was trained: the last delta, or the model's folder."""
    return args.delta[-1] if args.delta else model


def prompter_of(args: argparse.Namespace, model: str, limits: Limits | None = None) -> Prompter:
    """How a model is prompted; its tokenizer is loaded for that."""
    tokenizer = load_tokenizer(args.tokenizer_path or model)
    return Prompter(tokenizer, args.chat_template or recorded_choice(trained_as(args, model)), limits)


def results_of(args: argparse.Namespace, model: str) -> Path:
    """Where results go. Raises ValueError where several deltas leave that open."""
    if not args.delta or args.out:
        return results_folder(model, args.out)
    if len(args.delta) > 1:
        raise ValueError("--delta names several files: say with --out where their results go")
    path = Path(args.delta[0]).expanduser()
    return path.with_name(f"{path.stem}_results")


def loaded(
    args: argparse.Namespace, model: str, prompter: Prompter, archive: str | None = None
) -> tuple[Any, Any]:
    """Model, its deltas on top, and tokenizer. Raises ValueError, for the deltas' files before it loads."""
    deltas = [Delta.open(path) for path in args.delta]
    how = {"archive": archive, "dtype": args.dtype, "device": args.device, "deltas": deltas}
    return load_model_and_tokenizer(model, tokenizer=prompter.tokenizer, **how)


def named(args: argparse.Namespace, model: str) -> str:
    """What results call the model: its name, and those of the deltas on top of it."""
    return " + ".join([model, *args.delta])
