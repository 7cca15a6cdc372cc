"""Sequences of tasks end to end: what is kept stays, stages are not run twice, a kill loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from lotto_runs import Trainings, ledger, mask, run, settings, with_tasks
from prepared import python
from runs import MODEL, ROOT, policy, same, write_mask
from transformers import AutoModelForCausalLM

from lota.data.batches import Example, Prompt, encode
from lota.lotto.driver import Lotto
from lota.masks import kept_count
from lota.masks.extract.units import units_of_scope, widened
from lota.models.loading import load_model, load_tokenizer
from lota.models.scope import find_scope
from tasks import get_task

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
KEYS = ["name", "mask", "kept", "free_after", "overlap", "hash_before", "hash_after", "scores", "losses"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(with_tasks(tmp_path))


def after(lotto: Lotto, at: int) -> dict[str, torch.Tensor]:
    return policy(lotto.weights(lotto.stages[at]).parent)


def calibrated_two(lotto: Lotto) -> dict[str, torch.Tensor]:
    return policy(next((lotto.folder / "2_two" / "calibrate").glob("step-*")))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A sequence of two tasks, run once for the tests that only look at it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = with_tasks(tmp_path_factory.mktemp("two"))
        patch.chdir(folder)
        patch.setenv("PROJECT_CACHE", str(folder / "cache"))
        yield run()


def test_each_task_trains_its_own_entries_and_nothing_else(two):
    lotto, trainings = two
    assert trainings.names == ["1_one/calibrate", "1_one/adapt", "2_two/calibrate", "2_two/adapt"]
    base = dict(AutoModelForCausalLM.from_pretrained(MODEL).named_parameters())
    states, masks = [after(lotto, 0), after(lotto, 1)], [mask(lotto, 0), mask(lotto, 1)]
    calibrated = calibrated_two(lotto)
    moved = [0, 0]
    for name, start in base.items():
        kept = [m.dense(name) if name in m else torch.zeros(start.shape, dtype=torch.bool) for m in masks]
        assert not (kept[0] & kept[1]).any()
        assert torch.equal(states[0][name][~kept[0]], start[~kept[0]])
        assert torch.equal(states[1][name][~kept[1]], states[0][name][~kept[1]])
        assert torch.equal(calibrated[name][kept[0]], states[0][name][kept[0]])
        for at, (old, new) in enumerate([(start, states[0][name]), (states[0][name], states[1][name])]):
            moved[at] += int((old != new).sum())
    assert min(moved) > 60_000  # of 71,270


def test_stages_are_learnt_without_measuring_and_measured_later(two, monkeypatch):
    """What `run` adds is results alone: models and masks are the same, bit for bit."""
    trainings = Trainings()
    lotto = Lotto(settings(), trainings, get_task)
    with monkeypatch.context() as patch, lotto.opened():
        patch.setattr("lota.lotto.driver.measure_all", lambda *_: pytest.fail("nothing is to be measured"))
        found = [(stage.task, weights) for stage, weights in lotto.learnt()]
    assert [task for task, _ in found] == ["one", "two"]
    assert trainings.names == two[1].names
    for at, (_, weights) in enumerate(found):
        assert same(policy(weights.parent), after(two[0], at))
    assert not (lotto.folder / "forgetting.json").exists()
    assert [row["losses"] for row in ledger(lotto)] == [{}, {}]
    resumed, trainings = run()
    assert trainings.names == []
    assert (resumed.folder / "ledger.json").read_bytes() == (two[0].folder / "ledger.json").read_bytes()


def test_the_mask_is_the_largest_changes_among_the_free_entries(two):
    """Against a dense sort; the task vector is tuned minus the result of the task before."""
    lotto, _ = two
    first, second = mask(lotto, 0), mask(lotto, 1)
    before, tuned = after(lotto, 0), calibrated_two(lotto)
    change = torch.cat([(tuned[n] - before[n]).abs().flatten() for n in sorted(second.names)])
    free = torch.cat([~first.dense(n).flatten() for n in sorted(second.names)])
    chosen = torch.cat([second.dense(n).flatten() for n in sorted(second.names)])
    kept = round(0.1 * len(change))
    assert int(chosen.sum()) == kept
    assert change[chosen].min() >= change[free & ~chosen].max()


def test_ledger(two):
    lotto, _ = two
    rows = ledger(lotto)
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert [row["name"] for row in rows] == ["one", "two"]
    assert [row["kept"] for row in rows] == [71_270, 71_270]
    assert [row["free_after"] for row in rows] == [712_704 - 71_270, 712_704 - 2 * 71_270]
    assert [row["overlap"] for row in rows] == [{}, {"one": 0}]
    assert rows[0]["hash_before"] == rows[0]["hash_after"] == {}
    assert rows[1]["hash_before"] == rows[1]["hash_after"] != {}
    assert len(rows[1]["hash_after"]["one"]) == 64
    for row in rows:
        assert list(row["scores"]) == list(row["losses"]) == ["one", "two"]
    text = (lotto.folder / "ledger.txt").read_text()
    assert "1. one: 71,270 entries kept, 641,434 free after it" in text
    assert f"{rows[1]['hash_after']['one'][:12]} unchanged; 0 entries shared" in text


def test_losses_and_scores_are_those_of_the_models(two):
    """Token by token with plain transformers; scores from what the evaluation wrote of each completion."""
    lotto, _ = two
    tokenizer = load_tokenizer(str(MODEL))
    for at, row in enumerate(ledger(lotto)):
        model = load_model(str(MODEL), archive=lotto.weights(lotto.stages[at]))
        for name in ("one", "two"):
            held_out = next(h for h in lotto.checked.held_out if h.task.name == name)
            task, nats, tokens = get_task(name), 0.0, 0
            for i in held_out.chosen:
                example = Example(Prompt(task.prompt(held_out.rows[i])), task.target(held_out.rows[i]))
                found = encode(tokenizer, example, max_length=512, max_prompt_length=256)
                ids = torch.tensor([found.input_ids])
                with torch.no_grad():
                    logps = model(input_ids=ids).logits.log_softmax(-1)
                for place in range(found.prompt_length, len(found)):
                    nats -= logps[0, place - 1, ids[0, place]].item()
                    tokens += 1
            assert row["losses"][name] == pytest.approx(nats / tokens, rel=1e-4)
            stage = lotto.folder / lotto.stages[at].name / "metrics" / f"{name}_predictions.jsonl"
            scores = [json.loads(line)["score"] for line in stage.read_text().splitlines()]
            assert row["scores"][name] == sum(scores) / len(scores)
            assert len(scores) == 6


def test_the_matrix_holds_the_ledgers_numbers(two):
    lotto, _ = two
    found = json.loads((lotto.folder / "forgetting.json").read_text())
    rows = ledger(lotto)
    assert found["tasks"] == ["one", "two"]
    assert found["loss"]["matrix"] == [[row["losses"][t] for t in found["tasks"]] for row in rows]
    assert found["score"]["matrix"] == [[row["scores"][t] for t in found["tasks"]] for row in rows]
    lost = found["loss"]["matrix"][1][0] - found["loss"]["matrix"][0][0]
    assert found["loss"]["forgetting"]["value"] == pytest.approx(lost)
    assert (lotto.folder / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert "after two" in (lotto.folder / "forgetting.txt").read_text()


def test_stages_on_disk_are_not_run_again_and_a_task_can_be_added(two, monkeypatch, tmp_path):
    reference = two[0]
    shutil.copytree(reference.folder, tmp_path / "cache" / "sequence")
    again, trainings = run()
    assert trainings.names == []
    assert (again.folder / "ledger.json").read_bytes() == (reference.folder / "ledger.json").read_bytes()
    third, trainings = run("tasks=[one,two,three]", "n_eval_examples=4")
    assert trainings.names == ["3_three/calibrate", "3_three/adapt"]
    rows = ledger(third)
    assert [list(row["losses"]) for row in rows] == [["one", "two", "three"]] * 3
    assert rows[2]["overlap"] == {"one": 0, "two": 0}
    assert rows[2]["hash_before"] == rows[2]["hash_after"]
    assert rows[2]["hash_after"]["one"] == ledger(reference)[1]["hash_after"]["one"]
    with pytest.raises(ValueError, match=r"tasks: .*overwrite=true"):
        run("tasks=[two,one]")


@pytest.mark.parametrize(
    ("method", "parts", "kept", "changed"),
    [
        ("lota", ["calibrate", "adapt"], 71_270, ["one"]),
        ("random", ["adapt"], 71_270, []),
        ("fft", ["adapt"], 712_704, ["one"]),
        ("lora", ["adapt"], 712_704, ["one"]),
    ],
)
def test_other_methods(method, parts, kept, changed):
    lotto, trainings = run(f"method={method}")
    assert trainings.names == [f"{stage}/{part}" for stage in ("1_one", "2_two") for part in parts]
    first, second = ledger(lotto)
    assert first["kept"] == second["kept"] == kept
    differing = [t for t, before in second["hash_before"].items() if second["hash_after"][t] != before]
    assert differing == changed
    if method in ("fft", "lora"):
        assert first["mask"] is None and second["overlap"] == {"one": kept}
        assert second["free_after"] == 0
        return
    shared = mask(lotto, 0).overlap(mask(lotto, 1))
    assert second["overlap"] == {"one": shared}
    assert (shared > 0) == (method == "lota")
    assert second["free_after"] == 712_704 - 2 * kept + shared
    assert ("CHANGED" if changed else "unchanged").lower() in (lotto.folder / "ledger.txt").read_text()


def test_blocks_of_each_task_are_its_own():
    lotto, _ = run("granularity=block", "block=32", "sparsity=0.8")
    masks = [mask(lotto, i) for i in range(2)]
    assert masks[0].overlap(masks[1]) == 0
    scope = find_scope(lotto.checked.model)
    for found in masks:
        assert found.meta["granularity"] == "block" and found.meta["block"] == 32
        units = units_of_scope(scope, "block", 32)
        assert widened(found, units).fingerprint() == found.fingerprint()
        assert 0 <= kept_count(0.8, found.n_total) - found.n_kept < 32 * 32


def test_reversed_and_settings_of_a_tasks_own():
    lotto, trainings = run(
        "order=reversed", "calibrate.n_steps=2", "calibrate.warmup_steps=0", "sparsity=0.99", "n_examples=16",
        "+task_overrides.one.lr=3e-3", "+task_overrides.one.sparsity=0.5",
        "+task_overrides.one.calibrate.n_steps=3", "+task_overrides.one.loss.average_log_prob=true",
    )  # fmt: skip
    assert trainings.names[::2] == ["1_two/calibrate", "2_one/calibrate"]
    by_name = dict(zip(trainings.names, trainings.configs, strict=True))
    lr = {name: config.lr for name, config in by_name.items()}
    expected = {"1_two/calibrate": 1e-3, "1_two/adapt": 1e-2, "2_one/calibrate": 3e-4, "2_one/adapt": 3e-3}
    assert lr == pytest.approx(expected)
    steps = {name: (config.n_examples, config.warmup_steps) for name, config in by_name.items()}
    assert list(steps.values()) == [(16, 0), (16, 1), (24, 0), (16, 1)]
    assert [c.loss.average_log_prob for c in trainings.configs] == [False, False, True, True]
    assert [row["kept"] for row in ledger(lotto)] == [7_127, 356_352]
    assert by_name["2_one/adapt"].protect_masks == [str(lotto.folder / "1_two" / "0.99_mask.pt")]


def test_masks_of_yours_are_used_and_reserved(tmp_path):
    """A later task's given mask is not taken by an earlier one; protect_masks stay free of all."""
    given = write_mask(tmp_path / "mine.pt", 0.3, seed=1)
    other = write_mask(tmp_path / "other.pt", 0.3, seed=2).minus(given)
    other.save(tmp_path / "other.pt")
    lotto, trainings = run(
        f"+task_overrides.two.mask_path={tmp_path}/mine.pt", f"protect_masks=[{tmp_path}/other.pt]"
    )
    assert trainings.names == ["1_one/calibrate", "1_one/adapt", "2_two/adapt"]
    second = ledger(lotto)[1]
    assert second["mask"] == str(tmp_path / "mine.pt")
    assert second["overlap"] == {"one": 0} and mask(lotto, 0).overlap(other) == 0
    assert second["free_after"] == 712_704 - 71_270 - given.n_kept - other.n_kept
    start, end = AutoModelForCausalLM.from_pretrained(MODEL).state_dict(), after(lotto, 1)
    for name in other.names:
        assert torch.equal(start[name][other.dense(name)], end[name][other.dense(name)])
    run(f"+task_overrides.two.mask_path={tmp_path}/mine.pt", f"protect_masks=[{tmp_path}/other.pt]")


