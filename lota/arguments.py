"""Arguments that the commands with a model share, and what is loaded by them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from lota.config import default_cache
from lota.config_checks import CHAT_TEMPLATES
from lota.models import load_tokenizer
from lota.prompting import Limits, Prompter, recorded_choice

Add = Callable[..., Any]  # argparse's add_argument


def add_shared(add: Add) -> None:
    """Where data, tokenizer and results are; how the model is loaded and prompted."""
    add("--tokenizer_path", help="where the tokenizer is, if not with the model")
    add(
        "--data_dir",
        default=default_cache(),
        help="holds tasks/<task>/<split>.* and sharegpt_data/; default $PROJECT_CACHE, else ~/.cache/lota",
    )
    add(
        "--out",
        help="folder of what is written; default: the model's; $PROJECT_CACHE/results/ID for a hub id",
    )
    add(
        "--chat_template",
        choices=CHAT_TEMPLATES,
        help="prompts in the tokenizer's chat template; default: as the model's run had it, else never",
    )
    add("--dtype", help="float32, bfloat16 or float16; default: the model's own")
    add("--device", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")


def prompter_of(args: argparse.Namespace, model: str, limits: Limits | None = None) -> Prompter:
    """How a model is prompted; its tokenizer is loaded for that."""
    tokenizer = load_tokenizer(args.tokenizer_path or model)
    return Prompter(tokenizer, args.chat_template or recorded_choice(model), limits)
