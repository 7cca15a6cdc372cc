"""plot_runs.py from run folders to the page: the numbers of the files reach figures and tables."""

from __future__ import annotations

import base64
import json
import re
import shutil
import statistics

import numpy as np
import pytest
import run_folders
import runs
import tiny
import torch

import plot_runs
from lota.masks import Mask
from lota.report.reading import read_runs
from tests.test_plots import check_legible

pytestmark = pytest.mark.slow
SORT = [1.0, 0.0, 1.0, 1.0]
METHODS = ("dense", "lota_0.5", "lota_0.9", "random_0.9")


@pytest.fixture
def folders(made, tmp_path):
    """What `made` holds, in the test's own folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for config in tmp_path.rglob("config.yaml"):
        config.write_text(config.read_text().replace(str(made), str(tmp_path)))
    names = [f"{method}_{seed}" for method in METHODS for seed in (0, 1)]
    return [tmp_path / "runs" / name for name in (*names, "two_tasks")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Dense training, LoTA at 0.5 and 0.9, a random mask: two seeds each; a LoTTO sequence of two tasks."""
    tmp_path = tmp_path_factory.mktemp("made")
    methods = {
        "dense": [],
        "lota_0.5": [run_folders.rated_mask(tmp_path / "m" / "sort" / "0.5_mask.pt", 0.5, "task_vector")],
        "lota_0.9": [run_folders.rated_mask(tmp_path / "m" / "sort" / "0.9_mask.pt", 0.1, "task_vector", 1)],
        "random_0.9": [run_folders.rated_mask(tmp_path / "m" / "random" / "0.9_mask.pt", 0.1, "random", 2)],
    }
    methods["lota_0.9"].append("lr=1e-2")
    assert tuple(methods) == METHODS
    for at, (name, overrides) in enumerate(methods.items()):
        for seed in (0, 1):
            log = run_folders.log_of([5 - step * (1 + at) / 4 + 0.3 * seed for step in range(6)])
            scores = {"toy_sort": [1.0] * (at + 4 * seed + 1) + [0.0] * 7}
            folder = tmp_path / "runs" / f"{name}_{seed}"
            run_folders.write_run(folder, *overrides, f"seed={seed}", log=log, scores=scores)
    write_sequence(tmp_path / "runs" / "two_tasks")
    return tmp_path


def write_sequence(folder):
    run_folders.write_run(folder)
    stage = {"mask": "1_a/0.9_mask.pt", "kept": 1000, "free_after": 9000}
    first = {"overlap": {}, "hash_before": {}, "hash_after": {}, "scores": {"a": 0.9, "b": 0.1}}
    second = {"overlap": {"a": 0}, "hash_before": {"a": "ab" * 32}, "hash_after": {"a": "ab" * 32}}
    tasks = [
        {"name": "a", **stage, **first, "losses": {"a": 0.5, "b": 2.0}},
        {"name": "b", **stage, **second, "scores": {"a": 0.85, "b": 0.95}, "losses": {"a": 0.6, "b": 0.4}},
    ]
    (folder / "ledger.json").write_text(json.dumps({"tasks": tasks}))
    part = {"matrix": [[0.9, 0.1], [0.85, 0.95]], "stderr": [[0.03, None], [0.04, 0.02]]}
    part |= {"base": [0.05, 0.1], "base_stderr": [0.01, 0.01]}
    part |= {"average": {"value": 0.9, "stderr": 0.02}, "forgetting": {"value": 0.05, "stderr": None}}
    forgetting = {"tasks": ["a", "b"], "metrics": {"a": "exact_match", "b": "exact_match"}, "score": part}
    (folder / "forgetting.json").write_text(json.dumps(forgetting))
    return folder


def sections(folders):
    return {
        section.title: section for section in plot_runs.make_sections(read_runs([str(f) for f in folders]))
    }


