"""Kill every command at each of its file operations, start it again, and compare what is on disk.

    python -m scripts.faults all                       # every command, killed and cut off from power
    python -m scripts.faults train eval --mode kill    # some commands; --list names them
    python -m scripts.faults all --sample 60 --seed 1  # that many points, drawn from all

A point is a file operation below the folder that the command works in: open for writing, write, fsync,
rename, remove, mkdir, rmdir, truncate. Mode `kill` ends the process there with SIGKILL; a write is torn in
its middle. Mode `power` plays a power cut besides: what was written and not flushed is gone, and a rename, a
new file or a removal whose folder was not flushed is undone. Then the same command runs again, undisturbed.
The point holds if the folder's content then equals that of a command that was never disturbed: the same files
with the same bits, but for dates and speeds, and nothing left over.

The commands run in forks of this process, which has imported their libraries: scripts/fault_cases.py says
which commands, and on what.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lota.storage import CHECKSUMS, file_hash, read_checksums
from scripts import forks
from scripts.fault_cases import CASES, Case
from scripts.fault_disk import Disk

MODES = ("kill", "power")
CHUNK = 12  # points that a worker takes at a time
# Dates, speeds and memory; files of checksums over those, and of the versions of the code.
VOLATILE = re.compile(r"date|seconds|.*_per_second|peak_memory_bytes|finished_at")
UNCOMPARED = {"checksums.json", "versions.json"}
HOUR_AGO = time.time() - 3600
YOUNG = 10  # operations that a command has more or less, as a file that it wrote is seconds old or not
MEMORY = "hashes.json"  # hashes of files that are a few seconds old: it may be there or not


# Commands


def start(argv: Sequence[str], folder: Path, disk: Disk | None, log: Path, count: Path | None = None) -> int:
    """Run `python ARGV` in a fork, disturbed by `disk`; see `scripts.forks.start`.

    count: file for the operations that `disk` has counted.
    """
    if disk is None:
        return forks.start(argv, folder, log)

    def write_count() -> None:
        if count is not None:
            disk.busy = True
            count.write_text(json.dumps(disk.counted))

    return forks.start(argv, folder, log, disk.install, write_count)


# What is compared


def content(folder: Path) -> dict[str, str]:
    """Path of everything in a folder -> hash of what it holds, without dates and speeds."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != MEMORY):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if [inside.name for inside in path.iterdir()] != [MEMORY]:
                found[name + "/"] = ""
        else:
            found[name] = "" if path.name in UNCOMPARED else hashlib.sha256(_plain(path)).hexdigest()
        if path.name == CHECKSUMS:
            sums = read_checksums(path.parent)
            found[name] = str(all(file_hash(path.parent / file) == digest for file, digest in sums.items()))
    return found


def _plain(path: Path) -> bytes:
    import torch

    if path.is_symlink():
        return os.fsencode(os.readlink(path))
    data = path.read_bytes()
    try:
        if path.suffix == ".pt":
            return repr(list(_flat(torch.load(io.BytesIO(data), weights_only=True)))).encode()
        if path.suffix == ".json":
            return json.dumps(_stable(json.loads(data)), sort_keys=True).encode()
        if path.suffix == ".jsonl":
            return json.dumps([_stable(json.loads(line)) for line in data.splitlines()]).encode()
    except (ValueError, RuntimeError, EOFError):
        return data
    if path.name.endswith("_accuracy.txt"):  # lines begin with their date
        return b"\n".join(line.partition(b" ")[2] for line in data.splitlines())
    return data


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if not VOLATILE.fullmatch(key)}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(place, content) of every leaf, tensors by their bits."""
    import torch

    if isinstance(value, dict):
        for key, item in value.items():
            if not VOLATILE.fullmatch(str(key)):
                yield from _flat(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from _flat(item, f"{name}.{at}")
    elif isinstance(value, torch.Tensor):
        bits = value.contiguous().flatten().view(torch.uint8) if value.numel() else value
        yield name, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bits.numpy().tobytes()).hexdigest()}"
    else:
        yield name, repr(value)


# One worker's cases and points


@dataclass(frozen=True)
class Point:
    """One fault and what came of it."""

    case: str
    mode: str
    number: int  # of the operation, from 1
    operation: str
    problem: str  # empty if it holds


class Prepared:
    """A case that this process has made ready: its folder before the command, and after it."""

    def __init__(self, case: Case):
        self.case = case
        self.place = Path(tempfile.mkdtemp(dir=_place[0]))
        self.folder, self.before = self.place / "work", self.place / "before"
        self.log, self.power = self.place / "log", self.place / "power"
        self.folder.mkdir()
        case.write(self.folder)
        for argv in case.earlier:
            if start(argv, self.folder, None, self.log):
                raise RuntimeError(f"{case.name}: {' '.join(argv)} failed:\n{self.log.read_text()[-2000:]}")
        for argv in case.interrupted:
            start(argv, self.folder, None, self.log)
        for path in self.folder.rglob("*"):  # hashes of files that are seconds old are not remembered
            os.utime(path, (HOUR_AGO, HOUR_AGO), follow_symlinks=False)
        shutil.copytree(self.folder, self.before, symlinks=True)
        count = self.place / "count"
        if start(case.argv, self.folder, Disk(self.folder, None, None), self.log, count):
            raise RuntimeError(f"{case.name} failed:\n{self.log.read_text()[-2000:]}")
        self.operations: list[str] = json.loads(count.read_text())
        self.expected = content(self.folder)

    def test(self, mode: str, number: int) -> Point:
        """Kill the command at an operation, start it again, compare."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.before, self.folder, symlinks=True)
        shutil.rmtree(self.power, ignore_errors=True)
        disk = Disk(self.folder, number, self.power if mode == "power" else None)
        status = start(self.case.argv, self.folder, disk, self.log)
        operation = self.operations[number - 1]
        if status == 0 and number > len(self.operations) - YOUNG:  # it had fewer operations this time
            return Point(self.case.name, mode, number, operation, self._problem(status))
        if status != -signal.SIGKILL:
            return Point(
                self.case.name, mode, number, operation, f"it was not killed but ended with {status}"
            )
        if mode == "power":
            shutil.rmtree(self.folder)
            os.rename(self.power, self.folder)
        status = start(self.case.argv, self.folder, None, self.log)
        return Point(self.case.name, mode, number, operation, self._problem(status))

    def _problem(self, status: int) -> str:
        found = content(self.folder)
        if found == self.expected:  # a command may refuse to do again what it has done
            return ""
        lines = [f"left over: {name}" for name in found if name not in self.expected]
        lines += [f"missing: {name}" for name in self.expected if name not in found]
        lines += [f"different: {n}" for n in found if n in self.expected and found[n] != self.expected[n]]
        if status:
            lines.append(f"exit status {status}: {self.log.read_text().strip()[-300:]}")
        return "; ".join(lines)


