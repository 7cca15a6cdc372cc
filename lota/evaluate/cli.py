"""What the commands that run a model share: their flags, what is loaded by them, and their processes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import CHAT_TEMPLATES, default_cache
from lota.data.prompts import NO_CHAT_TEMPLATE, Limits, Prompter
from lota.distributed.processes import ProcessLost, joined, processes
from lota.evaluate.batching import context_length
from lota.evaluate.engine import Engine, TransformersEngine
from lota.evaluate.engine_choice import CONCURRENCY, OPENAI, TIMEOUT, TRANSFORMERS, add_engine_flags
from lota.evaluate.engine_openai import OpenAIEngine
from lota.evaluate.engine_outside import OutsideModel
from lota.evaluate.engine_shared import SharedEngine, answer_first
from lota.evaluate.engine_vllm import VllmEngine
from lota.models.hub import DELTA_FILE, hub_file, local_copy
from lota.models.loading import cast_parameters, dtype_of, load_model, load_tokenizer
from lota.models.provenance import recorded_prompts
from lota.models.scope import load_config
from lota.share.delta.attach import attach
from lota.share.delta.format import common_dtype
from lota.share.delta.reader import Delta


def model_parser(description: str | None, model_flag: str) -> argparse.ArgumentParser:
    """A parser with the flags that name a model, its data and its results; the model is `args.model`."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add(model_flag, dest="model", metavar="MODEL", required=True, help="Hugging Face folder or hub id")
    add(
        "--delta",
        nargs="+",
        default=[],
        help="delta files, or org/name[@revision], to put on top of their base",
    )
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
    add_engine_flags(parser)
    return parser


def model_label(args: argparse.Namespace) -> str:
    """What results call the model: its name, and those of the deltas on top of it."""
    return " + ".join([args.model, *args.delta])


def results_folder(model: str) -> Path:
    """Where a model's results are by default: in its own folder, else in $PROJECT_CACHE/results/<hub id>."""
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else Path(default_cache()).expanduser() / "results" / model


def too_small(args: argparse.Namespace, least: Mapping[str, int]) -> list[str]:
    """A line per flag whose number is below its least one."""
    given = {flag: getattr(args, flag) for flag in least}
    return [
        f"--{flag} {value}: must be at least {least[flag]}"
        for flag, value in given.items()
        if value is not None and value < least[flag]
    ]


