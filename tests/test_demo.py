"""The demo's own parts; its stages are the project's commands, which have tests of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from scripts import demo


@pytest.fixture
def rows():
    return [
        demo.Row("base model", None, None, 0, 0.0, 0.0),
        demo.Row("full fine-tuning", 0.0, 5e-4, 795_776, 0.98, 0.007, 29.4, 435 * 2**20),
        demo.Row("LoTA", 0.5, 1e-3, 356_352, 0.99, 0.005, 28.0, 437 * 2**20),
        demo.Row("LoTA", 0.99, 1e-2, 7_127, 0.725, 0.0224, 43.0, 435 * 2**20),
    ]


def test_a_stage_that_fails_ends_the_demo_with_its_command(capfd):
    stages = demo.Demo()
    stages.run("works", "-c 'print(2 + 3)'")
    assert "5\n" in capfd.readouterr().out
    with pytest.raises(SystemExit, match=r"'breaks' failed with exit code 3:\n  python -c 'raise SystemExit"):
        stages.run("breaks", "-c 'raise SystemExit(3)'")
    assert stages.commands == ["python -c 'print(2 + 3)'", "python -c 'raise SystemExit(3)'"]


def test_table(rows):
    lines = demo.table(rows).splitlines()
    assert lines[1].split() == ["base", "model", "-", "0", "-", "0.000", "+-", "0.000", "-", "-"]
    assert lines[4].split() == ["LoTA", "0.99", "7,127", "0.01", "0.725", "+-", "0.022", "43", "435"]
    assert len({len(line) for line in lines}) == 1


def test_numbers_come_from_the_files(tmp_path, monkeypatch):
    run = tmp_path / "demo" / "runs" / "r"
    run.mkdir(parents=True)
    lines = [{"peak_memory_bytes": n, "step": n} for n in (5, 9, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert demo.n_parameters(demo.BASE) == 795_776
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    assert demo.peak_memory("r") == 9


def test_the_demo_starts_from_a_clone_that_is_not_installed(tmp_path):
    """`python scripts/demo.py` finds neither lota/ nor tasks/; the commands that it runs do."""
    script = f"import runpy, sys; runpy.run_path({demo.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"lota", "tasks", "trainers", "scripts"} & {m.split(".")[0] for m in done.stdout.split()}


def test_no_script_changes_the_import_path():
    folders = ("scripts", "examples", "benchmarks", "assets")
    sources = {path: path.read_text() for folder in folders for path in (demo.ROOT / folder).rglob("*.py")}
    sources.pop(demo.ROOT / "scripts" / "mutants.py")  # a fork of it runs the tests of another tree
    assert [str(path) for path, source in sources.items() if "sys.path" in source] == []
