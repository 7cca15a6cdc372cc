"""The whole method on a tiny model of every causal-LM family of transformers, offline on a CPU.

    python -m scripts.families                        # all families; --jobs 2 for two at a time
    python -m scripts.families llama mixtral --keep work
    python -m scripts.families --json found.json --write docs/MODELS.md

Each family is calibrated, its mask extracted at s=0.9, adapted with it and converted; a delta is taken,
applied and reverted. `whole`: all of that ended well, and the bits are what they should be (`check`).
`refused`: a command said in plain words why it does not take this model. `failed`: a command crashed or took
too long. `wrong`: all commands ended well, but not every check holds. The exit status is 1 for these two.

Each family runs in a fork of this process, which has imported the libraries of all commands.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts import forks
from scripts.family_checks import Wrong, check
from scripts.family_models import families, write_family
from scripts.fault_cases import TASK

LIMIT = 120  # seconds for one family
TRAIN = (
    "train_single_gpu.py", "loss=sft", "datasets=[letters]", "model.name_or_path=base", "batch_size=4",
    "max_length=48", "max_prompt_length=24", "warmup_steps=1", "lr=1e-2", "do_first_eval=false",
    "eval_every=1000", "sample_during_eval=false", "minimum_log_interval_secs=0",
)  # fmt: skip
MASK, POLICY = "masks/letters/0.9_mask.pt", "cache/adapted/epoch-1/policy.pt"
DELTA = ("-m", "lota.delta")
STEPS: dict[str, tuple[str, ...]] = {
    "calibration": (*TRAIN, "exp_name=dense"),
    "mask extraction": ("extract_masks.py", "--base", "base", "--tuned", "cache/dense/epoch-1",
                        "--sparsities", "0.9", "--name", "letters"),
    "adaptation": (*TRAIN, "exp_name=adapted", f"mask_path={MASK}"),
    "conversion": ("convert_policy_to_hf_resize.py", "--model_path", "base", "--policy_path", POLICY,
                   "--save_path", "converted"),
    "delta extraction": (*DELTA, "extract", "--base", "base", "--tuned", POLICY, "--mask", MASK, "--out",
                         "delta.safetensors"),
    "delta application": (*DELTA, "apply", "--model", "base", "--delta", "delta.safetensors", "--out",
                          "applied"),
    "delta reversion": (*DELTA, "revert", "--model", "applied", "--delta", "delta.safetensors", "--out",
                        "reverted"),
}  # fmt: skip
# Where a command may refuse a model, and in which words: later it would have cost the user a training run.
MAY_REFUSE = {"calibration": "", "delta extraction": "cannot be written as it was read"}
RESULTS = "## Results"
VERDICTS = ("whole", "refused", "failed", "wrong")


@dataclass
class Result:
    """What came of one family."""

    family: str
    model: str = ""  # class
    verdict: str = "failed"
    share: float | None = None  # of the matrices outside embeddings, head and routers: what the scope takes
    reason: str = ""  # of everything but `whole`: step and sentence
    seconds: float = 0.0
    times: dict[str, float] = field(default_factory=dict)  # seconds per step


class Refused(Exception):
    """A command refused the model in plain words."""


# One family


def run_family(family: str, work: Path) -> Result:
    """The chain on one family, in the empty folder `work`."""
    result, began = Result(family), time.monotonic()
    try:
        write_family(family, work / "base")
        (work / "tasks").mkdir()
        text = TASK.format(name="letters", step=7, preferences=False)
        (work / "tasks" / "letters.py").write_text(text)
        for step, argv in STEPS.items():
            start = time.monotonic()
            run_step(step, argv, work)
            result.times[step] = round(time.monotonic() - start, 2)
        result.model, result.share = check(work, work / MASK, work / POLICY)
        result.verdict = "whole"
    except Refused as error:
        result.verdict, result.reason = "refused", str(error)
    except Wrong as error:
        result.verdict, result.reason = "wrong", str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({where})"
    result.seconds = round(time.monotonic() - began, 1)
    return result


def run_step(step: str, argv: Sequence[str], work: Path) -> None:
    """Run a command. Raises Refused with its sentence, RuntimeError when it crashed."""
    log = work / f"{step.replace(' ', '_')}.log"
    status = forks.start(argv, work, log)
    if status == 0:
        return
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()] or [""]
    crashed = any("Traceback" in line or "HYDRA_FULL_ERROR" in line for line in lines)
    first = next((i for i, line in enumerate(lines) if "error: " in line), len(lines) - 1)
    sentence = " ".join([lines[first].rpartition("error: ")[2], *lines[first + 1 :]])
    if status < 0 or crashed or step not in MAY_REFUSE or MAY_REFUSE[step] not in sentence:
        raise RuntimeError(f"{step}: exit status {status}: {' | '.join(lines[-3:])}")
    raise Refused(f"{step}: {sentence.replace(str(work) + '/', '')}")


# All of them


def _work(family: str, place: Path) -> None:
    """In the fork: run one family, and leave its result in a file."""
    os.setpgid(0, 0)  # so that its commands end with it
    for stream in (1, 2):
        os.dup2(os.open(place / "out.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    work = place / "work"
    work.mkdir()
    result = run_family(family, work)
    (place / "result.json").write_text(json.dumps(asdict(result)))


def run(
    names: Sequence[str], jobs: int = 1, limit: float = LIMIT, keep: Path | None = None
) -> Iterator[Result]:
    """The result of each family, as they come. keep: folder that the families' folders stay in."""
    forks.import_all()
    context, waiting = multiprocessing.get_context("fork"), list(names)
    running: dict[str, tuple[Any, Path, float]] = {}
    with tempfile.TemporaryDirectory(prefix="families") as temporary:
        while waiting or running:
            while waiting and len(running) < jobs:
                family = waiting.pop(0)
                place = (keep or Path(temporary)).resolve() / family
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                process = context.Process(target=_work, args=(family, place))
                process.start()
                running[family] = process, place, time.monotonic()
            for family, (process, place, began) in list(running.items()):
                process.join(0.05)
                late = time.monotonic() - began > limit
                if process.is_alive() and not late:
                    continue
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGKILL)
                    process.join()
                yield _result(family, place, limit if late else None)
                del running[family]
                if keep is None:
                    shutil.rmtree(place)


