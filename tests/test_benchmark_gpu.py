"""The benchmark for GPUs runs on a CPU at a tiny shape, keeps what it has, and skips what no longer fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).resolve().parent.parent
# what the training commands need and a machine with a GPU may lack
COMMANDS_ONLY = ("hydra", "omegaconf", "datasets", "wandb", "zstandard", "matplotlib", "rouge_score")
RUN = """
import runpy, sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = ["gpu"] + {arguments!r}
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def run(out: Path, *arguments: str) -> tuple[str, dict]:
    tiny = ["--shape", "tiny", "--device", "cpu", "--rows", "2", "--length", "32", "--steps", "1"]
    code = RUN.format(absent=COMMANDS_ONLY, arguments=[*tiny, "--out", str(out), *arguments])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    names = [name for name in gpu.PARTS if name != "pytest -m gpu" and "compiled" not in name]
    shown, found = run(tmp_path / "gpu.json", "--minutes", "30", "--parts", *names)
    assert list(found["parts"]) == names
    assert not {name: part for name, part in found["parts"].items() if "error" in part or "skipped" in part}
    for name in names[1:]:
        if name != "kernels":
            part = found["parts"][name]
            assert part["seconds"] > 0 and part["peak_gib"] > 0 and part["trained_entries"] > 0, name
    dense, tenth = (found["parts"][name]["trained_entries"] for name in ("calibration", "lota s=0.9"))
    assert tenth < 0.1 * dense  # embeddings are not in the scope
    assert 0.9 < found["parts"]["rows s=0.9"]["trained_entries"] / tenth < 1.1  # weights have too few blocks
    contestants = found["parts"]["kernels"]["update s=0.9"]
    assert contestants.keys() == {"plain", "kernels", "torch.compile"}
    assert all(isinstance(value, float) for value in contestants.values())
    assert found["reaches"] == []  # they are those of the 8B shape on a GPU
    assert shown.count("facts") == len(names)  # a table after each part


def test_what_no_longer_fits_is_left_out_and_said(tmp_path):
    shown, found = run(tmp_path / "gpu.json", "--minutes", "0")
    assert list(found["parts"]) == list(gpu.PARTS)
    assert all("0 s are left" in part["skipped"] for part in found["parts"].values())
    assert "needs about" in shown


def test_a_part_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    def broken(bench):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu.PARTS, "lora r=64", gpu.Part(1, broken))
    arguments = ["gpu", "--shape", "tiny", "--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--parts", "lora r=64", "facts"])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert (
        found["lora r=64"]["error"] == "RuntimeError: out of memory" and found["facts"]["matrix_tflops"] > 0
    )


def test_reaches_compare_with_the_limit_or_with_another_part():
    results = {
        "lota s=0.99": {"peak_gib": 21.0, "share_of_rate": 0.5, "tokens_per_second": 100.0},
        "lora r=64": {"tokens_per_second": 100.0},
        "calibration": {"tokens_per_second": 90.0, "peak_gib": 39.0},
    }
    verdicts = {line["what"]: line["verdict"] for line in gpu.reaches(results)}
    assert verdicts["lota s=0.99: peak_gib"] == "missed"
    assert verdicts["lota s=0.99: share_of_rate"] == "reached"
    assert verdicts["lota s=0.99: tokens_per_second / lora r=64"] == "reached"
    assert verdicts["calibration: tokens_per_second / lota s=0.9"] == "not measured"
    assert verdicts["calibration: peak_gib"] == "reached"
    assert len(verdicts) == len(gpu.REACHES)
    assert {part for part, *_ in gpu.REACHES} <= gpu.PARTS.keys()
