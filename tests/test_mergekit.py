"""merge_models.py against mergekit-yaml on the configuration that --export-mergekit writes, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from runs import MODEL
from safetensors.torch import load_file, save_file

import merge_models
from lota.delta import extract

pytest.importorskip("mergekit")
pytestmark = pytest.mark.slow
# mergekit-yaml's own entry point, several times in one process: most of its time is spent importing
RUN = """
import json, sys
from mergekit.scripts.run_yaml import main
for words in json.loads(sys.argv[1]):
    main([*words, "--quiet"], standalone_mode=False)
"""
EXACT = {
    "sum": "",
    "task_arithmetic": "--weights 0.3 0.5 0.7",
    "task_arithmetic_mean": "--normalize --lambda 0.8",
    "ties": "--density 0.2 --weights 1 0.5 0.3",
    "ties_whole": "--no-normalize",
    "dare": "--density 0.5 --seed 3",
    "dare_whole": "",
    "dare_ties": "--density 0.4 0.5 0.6 --no-normalize --seed 1",
    "magnitude_prune": "--density 0.3",
}
IN_BF16 = {case: EXACT[case] for case in ("task_arithmetic", "dare", "ties", "magnitude_prune")}
TIED = {case: EXACT[case] for case in ("ties", "magnitude_prune")}
ROUNDED = {
    "dare_weights": "--density 0.3 --weights 0.7 0.6 0.5 --seed 1",
    "dare": "--density 0.3 --normalize --weights 1 0.5 0.3 --lambda 0.7 --seed 2",
    "dare_ties": "--density 0.3 --weights 1 0.5 0.3 --seed 2",
}


def make(folder: Path, dtype: torch.dtype, step: float | None) -> Path:
    """The embedded model and three others near it, every weight of theirs changed, in `dtype`.

    step: weights and changes are multiples of it, so that many changes of a tensor are equal in magnitude.
    """

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if step is None else (tensor / step).round() * step

    state = load_file(MODEL / "model.safetensors")
    for i, name in enumerate(("base", "a", "b", "c")):
        generator = torch.Generator().manual_seed(i)
        shutil.copytree(MODEL, folder / name)
        moved = {
            k: rounded(v + (1e-2 * torch.randn(v.shape, generator=generator) if i else 0)).to(dtype)
            for k, v in state.items()
        }
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def merge(folder: Path, out: Path, method: str, more: str, inputs=("a", "b", "c")) -> Path:
    """Merge, and return the configuration that was exported."""
    deltas = " ".join(str(folder / name) for name in inputs)
    line = f"--base {folder / 'base'} --deltas {deltas} --method {method} --out {out} {more}"
    merge_models.main([*line.split(), "--export-mergekit", str(out.with_suffix(".yml"))])
    return out.with_suffix(".yml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every case merged by both: <dtype or tied>/<exact or rounded>/<case> and .../<case>_mergekit."""
    root, calls = tmp_path_factory.mktemp("mergekit"), []
    for name, dtype, step, labelled in (
        ("torch.float32", torch.float32, None, {"exact": EXACT, "rounded": ROUNDED}),
        ("torch.bfloat16", torch.bfloat16, None, {"exact": IN_BF16}),
        ("tied", torch.float32, 2**-12, {"exact": TIED}),
    ):
        folder = make(root / name, dtype, step)
        for label, case in ((label, case) for label, cases in labelled.items() for case in cases):
            out, more = folder / label / case, labelled[label][case]
            method = case.removesuffix("_whole").removesuffix("_mean").removesuffix("_weights")
            config = merge(folder, out, method, more)
            seed = more.rpartition("--seed ")[2] if "--seed" in more else "0"
            calls.append([str(config), f"{out}_mergekit", "--random-seed", seed])
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def load(runs: Path, made: object, *folders: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(runs / str(made) / folder / "model.safetensors") for folder in folders]


