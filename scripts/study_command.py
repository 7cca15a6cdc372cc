"""The command line of the studies: workloads, seeds and folder; each workload has one process at a time."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lota.places import holding
from scripts.cells import logger
from scripts.methods import RATES
from scripts.study import Study
from scripts.workloads import BASES, ROOT, SMOKE, WORKLOADS, Workload

SEEDS = (0, 1, 2)
USUAL = ("toy_sort", "sql on stories260K", "gsm8k on stories260K", "samsum on study-llama")  # workloads

S = TypeVar("S", bound=Study)


def study_parser(
    about: str | None,
    workloads: Iterable[str] = WORKLOADS,
    default: Sequence[str] = USUAL,
    option: str = "--workloads",
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "study", help="folder of studies that share calibrations (study)")
    add(option, nargs="+", choices=list(workloads), default=default, help=f"({', '.join(default)})")
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help="of what is reported (0 1 2)")
    add("--smoke", action="store_true", help="a few steps of a toy task, to see that everything runs")
    add("--report", action="store_true", help="tables, figure and page of what is there, no run")
    return parser


def run_study(
    args: argparse.Namespace,
    run: Callable[[S, argparse.Namespace], None],
    sparsities: Sequence[float] = (0.9,),
    workloads: Mapping[str, Workload] = WORKLOADS,
    kind: type[S] = Study,  # type: ignore[assignment]
    smoke: Mapping[str, Workload] = {"smoke": SMOKE},
) -> None:
    """Call `run` for every workload, each by one process at a time."""
    chosen = smoke if args.smoke else {name: workloads[name] for name in args.workloads}
    for name in in_study(args.out, {name: workload.base for name, workload in chosen.items()}):
        rates = (1e-3, 1e-2) if args.smoke else RATES
        study = kind(args.out.resolve(), name, chosen[name], sparsities=sparsities, rates=rates)
        study.base()
        run(study, args)


def in_study(out: Path, bases: Mapping[str, str]) -> Iterator[str]:
    """The names of files of results, each held while it is worked on. bases: name -> base.

    Ends the process if a base is not there.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    for base in (BASES[name] for name in bases.values()):
        if not base.source.is_dir():
            sys.exit(f"{base.source} is not there: {base.remedy}")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in bases:
        with holding(out / f"{name}.jsonl"):
            yield name
