"""Which families of models packing=true takes, tried on a tiny model of each (docs/MODELS.md, Packing).

python -m scripts.packing_families               # all families; or those named
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import defaultdict

import torch

from lota.models.loading import turn_dropout_off
from lota.models.packed import ATTENTION, pack_attention
from scripts.family_models import families, tiny_model

GROUPS = {
    "cut": "attention inside each example",
    "whole": "a mask of the whole row",
    "refused": "refused",
    "": "not run: no small model, or none that runs on text alone",
}


def group_of(family: str) -> str:
    """A key of GROUPS. Weights are widened, so that whatever depends on something shows."""
    try:
        model = tiny_model(family)
        turn_dropout_off(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            model(input_ids=torch.arange(4, 12)[None], use_cache=False)
    except Exception:  # of any kind: transformers', or of a package that is not there
        return ""
    try:
        pack_attention(model, family)
    except ValueError:
        return "refused"
    return "cut" if model.config._attn_implementation in ATTENTION.values() else "whole"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found: dict[str, list[str]] = defaultdict(list)
    for family in args.families or families():
        found[group_of(family)].append(family)
    print("| what happens | families |\n| --- | --- |")
    for group, text in GROUPS.items():
        if names := found[group]:
            print(f"| {text} ({len(names)}) | {', '.join(names)} |")


if __name__ == "__main__":
    main()
