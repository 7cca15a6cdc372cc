"""Figures and one HTML page of any number of runs.

    python plot_runs.py $PROJECT_CACHE/gsm8k_dense $PROJECT_CACHE/gsm8k_lota_* --out figures

writes figures/index.html, which needs no other file, and its pictures as PNG: losses, scores against
sparsity, masks by layer and module and their overlap, forgetting matrices of sequences, rewards of preference
losses, memory and speed. What a folder does not have is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lota.report.page import Section, write_page
from lota.report.reading import RunRecord, TaskScore, read_base, read_runs
from lota.report.replicates import find_replicates
from lota.report.run_sections import (
    curve_sections,
    mask_sections,
    memory_and_speed,
    overview,
    score_sections,
)
from lota.report.sequence_sections import sequence_comparison, sequence_sections


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, of a training or of lotto.py")
    parser.add_argument(
        "--out", default="figures", metavar="FOLDER", help="where to write (default: figures)"
    )
    parser.add_argument(
        "--base", metavar="FOLDER", help="folder of the base model's evaluation: a level to compare with"
    )
    parser.add_argument("--title", default="Runs", help="of the page")
    return parser.parse_args(arguments)


def make_sections(runs: Sequence[RunRecord], base: Sequence[TaskScore] = ()) -> list[Section]:
    """All that the runs have; the last section names what they do not have."""
    replicates = find_replicates([run for run in runs if not run.is_sequence])
    trained = [run for found in replicates for run in found.runs]
    sequences = [run for run in runs if run.stages]
    notes: list[str] = []
    sections = [overview(replicates)] if trained else []
    sections += [*curve_sections(replicates), *score_sections(replicates, base)]
    sections += mask_sections(trained, notes)
    sections += sequence_comparison(sequences)
    sections += [section for run in sequences for section in sequence_sections(run)]
    sections += memory_and_speed(replicates)
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    if notes:
        sections.append(Section("Left out", items=notes))
    return sections


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        base = read_base(args.base) if args.base else []
        runs = read_runs(args.runs)
        sections = make_sections(runs, base)
        files = write_page(Path(args.out), args.title, sections)
    except (ValueError, OSError) as error:
        sys.exit(f"plot_runs.py: {error}")
    for note in sections[-1].items:
        print(f"left out: {note}")
    print(f"{len(runs)} runs, {len(files) - 1} pictures: {files[0]}")


if __name__ == "__main__":
    main()