_place: list[str] = []  # the folder that all workers work below


@functools.cache
def prepared(name: str) -> Prepared:
    return Prepared(next(case for case in CASES if case.name == name))


def count_points(name: str) -> tuple[str, list[str]]:
    return name, prepared(name).operations


def test_points(name: str, mode: str, numbers: Sequence[int]) -> list[Point]:
    return [prepared(name).test(mode, number) for number in numbers]


# All of them


def run(names: Sequence[str], modes: Sequence[str], sample: int, seed: int, jobs: int) -> Iterator[Point]:
    """Every point of the cases in the modes, or a sample of them."""
    forks.import_all()
    fork, memory = multiprocessing.get_context("fork"), "/dev/shm"
    with (
        tempfile.TemporaryDirectory(
            prefix="faults", dir=memory if os.access(memory, os.W_OK) else None
        ) as place,
        ProcessPoolExecutor(jobs, mp_context=fork) as pool,
    ):
        _place[:] = [place]
        counts = dict(pool.map(count_points, names))
        points = [(n, mode, i) for n in names for mode in modes for i in range(1, len(counts[n]) + 1)]
        if sample:
            points = sorted(random.Random(seed).sample(points, min(sample, len(points))))
        work: dict[tuple[str, str], list[int]] = {}
        for name, mode, number in points:
            work.setdefault((name, mode), []).append(number)
        tasks = [
            pool.submit(test_points, name, mode, numbers[at : at + CHUNK])
            for (name, mode), numbers in work.items()
            for at in range(0, len(numbers), CHUNK)
        ]
        for task in as_completed(tasks):
            yield from task.result()


def table(found: Sequence[Point]) -> str:
    """Counts per case and mode, as Markdown."""
    lines = ["| command | mode | points | hold |", "| --- | --- | ---: | ---: |"]
    total = Counter((point.case, point.mode) for point in found)
    failed = Counter((point.case, point.mode) for point in found if point.problem)
    order = {case.name: at for at, case in enumerate(CASES)}
    for key in sorted(total, key=lambda key: (order[key[0]], key[1])):
        lines.append(f"| {key[0]} | {key[1]} | {total[key]} | {total[key] - failed[key]} |")
    lines.append(f"| all | | {total.total()} | {total.total() - failed.total()} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [case.name for case in CASES]
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"all, or some of {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="print the commands as they are run")
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both")
    parser.add_argument(
        "--sample", type=int, default=0, help="so many points, drawn from all (0: every point)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="commands at a time (one per core)")
    parser.add_argument("--json", type=Path, help="file for every point")
    args = parser.parse_args()
    if args.list:
        print(*(f"{case.name:16} python {' '.join(case.argv)}" for case in CASES), sep="\n")
        return
    chosen = names if args.commands in ([], ["all"]) else args.commands
    if unknown := sorted({*chosen} - {*names}):
        parser.error(f"unknown command {unknown[0]}: all, or some of {', '.join(names)}")
    modes = MODES if args.mode == "both" else (args.mode,)
    began, found = time.monotonic(), []
    points = run(chosen, modes, args.sample, args.seed, args.jobs)
    for point in tqdm(points, unit=" points", disable=None):
        found.append(point)
        if point.problem:
            where = f"{point.case} {point.mode} {point.number} ({point.operation})"
            tqdm.write(f"{where}: {point.problem}", file=sys.stdout)
    print(f"{table(found)}\n\n{len(found)} points in {time.monotonic() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([asdict(point) for point in found], indent=1) + "\n")
    sys.exit(any(point.problem for point in found))


if __name__ == "__main__":
    main()