def both(runs: Path, made: object, label: str, case: str) -> list[dict[str, torch.Tensor]]:
    dtype = made if isinstance(made, torch.dtype) else torch.float32
    mine, theirs = load(runs, made, f"{label}/{case}", f"{label}/{case}_mergekit")
    assert mine.keys() == theirs.keys() and all(mine[n].dtype == theirs[n].dtype == dtype for n in mine)
    return [mine, theirs]


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *((torch.float32, case) for case in EXACT),
        (torch.bfloat16, "task_arithmetic"),
        (torch.bfloat16, "dare"),
    ],
)
def test_to_the_last_bit(runs, dtype, case):
    """DARE too: the draws are those of mergekit-yaml --random-seed."""
    mine, theirs = both(runs, dtype, "exact", case)
    (base,) = load(runs, dtype, "base")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not any(torch.equal(mine[name], base[name]) for name in mine)


@pytest.mark.parametrize("made", [torch.bfloat16, "tied"])
@pytest.mark.parametrize(("case", "density"), [("ties", 0.2), ("magnitude_prune", 0.3)])
def test_trimming_differs_in_ties_alone(runs, made, case, density):
    """Which of equal changes at the threshold stay, an unstable sort decides there; here, the earliest do."""
    mine, theirs = both(runs, made, "exact", case)
    base, *tuned = load(runs, made, "base", "a", "b", "c")
    for name, before in base.items():
        tied = torch.zeros_like(before, dtype=torch.bool)
        kept = torch.zeros_like(before, dtype=torch.float32)  # the sum of the vectors, trimmed
        for state in tuned:
            vector = state[name].float() - before.float()
            order = vector.abs().flatten().sort(descending=True, stable=True)
            count = max(1, int(density * vector.numel()))
            tied |= vector.abs() == order.values[count - 1]
            kept.view(-1)[order.indices[:count]] += vector.flatten()[order.indices[:count]]
        assert torch.equal(mine[name][~tied], theirs[name][~tied]), name
        if case == "magnitude_prune":
            assert torch.equal(mine[name], (before.float() + kept).to(before.dtype)), name
    differing = sum(int((mine[name] != theirs[name]).sum()) for name in base)
    assert 0 < differing < 0.05 * sum(value.numel() for value in base.values())


@pytest.mark.parametrize("case", ROUNDED)
def test_to_rounding(runs, case):
    """Where mergekit has the factors in another order: 1e-6 of what is summed, and the last place."""
    mine, theirs = both(runs, torch.float32, "rounded", case)
    base, *tuned = load(runs, torch.float32, "base", "a", "b", "c")
    for name, before in base.items():
        summed = sum((state[name] - before).abs() for state in tuned) / 0.3
        allowed = 1e-6 * summed + 2**-23 * theirs[name].abs()
        assert ((mine[name] - theirs[name]).abs() <= allowed).all(), name
    assert any(not torch.equal(mine[name], theirs[name]) for name in base)


def test_the_configuration_says_everything(runs):
    config = yaml.safe_load((runs / str(torch.bfloat16) / "exact" / "dare.yml").read_text())
    methods = [config[key] for key in ("merge_method", "dtype", "out_dtype")]
    assert methods == ["dare_linear", "float32", "bfloat16"]
    assert config["parameters"] == {"normalize": False, "rescale": False}
    assert [model["parameters"] for model in config["models"]] == [{"weight": 2.0, "density": 0.5}] * 3
    assert config["base_model"] == str((runs / str(torch.bfloat16) / "base").resolve())


def test_what_mergekit_cannot_do_is_refused_before_merging(runs, tmp_path):
    folder = runs / str(torch.float32)
    extract(folder / "base", folder / "a", tmp_path / "a.safetensors")
    for method, more, inputs, words in [
        ("ties", "", [tmp_path / "a.safetensors", "b"], ["mergekit", "a.safetensors", "lota.delta apply"]),
        (
            "dare_ties",
            "--density 0.1 0.2",
            ["a", "b"],
            ["mergekit", "--density 0.1 0.2", "a mean over several"],
        ),
        ("ties", "", ["a", "a"], ["a is named twice"]),
    ]:
        with pytest.raises(SystemExit) as error:
            merge(folder, tmp_path / "out", method, more, inputs)
        assert all(word in str(error.value) for word in words)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.yml").exists()
    (tmp_path / "out.yml").mkdir()
    with pytest.raises(SystemExit, match=r"out\.yml is a folder"):
        merge(folder, tmp_path / "out", "ties", "", ["a", "b"])
    assert not (tmp_path / "out").exists() and (tmp_path / "out.yml").is_dir()
