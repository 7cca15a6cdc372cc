"""A full disk is told with the file that could not be written, and leaves nothing half-written."""

from __future__ import annotations

import importlib
import resource
from pathlib import Path

import pytest

from scripts.fault_cases import CASES

COMMANDS = {  # module -> (arguments, what the message names, the largest file that fits, in bytes)
    "extract_masks": (
        "--base base --tuned tuned --sparsities 0.5 --name m --out masks", "masks/m/0.5_mask.pt", 2000
    ),
    "lota.masks.__main__": ("flip 0.5_mask.pt --out flipped.pt", "flipped.pt", 2000),
    "lota.share.delta.cli": (
        "extract --base base --tuned tuned --out d.safetensors", "d.safetensors", 300
    ),
    "merge_models": ("--base base --deltas tuned --method sum --out merged", "merged", 2000),
    "eval_model_all": ("--model base --datasets first --out results", "first_predictions.journal", 300),
    "generate_samples": (
        "--model_path base --prompt_set prompts.json --model_name me --max_length 32 --max_prompt_length 16 "
        "--out results", "prompts_temp0.7", 300
    ),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    CASES[0].write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", COMMANDS)
def test_a_full_disk_is_told_with_the_file(place, monkeypatch, capsys, module):
    arguments, named, limit = COMMANDS[module]
    main = importlib.import_module(module).main
    before = {p.relative_to(place) for p in place.rglob("*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        code = main(arguments.split())
    except SystemExit as stop:
        code = stop.code
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = f"{code} {capsys.readouterr().err}"
    assert "too large" in told or "could not write" in told, told
    assert named in told
    left = {p.relative_to(place) for p in place.rglob("*") if p.is_file()}
    assert all(p.suffix == ".journal" for p in left - before), left  # which holds what was done before
