"""Put faults into the modules that decide results, one at a time, and see whether the tests notice each.

    python -m scripts.mutants [lota/masks/mask.py ...] [--jobs 2] [--out mutants] [--again]

scripts/mutants.toml says which tests belong to a module, scripts/mutation.py which faults there are. The
tests run in a private copy of the tree, each mutant in a fork of this process, which has imported all that is
not ours. Of the tests of a module only those run, fastest first, that execute the faulty statement. A mutant
is killed if one of them fails or the time runs out: four times what these tests take, and ten seconds. Tests
marked slow are left out. Tests that need files beside the checkout or a GPU are skipped.

<out>/results.json keeps what came of each mutant; --again runs the ones that survived once more.
<out>/survivors.diff shows those. Ends with status 1 if less than 95 % of a module's mutants were killed.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from scripts.mutation import Mutant, mutants_of

ROOT = Path(__file__).resolve().parent.parent
# module -> its test files, or those (tests) and what of it is mutated (functions)
TABLE: dict[str, Any] = tomllib.loads((ROOT / "scripts/mutants.toml").read_text())
COPIED = (
    "lota",
    "tasks",
    "tests",
    "config",
    "docs",
    "assets",
    "pyproject.toml",
    "scripts",
    "examples",
    "*.py",
)
REACH = 0.95
FAULTY = 99  # exit status of a fork in which not the tests but something of ours fails
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
# the conftest wants xdist; the collector of unraisable exceptions collects all garbage twice
PLUGINS = ("-p", "xdist.plugin", "-p", "no:cacheprovider", "-p", "no:unraisableexception")


class Recorder:
    """A plugin of pytest: which lines of a file each test executes, and its seconds.

    What a fixture executes counts for all tests of its file, since they may share it.
    """

    def __init__(self, file: Path):
        self.file, self.lines = str(file), set[int]()
        self.of_tests: dict[str, tuple[float, list[int]]] = {}
        self.of_fixtures: dict[str, set[int]] = defaultdict(set)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != self.file:
            return None
        self.lines.add(frame.f_lineno)
        return self._trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.lines, began = set(), time.perf_counter()
        sys.settrace(self._trace)
        threading.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.of_tests[item.nodeid] = (time.perf_counter() - began, sorted(self.lines))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Any:
        result = yield
        self.of_fixtures[item.nodeid.partition("::")[0]] |= self.lines
        return result


class Selected:
    """A plugin of pytest: run the tests of these names, in this order."""

    def __init__(self, names: list[str]):
        self.order = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda i: self.order[i.nodeid]
        )


def run_tests(tree: Path, files: list[str], plugin: object, *more: str) -> int:
    """pytest in this process, which must be a fork; returns its exit status."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[0] = str(tree)
    for name in [name for name in sys.modules if name.startswith("scripts")]:
        del sys.modules[name]
    options = ["-q", "-m", "not slow and not gpu", f"--basetemp={tree.parent}/tmp", *PLUGINS, *more]
    status = int(pytest.main([*options, *files], plugins=[plugin]))
    import lota

    assert lota.__file__ == str(tree / "lota/__init__.py"), lota.__file__
    return status


def in_fork(seconds: float, log: Path, work: Any, *arguments: Any) -> int | None:
    """work(*arguments) in a process group of its own: its status, None if the time ran out."""
    pid = os.fork()
    if pid == 0:
        status = FAULTY
        try:
            os.setsid()
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            status = work(*arguments)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(status)
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)


def copied_tree(root: Path) -> Path:
    """A private copy of what the tests need, in a new temporary folder."""
    tree = Path(tempfile.mkdtemp(prefix="mutants")) / "tree"
    for pattern in COPIED:
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, tree / path.name)
            else:
                tree.mkdir(exist_ok=True)
                shutil.copy2(path, tree / path.name)
    return tree


def foreign_modules(tree: Path) -> list[str]:
    """Names of what is imported here and is neither of the tree nor a plugin, which pytest imports itself."""
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return [
        name
        for name, file in files.items()
        if file and not file.startswith(f"{tree}/") and not name.startswith("xdist")
    ]


def record(tree: Path, module: str, files: list[str]) -> dict[str, Any]:
    """The clean run: tests with their seconds and lines, and the names of what they imported."""

    def work() -> int:
        plugin = Recorder(tree / module)
        status = run_tests(tree, files, plugin)
        tests = {
            name: (seconds, sorted({*lines, *plugin.of_fixtures[name.partition("::")[0]]}))
            for name, (seconds, lines) in plugin.of_tests.items()
        }
        found = {"tests": tests, "modules": foreign_modules(tree)}
        (tree.parent / "record.json").write_text(json.dumps(found))
        return status

    sys.dont_write_bytecode = False  # the workers' copies hold what is compiled here
    log = tree.parent / "clean.log"
    if in_fork(1800, log, work) != 0:
        raise SystemExit(f"{module}: its tests fail without any fault:\n{log.read_text()[-3000:]}")
    sys.dont_write_bytecode = True
    for compiled in (tree / module).parent.glob(f"__pycache__/{Path(module).stem}.*"):
        compiled.unlink()
    found: dict[str, Any] = json.loads((tree.parent / "record.json").read_text())
    for name in found["modules"]:
        with suppress(Exception):
            importlib.import_module(name)
    assert "lota" not in sys.modules
    return found


