"""One table of methods over seeds, from the run folders below ROOT.

    python -m scripts.summarize ROOT --task gsm8k --out sweep

Runs whose settings differ in the seed, and in the mask that belongs to it, are repetitions of one method. A
run counts once its last checkpoint was converted and evaluated (scripts/score_runs.py). Figures of the same
runs: plot_runs.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from lota.report.method_table import score_on, summarize_methods, summary_text, write_table
from lota.report.reading import read_base


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder with the runs, at any depth")
    parser.add_argument("--task", required=True, help="which score")
    parser.add_argument("--base", help="folder that the base model's results were written to")
    parser.add_argument("--out", type=Path, help="for summary.md, summary.json, summary.csv (default: ROOT)")
    args = parser.parse_args(arguments)
    out = args.out or args.root
    try:
        rows = summarize_methods(args.root, args.task)
        base = score_on(args.task, read_base(args.base)) if args.base else None
        write_table(out, rows, args.task, base)
    except (ValueError, OSError) as error:
        sys.exit(f"summarize.py: {error}")
    print(summary_text(rows, args.task, base))
    print(f"\nfiles: {out}/summary.md, summary.json, summary.csv")


if __name__ == "__main__":
    main()