def test_overwrite_keeps_the_old_run_until_the_new_one_has_a_checkpoint(two, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "sequence"
    shutil.copytree(two[0].folder, folder)
    before = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    monkeypatch.setattr("trainers.Trainer.set_learning_rate", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        run("overwrite=true", "lr=1e-3")
    assert {name: (folder / name).read_bytes() for name in before} == before
    monkeypatch.undo()
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    _, trainings = run("overwrite=true", "lr=1e-3", "tasks=[two]")
    assert trainings.names == ["1_two/calibrate", "1_two/adapt"]
    assert not (folder / "1_one").exists() and not (folder / ".replaced").exists()


# moment, its number, what was finished before it
KILLS = [
    ("policy", 2, ["1_one/calibrate"]),
    ("backward", 8, ["1_one/calibrate", "1_one/adapt"]),
    ("ledger", 3, ["1_one/calibrate", "1_one/adapt", "2_two/calibrate"]),
]


@pytest.mark.parametrize(("moment", "n", "done"), KILLS)
def test_killed_anywhere_the_same_command_continues(two, moment, n, done):
    command = [python(), str(HERE / "killed_run.py"), moment, str(n), "lotto"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    lotto, trainings = run()
    reference = two[0]
    assert same(after(lotto, 1), after(reference, 1))
    for name in ("ledger.json", "ledger.txt", "forgetting.json"):
        assert (lotto.folder / name).read_bytes() == (reference.folder / name).read_bytes()
    assert not set(trainings.names) & set(done)
    assert not list(lotto.folder.rglob("*.tmp"))