def tests_of(mutant: Mutant, tests: dict[str, tuple[float, list[int]]]) -> list[str]:
    """Tests that execute the faulty statement: those of up to 0.3 s first, and each file's together."""
    statement = set(range(mutant.first, mutant.last + 1))
    chosen = {name: seconds for name, (seconds, lines) in tests.items() if statement & set(lines)}
    if not chosen:  # no test executes it, or the import of the module does
        chosen = {name: seconds for name, (seconds, _) in tests.items()}

    def order(name: str) -> tuple[bool, str, float]:
        return chosen[name] > 0.3, name.partition("::")[0], chosen[name]

    return sorted(chosen, key=order)


_worker: dict[str, Path] = {}  # of this process: its copy of the tree


def start_worker(root: Path) -> None:
    _worker["tree"] = copied_tree(root)


def try_mutant(job: tuple[str, Mutant, list[str], float]) -> tuple[str, str, str, float]:
    """(key, killed, survived or timeout, the last line of the tests, seconds)."""
    module, mutant, names, seconds = job
    tree, began = _worker["tree"], time.perf_counter()
    path = tree / module
    clean = path.read_text(encoding="utf-8")
    log = tree.parent / "mutant.log"
    try:
        path.write_text(mutant.source, encoding="utf-8")
        files = list(dict.fromkeys(name.partition("::")[0] for name in names))
        status = in_fork(10 + 4 * seconds, log, run_tests, tree, files, Selected(names), "-x")
    finally:
        path.write_text(clean, encoding="utf-8")
    outcome = {None: "timeout", 0: "survived", 5: "survived"}.get(status, "killed")
    words = log.read_text(errors="replace").strip().splitlines()
    if status in (3, 4, FAULTY):
        raise RuntimeError(f"{module}, {mutant.operator}: no test has run: {words[-1:]}")
    failed = [line for line in words if line.startswith(("FAILED", "ERROR"))]
    said = (failed or words or [""])[-1]
    return key_of(module, mutant), outcome, said[:200], time.perf_counter() - began


def key_of(module: str, mutant: Mutant) -> str:
    return hashlib.sha256(f"{module}\n{mutant.source}".encode()).hexdigest()[:16]


def difference(module: str, source: str, mutant: Mutant) -> str:
    lines = source.splitlines(), mutant.source.splitlines()
    return "\n".join([*difflib.unified_diff(*lines, module, mutant.operator, n=1, lineterm=""), ""])


def judge(module: str, arguments: argparse.Namespace) -> float:
    """Run all mutants of a module; returns the share that was killed."""
    began, kept = time.perf_counter(), arguments.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    tree = copied_tree(ROOT)
    source = (tree / module).read_text(encoding="utf-8")
    entry = TABLE[module]
    tests, functions = (entry, []) if isinstance(entry, list) else (entry["tests"], entry["functions"])
    mutants = {key_of(module, m): m for m in mutants_of(source, functions)}
    found = record(tree, module, [f"tests/test_{name}.py" for name in tests])
    gc.freeze()
    jobs = []
    for key, mutant in mutants.items():
        if not (arguments.again and results.get(key, {}).get("outcome") in ("killed", "timeout")):
            names = tests_of(mutant, found["tests"])
            jobs.append((module, mutant, names, sum(found["tests"][name][0] for name in names)))
    context = multiprocessing.get_context("fork")
    with context.Pool(arguments.jobs, start_worker, (tree,)) as pool:
        for key, outcome, said, seconds in pool.imap_unordered(try_mutant, jobs):
            mutant = mutants[key]
            what = {"module": module, "line": mutant.first, "operator": mutant.operator}
            results[key] = {**what, "outcome": outcome, "said": said, "seconds": round(seconds, 2)}
            kept.write_text(json.dumps(results, indent=1))
    shutil.rmtree(tree.parent)
    outcomes = [results[key]["outcome"] for key in mutants]
    survived = [key for key in mutants if results[key]["outcome"] == "survived"]
    with (arguments.out / "survivors.diff").open("a") as file:
        file.writelines(f"# {key}\n{difference(module, source, mutants[key])}\n" for key in survived)
    share = 1 - len(survived) / len(outcomes)
    counts = {name: outcomes.count(name) for name in ("killed", "timeout", "survived")}
    print(f"{module}: {counts}, {share:.1%} killed, {time.perf_counter() - began:.0f} s", flush=True)
    return share


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="parts of paths in scripts/mutants.toml; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, each with its own tree")
    parser.add_argument("--out", type=Path, default=Path("mutants"), help="folder of the results")
    parser.add_argument("--again", action="store_true", help="only what has not been killed before")
    arguments = parser.parse_args()
    chosen = [m for m in TABLE if not arguments.modules or any(part in m for part in arguments.modules)]
    if not chosen:
        parser.error(f"no module of scripts/mutants.toml contains {' or '.join(arguments.modules)}")
    os.environ.update(ENVIRONMENT)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "survivors.diff").write_text("")
    shares = [judge(module, arguments) for module in chosen]
    return int(min(shares) < REACH)


if __name__ == "__main__":
    sys.exit(main())