def _result(family: str, place: Path, limit: float | None) -> Result:
    file = place / "result.json"
    if file.is_file():
        return Result(**json.loads(file.read_text()))
    logs = sorted((place / "work").glob("*.log"), key=lambda path: path.stat().st_mtime_ns)
    step = logs[-1].stem.replace("_", " ") if logs else "making the model"
    why = "the process ended" if limit is None else f"not done after {limit:g} s"
    return Result(family, reason=f"{step}: {why}", seconds=limit or 0.0)


def write_results(found: Sequence[Result], file: Path) -> None:
    """Write the results into a page, in place of what stands below its heading `## Results`."""
    by_verdict: dict[str, list[Result]] = {verdict: [] for verdict in VERDICTS}
    for result in sorted(found, key=lambda result: result.family):
        by_verdict[result.verdict].append(result)
    counts = ", ".join(f"{len(results)} {verdict}" for verdict, results in by_verdict.items())
    lines = [RESULTS, "", f"transformers {version('transformers')}, torch {version('torch')}: {counts}.", ""]
    lines += ["| family | model | scope |", "| --- | --- | ---: |"]
    lines += [f"| {r.family} | {r.model} | {r.share:.2f} |" for r in by_verdict["whole"]]
    for verdict in VERDICTS[1:]:
        if by_verdict[verdict]:
            lines += ["", f"| {verdict} | why |", "| --- | --- |"]
            lines += [f"| {r.family} | {cell(r.reason)} |" for r in by_verdict[verdict]]
    prose = file.read_text(encoding="utf-8").partition(RESULTS)[0]
    file.write_text(prose + "\n".join(lines) + "\n", encoding="utf-8")


def cell(reason: str) -> str:
    """A reason without the step at which every refusal is told, as Markdown shows it in a table."""
    return reason.removeprefix("calibration: ").removeprefix("base: ").replace("|", "/").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one family")
    parser.add_argument("--json", type=Path, help="file for every result")
    parser.add_argument("--write", type=Path, help="page to put the results into")
    parser.add_argument("--keep", type=Path, help="folder where the families' files stay")
    args = parser.parse_args()
    if unknown := sorted({*args.families} - {*families()}):
        parser.error(f"unknown family {unknown[0]}: give model types that AutoModelForCausalLM knows")
    found, began = [], time.monotonic()
    for result in run(args.families or families(), args.jobs, args.limit, args.keep):
        found.append(result)
        share = "" if result.share is None else f" scope {result.share:.2f}"
        print(
            f"{result.family:26} {result.verdict:8}{result.seconds:6.1f} s{share} {result.reason}", flush=True
        )
    counts = Counter(result.verdict for result in found)
    print(f"{', '.join(f'{counts[v]} {v}' for v in VERDICTS)} in {time.monotonic() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in found], indent=1) + "\n")
    if args.write:
        write_results(found, args.write)
    sys.exit(bool(counts["failed"] or counts["wrong"]))


if __name__ == "__main__":
    main()
