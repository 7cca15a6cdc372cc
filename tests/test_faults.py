"""The fault campaign finds what it should, and a sample of it holds; `make faults` runs all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts import faults
from scripts.fault_cases import Case
from scripts.fault_disk import Flushed

ROOT = Path(__file__).resolve().parent.parent
# Three ways of replacing a file that holds "old" by one that holds "new", and a note that it was done
IN_PLACE = "from pathlib import Path; Path('a').write_text('n' * 9); Path('a').open('a').write('ew')"
RENAMED = """
import os
with open('.a', 'w') as file:
    file.write('new')
os.replace('.a', 'a')
"""
ATOMIC = """
from lota.storage import atomic_path
with atomic_path('a') as temporary:
    temporary.write_text('new')
"""
ONCE = """
import os
if not os.path.exists('done'):  # the second start goes by what the first has left
{steps}
    os.close(os.open('done', os.O_CREAT | os.O_WRONLY))
    for name in ('done', '.'):
        handle = os.open(name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
os.close(os.open('end', os.O_CREAT | os.O_WRONLY))
"""


@dataclass(frozen=True)
class Script(Case):
    def write(self, folder: Path) -> None:
        (folder / "a").write_text("old")


def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, mode: str) -> list[str]:
    steps = "\n".join(f"    {line}" for line in source.strip().splitlines())
    (tmp_path / "command.py").write_text(ONCE.format(steps=steps))
    monkeypatch.setattr(faults, "_place", [str(tmp_path)])
    ready = faults.Prepared(Script("script", (str(tmp_path / "command.py"),)))
    points = [ready.test(mode, number) for number in range(1, len(ready.operations) + 1)]
    assert points and all("not killed" not in point.problem for point in points)
    return [point.problem for point in points if point.problem]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "mode", "found"),
    [
        pytest.param(IN_PLACE, "power", "different: a", id="in place, power"),
        pytest.param(RENAMED, "kill", "", id="renamed, kill"),
        pytest.param(RENAMED, "power", "different: a", id="renamed, power"),
        pytest.param(ATOMIC, "kill", "", id="atomic, kill"),
        pytest.param(ATOMIC, "power", "", id="atomic, power"),
    ],
)
def test_a_careless_command_is_found(tmp_path, monkeypatch, source, mode, found):
    """Renaming what was not flushed stands a kill, and loses the content with the power."""
    lines = problems(tmp_path, monkeypatch, source, mode)
    assert any(found in line for line in lines) if found else not lines


@pytest.mark.slow
def test_what_is_left_over_is_found(tmp_path, monkeypatch):
    left = "import os, pathlib\nname = f'.{os.getpid()}'\npathlib.Path(name).touch()\nos.replace(name, 'a')"
    assert any(line.startswith("left over: .") for line in problems(tmp_path, monkeypatch, left, "kill"))


def test_what_a_power_cut_leaves(tmp_path):
    """Content as it was last flushed; names as the folder was; a rename between folders as one operation."""
    work = tmp_path / "work"
    for folder in ("one", "two"):
        (work / folder).mkdir(parents=True)
    (work / "one" / "kept").write_text("1")
    (work / "one" / "moved").write_text("2")
    flushed = Flushed(work)

    def flush(path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        flushed.flush(handle)
        os.close(handle)

    (work / "one" / "kept").write_text("changed")  # never flushed
    (work / "one" / "new").write_text("new")
    flush(work / "one" / "new")  # its folder is not
    os.replace(work / "one" / "moved", work / "two" / "moved")
    flush(work / "two")
    (work / "two" / "empty").touch()
    (work / "two" / "empty").write_text("late")
    flush(work / "two")  # the name, not the content
    flushed.write(tmp_path / "after")
    found = {p.relative_to(tmp_path / "after").as_posix(): p for p in (tmp_path / "after").rglob("*")}
    assert set(found) == {"one", "two", "one/kept", "two/moved", "two/empty"}
    assert [found[name].read_text() for name in ("one/kept", "two/moved", "two/empty")] == ["1", "2", ""]


@pytest.mark.slow
def test_a_sample_of_all_points_holds(tmp_path):
    cases = ("train", "overwrite", "convert_over", "delta_over", "merge", "eval", "samples")
    command = [sys.executable, "-m", "scripts.faults", *cases, "--sample", "28", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| all | | 28 | 28 |" in done.stdout