def choose_results_folder(args: argparse.Namespace) -> Path:
    """Where results go. Raises ValueError if several deltas leave that open, for a file, or for a
    folder that cannot be written.
    """
    if len(args.delta) > 1 and not args.out:
        raise ValueError("--delta names several files: say with --out where their results go")
    if args.out:
        out = Path(args.out).expanduser()
    elif args.delta:
        path, named = Path(args.delta[0]).expanduser(), hub_file(args.delta[0], DELTA_FILE)
        out = path.with_name(f"{path.stem}_results")
        if named is not None and not path.exists():
            out = results_folder(named.repo)
    else:
        out = results_folder(args.model)
    above = next(path for path in (out, *out.parents) if path.exists())
    if above.is_file():
        raise ValueError(f"--out {out}: {above} is a file; name a folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"--out {out}: you may not write in {above}; name another folder")
    return out


def make_prompter(args: argparse.Namespace, *, whole_prompts: bool = True) -> Prompter:
    """How the model is prompted: as in its training run, unless flags say otherwise.

    whole_prompts: do not cut prompts as that run did.
    """
    chat_template, limits = recorded_prompting(
        str(local_copy(args.delta[-1], DELTA_FILE, bare=True)) if args.delta else args.model
    )
    tokenizer = load_tokenizer(args.model, args.tokenizer_path)
    return Prompter(tokenizer, args.chat_template or chat_template, None if whole_prompts else limits)


def recorded_prompting(path: str) -> tuple[str, Limits | None]:
    """chat_template and limits of the run that a folder or delta comes from; never and None if not known."""
    found = recorded_prompts(path)
    lengths = [n for n in (found["max_length"], found["max_prompt_length"]) if isinstance(n, int)]
    return str(found["chat_template"] or NO_CHAT_TEMPLATE), Limits(*lengths) if len(lengths) == 2 else None


def load_chosen_model(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, archive: str | None = None
) -> PreTrainedModel:
    """The model, its deltas on top. Raises ValueError for deltas, dtype or device before it loads.

    The deltas are put on top before weights are cast to a narrower dtype than that of their files.
    """
    deltas = open_deltas(args)
    stored = load_config(args.model).dtype
    own = stored if isinstance(stored, torch.dtype) else torch.float32
    dtype = dtype_of(args.dtype) if args.dtype else own
    device = args.device or str(processes().device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    wide = functools.reduce(common_dtype, (delta.widest for delta in deltas if delta.names), dtype)
    model = load_model(args.model, archive=archive, dtype=wide, device=device, tokenizer=tokenizer)
    attach(model, *deltas)
    if wide != dtype:
        cast_parameters(model, dtype)
    return model


def open_deltas(args: argparse.Namespace) -> list[Delta]:
    """The deltas that are asked for. Raises ValueError for one that cannot be read, or is there twice."""
    deltas = [Delta.open(path) for path in args.delta]
    twice = [str(delta.path) for i, delta in enumerate(deltas) if delta in deltas[:i]]
    if twice:
        raise ValueError(f"--delta {twice[0]} is there twice, or a copy of another: name each delta once")
    return deltas


# Engines


@contextlib.contextmanager
def opened_engine(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[Engine]:
    """The engine asked for, with its model loaded. Of several processes the first one calls this, when all
    that it was given has been checked, and the others `help_first`.

    batch_size: of the transformers engine. Errors: as `load_chosen_model`, and those of the engines.
    """
    processes().broadcast("load")
    with contextlib.ExitStack() as stack:
        engine = _open(args, tokenizer, batch_size, stack)
        if processes().count > 1:
            processes().same("the model", dict(engine.key))
            engine = stack.enter_context(SharedEngine(engine, processes()))
        yield engine


def help_first(args: argparse.Namespace, batch_size: int) -> None:
    """What all but the first process do: load the model and work on what the first one deals out."""
    processes().broadcast("")  # it has checked what it was given
    with contextlib.ExitStack() as stack:
        engine = _open(args, make_prompter(args).tokenizer, batch_size, stack)
        processes().same("the model", dict(engine.key))
        answer_first(engine, processes())


def _open(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, batch_size: int, stack: contextlib.ExitStack
) -> Engine:
    if args.engine == TRANSFORMERS:
        model = load_chosen_model(args, tokenizer, getattr(args, "archive", None))
        return TransformersEngine(model, tokenizer, batch_size)
    outside, concurrency = OutsideModel(args.model, tokenizer), args.concurrency or CONCURRENCY
    if args.engine == OPENAI:
        engine = OpenAIEngine(
            outside,
            args.base_url,
            served_model=args.served_model,
            context=_known_context(args.model),
            concurrency=concurrency,
            timeout=args.timeout or TIMEOUT,
        )
        return stack.enter_context(engine)
    return VllmEngine(
        outside,
        tokenizer=args.tokenizer_path,
        dtype=args.dtype,
        deltas=open_deltas(args),
        concurrency=concurrency,
    )


def _known_context(model: str) -> int | None:
    """The context of a model that need not be here; None if it is not."""
    try:
        return context_length(load_config(model))
    except ValueError:
        return None


# Processes

ANOTHER_ENDED = "another process has ended: look at its output; the same command continues from what is done"


class _Told(Exception):
    """The command has failed, and one of its processes tells why."""


def run(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    work: Callable[[argparse.Namespace], str],
    argv: Sequence[str] | None,
) -> int:
    """The exit code of a command that may run in several processes; the first one prints what `work` returns.

    An error on any process ends all of them, and is told once.
    """
    try:
        with joined() as those:
            try:
                said = _work(parse, work, argv)
            except (ValueError, OSError, ProcessLost) as error:
                if those.tells():
                    print(
                        f"error: {ANOTHER_ENDED if isinstance(error, ProcessLost) else error}",
                        file=sys.stderr,
                    )
                raise _Told from error
            except BaseException:
                those.tells()  # Python shows it, and the others need not
                raise
    except (_Told, ProcessLost):
        return 1
    except ValueError as error:  # the processes could not meet
        print(f"error: {error}", file=sys.stderr)
        return 1
    if those.first:
        print(said)
    return 0


def _work(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    work: Callable[[argparse.Namespace], str],
    argv: Sequence[str] | None,
) -> str:
    if processes().first:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for library in ("httpx", "httpx2"):  # a line for every request
            logging.getLogger(library).setLevel(logging.WARNING)
        args = parse(argv)
    else:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            args = parse(argv)
    processes().same("the command line", list(sys.argv[1:] if argv is None else argv))
    return work(args)
