"""Which runs are one curve: seeds are, other settings, tasks and masks are not."""

from __future__ import annotations

import pytest
import run_folders

from lota.masks import Mask
from lota.report.reading import read_runs
from lota.report.replicates import find_replicates


def names(folder, *runs: str) -> dict[str, int]:
    """Name of a group -> number of its runs, for runs with these settings."""
    made = [run_folders.write_run(folder / f"r{i}", *run.split()) for i, run in enumerate(runs)]
    found = find_replicates(read_runs([str(path) for path in made]))
    return {group.name: len(group.runs) for group in found}


@pytest.mark.slow
def test_seeds_are_one_group(tmp_path):
    masks = [
        run_folders.rated_mask(tmp_path / f"{i}" / "0.9_mask.pt", 0.1, "task_vector", i) for i in range(2)
    ]
    found = names(tmp_path, *(f"{mask} seed={seed}" for seed, mask in enumerate(masks)), "seed=0", "seed=7")
    assert found == {"LoTA, s = 0.9": 2, "full fine-tuning": 2}


@pytest.mark.slow
def test_a_sweep_is_told_apart_where_its_settings_meet(tmp_path):
    low = run_folders.rated_mask(tmp_path / "0.5_mask.pt", 0.5, "task_vector")
    high = run_folders.rated_mask(tmp_path / "0.9_mask.pt", 0.1, "task_vector")
    apart = names(tmp_path / "a", f"{low} lr=1e-3", f"{high} lr=1e-2")
    assert apart == {"LoTA, s = 0.5": 1, "LoTA, s = 0.9": 1}  # each sparsity has its own rate: one curve
    met = names(tmp_path / "b", f"{high} lr=1e-3", f"{high} lr=1e-2", f"{high} lr=1e-2 seed=1")
    assert met == {"LoTA, lr=0.001, s = 0.9": 1, "LoTA, lr=0.01, s = 0.9": 2}


def test_settings_that_change_no_weight_do_not_matter(tmp_path):
    assert names(tmp_path, "eval_every=8", "eval_every=16 seed=1", "seed=2") == {"full fine-tuning": 3}


def test_tasks_models_and_losses_are_never_one_curve(tmp_path):
    found = names(
        tmp_path, "datasets=[toy_sort]", "datasets=[toy_sort,toy_shift]", "datasets=[toy_sort] seed=1"
    )
    assert found == {"full fine-tuning, toy_sort": 2, "full fine-tuning, toy_sort+toy_shift": 1}


def test_masks_from_different_places_with_one_seed(tmp_path):
    masks = [run_folders.rated_mask(tmp_path / name / "0.9_mask.pt", 0.1, "task_vector") for name in "ab"]
    found = names(tmp_path, *masks)
    assert found == {"LoTA, mask_path=a/0.9_mask.pt, s = 0.9": 1, "LoTA, mask_path=b/0.9_mask.pt, s = 0.9": 1}


@pytest.mark.slow
def test_methods_have_the_names_of_the_field(tmp_path):
    high = run_folders.rated_mask(tmp_path / "0.9_mask.pt", 0.1, "magnitude")
    settings = ["adapter=lora lora_rank=16", "freeze_odd_layers=true", f"{high} flip_mask=true"]
    settings += [f"{high} freeze_even_layers=true", f"protect_masks=[{high.removeprefix('mask_path=')}]"]
    found = names(tmp_path / "r", *settings)
    assert set(found) == {
        "LoRA r = 16",
        "full fine-tuning, odd layers frozen",
        "magnitude mask, flipped, s = 0.1",
        "magnitude mask, even layers frozen, s = 0.9",
        "full fine-tuning, others' entries frozen",
    }


def test_too_many_settings_give_way_to_the_name(tmp_path):
    found = names(tmp_path, "lr=1e-3 eps=1e-7 alpha=0.9 batch_size=16 momentum=0.5", "")
    assert found == {"full fine-tuning, r0": 1, "full fine-tuning, r1": 1}


@pytest.mark.slow
def test_how_a_mask_was_chosen_is_in_its_name(tmp_path):
    path = tmp_path / "0.9_mask.pt"
    setting = run_folders.rated_mask(path, 0.1, "fisher")
    for meta, name in (
        ({"granularity": "row", "per": "layer"}, "Fisher mask, rows, per layer, s = 0.9"),
        ({"granularity": "element", "per": "global", "smallest": True}, "Fisher mask, smallest, s = 0.9"),
        ({"score": "mine", "smallest": False}, "mask by mine, s = 0.9"),
    ):
        mask = Mask.load(path)
        mask.meta |= meta
        mask.save(tmp_path / "new.pt")
        assert names(tmp_path / name, setting.replace("0.9_mask", "new")) == {name: 1}


@pytest.mark.slow
def test_masks_of_snip_are_found_where_the_run_keeps_them(tmp_path):
    folders = [run_folders.write_run(tmp_path / f"r{seed}", "snip=true", f"seed={seed}") for seed in (0, 1)]
    for folder in folders:
        run_folders.rated_mask(folder / "snip_mask.pt", 0.1, "snip")
    elsewhere = run_folders.rated_mask(tmp_path / "kept_mask.pt", 0.1, "snip").removeprefix("mask_path=")
    folders.append(
        run_folders.write_run(tmp_path / "r2", "snip=true", "seed=2", f"save_snip_mask_path={elsewhere}")
    )
    (group,) = find_replicates(read_runs([str(folder) for folder in folders]))
    assert (group.name, len(group.runs)) == ("SNIP mask, s = 0.9", 3)
