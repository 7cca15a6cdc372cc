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
import copy
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts import forks
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


class Wrong(Exception):
    """A check does not hold."""


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
        check(work, result)
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


# What must hold


def check(work: Path, result: Result) -> None:
    """Raise Wrong for the first thing that is not as it should be; the file formats are read without lota."""
    from lota.masks import Mask
    from lota.models.policy import read_policy
    from lota.models.scope import scope_share

    base, expected = load(work / "base")
    result.model = type(base).__name__
    mask, state = Mask.load(work / MASK), read_policy(work / POLICY).state
    result.share = round(scope_share(base, mask.names).share, 3)
    check_trained(base, state, mask)
    converted, found = load(work / "converted")
    if found != expected or expected["missing_keys"]:
        raise Wrong(f"transformers finds {found} in the converted folder, and {expected} in the base")
    check_converted(base, converted, state)
    same_tensors(work / "converted", work / "applied")
    same_tensors(work / "base", work / "reverted")


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    from lota.models.scope import auto_class, load_config

    model, info = auto_class(load_config(folder)).from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


def check_trained(base: Any, state: dict[str, Tensor], mask: Any) -> None:
    """Frozen entries, and all else that the mask does not list, have the base's bits; kept ones changed."""
    own, first = base.state_dict(), first_names(base)
    if own.keys() != state.keys():
        raise Wrong(f"policy.pt has other names: {sorted(own.keys() ^ state.keys())[:3]}")
    changed = kept_in_all = 0
    for name, before in own.items():
        differ = bits(state[name]) != bits(before)
        listed = first.get(name, name)
        kept = mask.dense(listed) if listed in mask else torch.zeros_like(differ)
        if (differ & ~kept).any():
            raise Wrong(f"{int((differ & ~kept).sum())} frozen entries of {name} have changed")
        changed, kept_in_all = changed + int((differ & kept).sum()), kept_in_all + int(kept.sum())
    if changed < 0.9 * kept_in_all:
        raise Wrong(f"only {changed} of {kept_in_all} kept entries have changed")


def first_names(model: Any) -> dict[str, str]:
    """Name of each parameter -> the first of the names that it has, by which masks call it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def check_converted(base: Any, converted: Any, state: dict[str, Tensor]) -> None:
    """The converted folder loads as the trained model: the same bits, the same logits."""
    found = converted.state_dict()
    for name in state:
        if name not in found or not torch.equal(bits(found[name]), bits(state[name])):
            raise Wrong(f"converted: {name} is not what training wrote")
    before = logits(base)
    base.load_state_dict(state)
    after = logits(base)
    if not torch.equal(logits(converted), after):
        raise Wrong("converted: its logits are not the trained model's")
    if torch.equal(before, after):
        raise Wrong("training has not changed the logits")


def bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.dtype.itemsize])


def logits(model: Any) -> Tensor:
    """Of two rows of ten ids, on a copy: where tensors begin in memory may decide the order of a sum."""
    ids = torch.arange(20).view(2, 10) + 4
    with torch.no_grad():
        return copy.deepcopy(model)(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits


def same_tensors(expected: Path, found: Path) -> None:
    """Raise Wrong unless two folders hold the same tensors, to the last bit, under the same names."""
    from safetensors.torch import load_file

    sides: list[dict[str, Tensor]] = []
    for folder in (expected, found):
        sides.append({})
        for file in sorted(folder.glob("*.safetensors")):
            sides[-1] |= load_file(file)
    one, other = sides
    if one.keys() != other.keys():
        raise Wrong(
            f"{found.name} has other names than {expected.name}: {sorted(one.keys() ^ other.keys())[:3]}"
        )
    for name, tensor in one.items():
        if other[name].dtype != tensor.dtype or not torch.equal(bits(other[name]), bits(tensor)):
            raise Wrong(f"{found.name}: {name} is not the one of {expected.name}")


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


def table(found: Sequence[Result]) -> str:
    """One row per family, as Markdown."""
    lines = ["| family | model | result | scope | why not whole |", "| --- | --- | --- | ---: | --- |"]
    for r in sorted(found, key=lambda r: r.family):
        share = "" if r.share is None else f"{r.share:.2f}"
        lines.append(f"| {r.family} | {r.model} | {r.verdict} | {share} | {r.reason.replace('|', '/')} |")
    return "\n".join(lines)


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
    parser.add_argument("--write", type=Path, help="file for the page of results")
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
        args.write.write_text(table(found) + "\n")
    sys.exit(bool(counts["failed"] or counts["wrong"]))


if __name__ == "__main__":
    main()