def test_the_page_holds_everything_and_needs_nothing(folders, tmp_path, capsys):
    out = tmp_path / "figures"
    plot_runs.main([*map(str, folders), "--out", str(out), "--title", "A <b> & c"])
    text = (out / "index.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="(.*?)"', text)
    files = sorted(path.name for path in out.iterdir())
    assert files == [
        "density_random_0.9.png", "density_sort_0.5.png", "density_sort_0.9.png", "exact_match_toy_sort.png",
        "forgetting_loss_two_tasks.png", "forgetting_score_two_tasks.png", "held-out_loss_mini.png",
        "index.html", "loss.png", "memory_and_speed.png", "overlap.png",
    ]  # fmt: skip
    embedded = {base64.b64decode(picture.removeprefix("data:image/png;base64,")) for picture in pictures}
    assert embedded == {path.read_bytes() for path in out.glob("*.png")}
    assert len(pictures) == len(files) - 1
    assert "A &lt;b&gt; &amp; c" in text and "<b>" not in text
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert "9 runs, 10 pictures" in capsys.readouterr().out


def test_every_picture_is_legible(folders):
    for section in sections(folders).values():
        if section.figure is not None:
            check_legible(section.figure)


def test_the_table_of_runs_is_the_files(folders, tmp_path):
    plot_runs.main([*map(str, folders), "--out", str(tmp_path / "f")])
    header, *rows = run_folders.tables((tmp_path / "f" / "index.html").read_text())["Runs"]
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert len(found) == 8
    run = found["lota_0.9_1"]
    mask = Mask.load(tmp_path / "m" / "sort" / "0.9_mask.pt")
    assert run["in the figures"] == "LoTA, s = 0.9" and run["seed"] == "1" and run["lr"] == "0.01"
    assert run["kept entries"] == f"{mask.n_kept:,}" and run["examples"] == "48"
    last = 5 - 5 * 3 / 4 + 0.3
    assert run["training loss"] == f"{last:.4f}" and run["held-out loss"] == f"{last + 0.1:.4f}"
    assert run["peak memory (GiB)"] == "0.250" and run["tokens/s"] == "350" and run["device"] == "cpu (test)"
    assert found["dense_0"]["kept entries"] == "-"


def test_loss_curves_are_the_log(folders):
    training, held_out = sections(folders)["Loss"].figure.axes
    lines = [line for line in training.lines if line.get_label() == "LoTA, s = 0.9"]
    assert [line.get_xdata().tolist() for line in lines] == [[8, 16, 24, 32, 40, 48]] * 2
    assert lines[1].get_ydata().tolist() == pytest.approx([5 - 3 * step / 4 + 0.3 for step in range(6)])
    assert len(training.lines) == len(held_out.lines) == 8
    first = held_out.lines[0]
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([16, 32, 48], [4.85, 4.35, 3.85])
    assert training.get_xlabel() == "training examples"
    assert training.get_ylabel() == "loss (nats per response token)"


def test_scores_are_means_over_seeds_with_their_standard_errors(folders):
    section = sections(folders)["Exact match on toy_sort"]
    axes = section.figure.axes[0]
    lota, chance = axes.containers
    means = {}
    for at, name in enumerate(("dense", "lota_0.5", "lota_0.9", "random_0.9")):
        seeds = [100 * ones / (ones + 7) for ones in (at + 1, at + 5)]
        means[name] = statistics.fmean(seeds), statistics.stdev(seeds) / 2**0.5
    assert lota.lines[0].get_xdata().tolist() == pytest.approx([50, 10])
    assert lota.lines[0].get_ydata().tolist() == pytest.approx([means["lota_0.5"][0], means["lota_0.9"][0]])
    bars = [segment[:, 1] for segment in lota.lines[2][0].get_segments()]
    for bar, (mean, error) in zip(bars, (means["lota_0.5"], means["lota_0.9"]), strict=True):
        assert bar.tolist() == pytest.approx([mean - error, mean + error])
    assert chance.lines[0].get_ydata()[0] == pytest.approx(means["random_0.9"][0])
    (band,) = axes.patches
    assert band.get_y() == pytest.approx(means["dense"][0] - means["dense"][1])
    assert axes.get_ylabel() == "exact match on toy_sort (%)"
    rows = {(row[0], row[1]): row for row in section.table}
    assert rows["LoTA", "0.9"][2:] == [f"{means['lota_0.9'][i] / 100:.4f}" for i in (0, 1)] + ["2"]
    assert rows["full fine-tuning", "-"][4] == "2"


def test_one_run_has_the_standard_error_of_its_examples(tmp_path):
    path = run_folders.rated_mask(tmp_path / "0.9_mask.pt", 0.1, "task_vector")
    folder = run_folders.write_run(tmp_path / "r", path, scores={"toy_sort": SORT})
    (row,) = sections([folder])["Exact match on toy_sort"].table[1:]
    assert row == ["LoTA", "0.9", "0.7500", f"{statistics.stdev(SORT) / 2:.4f}", "1"]


def test_runs_without_a_mask_are_bars_and_the_base_is_a_level(tmp_path):
    folder = run_folders.write_run(tmp_path / "r", scores={"toy_sort": SORT})
    figure = sections([folder])["Exact match on toy_sort"].figure
    assert [bar.get_width() for bar in figure.axes[0].patches] == [75.0]
    base = run_folders.write_run(tmp_path / "base", scores={"toy_sort": [0.0, 1.0]}) / "epoch-1"
    plot_runs.main([str(folder), "--base", str(base), "--out", str(tmp_path / "f")])
    table = run_folders.tables((tmp_path / "f" / "index.html").read_text())["Exact match on toy_sort"]
    assert table[1][:3] == ["base model", "-", "0.5000"]


def test_density_and_overlap_are_brute_force(folders, tmp_path):
    found = sections(folders)
    masks = [
        Mask.load(tmp_path / "m" / name)
        for name in ("sort/0.5_mask.pt", "sort/0.9_mask.pt", "random/0.9_mask.pt")
    ]
    name = "model.layers.2.mlp.down_proj.weight"
    section = found["Density of sort/0.9"]
    share = 100 * masks[1].dense(name).double().mean().item()
    assert section.figure.axes[0].images[0].get_array()[2, 6] == pytest.approx(share)
    assert section.table[3][7] == f"{share:.2f}"
    kept = [torch.cat([mask.dense(n).reshape(-1) for n in mask.names]).numpy() for mask in masks]
    shown = found["Overlap of masks"].figure.axes[0].images[0].get_array()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        iou = np.count_nonzero(kept[i] & kept[j]) / np.count_nonzero(kept[i] | kept[j])
        assert shown[j, i] == pytest.approx(iou)
        assert shown[i, j] == pytest.approx(iou, rel=0.1)  # random masks: as much as by chance
    assert [row[:2] for row in found["Overlap of masks"].table[1:]] == [
        ["sort/0.5", "sort/0.9"], ["sort/0.5", "random/0.9"], ["sort/0.9", "random/0.9"],
    ]  # fmt: skip


def test_forgetting_is_the_ledger_with_standard_errors(folders):
    found = sections(folders)
    axes, bar = found["Scores of two_tasks"].figure.axes
    assert axes.images[0].get_array().tolist() == [[0.05, 0.1], [0.9, 0.1], [0.85, 0.95]]
    assert [text.get_text() for text in axes.texts[2:]] == [
        "0.90\n± 0.03", "0.10", "0.85\n± 0.04", "0.95\n± 0.02",
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base model", "after a", "after b"]
    assert bar.get_ylabel() == "exact match"
    assert found["Scores of two_tasks"].table[3] == ["after b", "0.8500 ± 0.0400", "0.9500 ± 0.0200"]
    assert found["Held-out losses of two_tasks"].table[1] == ["after a", "0.5000", "2.0000"]
    ledger = found["Ledger of two_tasks"].table
    assert ledger[2] == ["b", "1,000", "9,000", "1_a/0.9_mask.pt", "a", "0", "abababababab", "abababababab"]


def test_several_sequences_are_compared(tmp_path):
    folders = [write_sequence(tmp_path / name) for name in ("first", "second")]
    assert "Sequences compared by scores" not in sections(folders[:1])
    found = sections(folders)["Sequences compared by scores"]
    assert [row[0] for row in found.table[1:]] == ["first", "second"]
    assert found.table[1][-3:] == ["0.9000 ± 0.0200", "-", "0.0500"]


def test_a_sequence_without_its_matrix_has_no_standard_errors(tmp_path):
    folder = write_sequence(tmp_path / "two_tasks")
    (folder / "forgetting.json").write_text('{"tasks": ["a"], "score": {"stderr": [[1, 2]]}}')
    found = sections([folder])
    assert found["Scores of two_tasks"].table[1] == ["after a", "0.9000", "0.1000"]
    assert any("holds no forgetting matrix" in note for note in found["Left out"].items)


def test_memory_and_speed_are_means_over_seeds(folders):
    memory, speed = sections(folders)["Memory and speed"].figure.axes
    assert [bar.get_width() for bar in memory.patches] == pytest.approx([(2**28 + 6) / 2**30] * 4)
    assert [bar.get_width() for bar in speed.patches] == pytest.approx([350.0] * 4)
    assert [label.get_text() for label in memory.get_yticklabels()] == [
        "full fine-tuning", "LoTA, s = 0.5", "LoTA, s = 0.9", "random mask, s = 0.9",
    ]  # fmt: skip
    assert memory.get_xlabel() == "peak memory (GiB)" and speed.get_xlabel() == "training speed (tokens/s)"


def test_preference_runs_have_reward_curves(tmp_path):
    log = [
        {
            "examples": 8 * i,
            "loss/train": 0.7,
            "rewards_train/margins": 0.1 * i,
            "rewards_train/accuracies": 0.5,
        }
        for i in range(1, 1001)
    ]
    log.append({"examples": 8000, "rewards_eval/margins": 7.0, "rewards_eval/accuracies": 0.75})
    found = sections([run_folders.write_run(tmp_path / "r", log=log)])
    training, held_out = found["Reward margin"].figure.axes
    assert held_out.lines[0].get_ydata().tolist() == [7.0]
    assert len(training.lines[0].get_xdata()) == 200  # each the mean of five lines
    assert training.lines[0].get_ydata()[0] == pytest.approx(0.3)
    assert training.lines[0].get_xdata()[0] == pytest.approx(24)
    assert "mean of up to 5 lines" in found["Reward margin"].text
    assert found["Loss per example"].figure.axes[0].lines[0].get_ydata()[0] == pytest.approx(0.7)
    assert "Loss" not in found


def test_masks_of_another_model_stand_apart(tmp_path):
    other = tiny.random_mask(tiny.make("llama"))
    paths = [
        run_folders.rated_mask(tmp_path / "a_mask.pt", 0.1, "task_vector"),
        run_folders.rated_mask(tmp_path / "b_mask.pt", 0.2, "random"),
    ]
    other.save(tmp_path / "c_mask.pt")
    folders = [
        run_folders.write_run(tmp_path / f"r{i}", path)
        for i, path in enumerate([*paths, f"mask_path={tmp_path / 'c_mask.pt'}"])
    ]
    found = sections(folders)
    assert len(found["Overlap of masks"].table) == 2
    assert "masks of different models have no overlap: a, b; c" in found["Left out"].items


def test_a_real_run_as_the_trainer_leaves_it(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.with_mini_task(tmp_path))
    runs.write_mask(tmp_path / "0.9_mask.pt")
    more = ("n_examples=32", "eval_every=16", "batch_size=8")
    trained = [
        runs.train("exp_name=dense", *more)[0],
        runs.train("exp_name=kept", "mask_path=0.9_mask.pt", *more)[0],
    ]
    found = sections([trainer.config.run_dir for trainer in trained])
    lines = runs.metrics(trained[1])
    training, held_out = found["Loss"].figure.axes
    kept = [line for line in training.lines if line.get_label() == "mask, s = 0.9"] or training.lines[1:]
    logged = [
        (line["examples"], line["nats_per_token/train"]) for line in lines if "nats_per_token/train" in line
    ]
    assert list(zip(*(part.tolist() for part in kept[0].get_data()), strict=True)) == logged
    assert len(held_out.lines) == 2
    assert found["Memory and speed"].figure.axes[0].patches[0].get_width() > 0
