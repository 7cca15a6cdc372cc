"""Sequences of tasks: what settings reach which run, and what is refused before anything is trained."""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from lotto_runs import NAMES, settings, with_tasks
from runs import MODEL, train, write_mask

from lota.config import Config, ModelConfig
from lota.lotto.check import SequenceFolder
from lota.lotto.config import LottoConfig
from lota.lotto.driver import Lotto
from lota.masks import Mask
from lota.models.scope import find_scope, meta_model
from tasks import get_task


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(with_tasks(tmp_path))
    return tmp_path


def checked(*overrides: str) -> Lotto:
    """A sequence that has passed its checks; it cannot train."""
    return Lotto(settings(*overrides), None, get_task)


def refused(*overrides: str) -> str:
    """The message of a sequence that does not start."""
    with pytest.raises(ValueError) as error:
        checked(*overrides)
    return str(error.value)


def test_defaults_of_yaml_and_schema_are_the_same():
    own = {f.name for f in fields(LottoConfig)} - {f.name for f in fields(Config)}
    plain = LottoConfig("x", ModelConfig("m"), tasks=["one", "two"])
    assert {key: asdict(settings())[key] for key in own} == {key: asdict(plain)[key] for key in own}


def test_a_sequence_of_version_0_1_is_continued(private_cache):
    """Its stored settings are those of the same command today; another setting is a change."""
    stored = Path(__file__).with_name("fixtures") / "v0_1" / "sequence.yaml"
    (private_cache / "sequence").mkdir(parents=True)
    shutil.copy(stored, private_cache / "sequence" / "config.yaml")
    given = ["model.name_or_path=base", "warmup_steps=150", "n_examples=null", "minimum_log_interval_secs=1",
             "+task_overrides.two.sparsity=0.5", "calibrate.n_steps=3", "method=lota", "loss=dpo",
             "optimizer=AdamW"]  # fmt: skip
    assert SequenceFolder(settings(*given)).may_continue()
    assert SequenceFolder(settings(*given, "tasks=[one,two,three]")).may_continue()
    with pytest.raises(ValueError, match=r"calibrate\.n_steps: 3 -> 4; lr: 0\.01 -> 0\.02"):
        SequenceFolder(settings(*given, "calibrate.n_steps=4", "lr=2e-2")).may_continue()


def test_every_training_key_reaches_the_runs():
    config = settings(
        "optimizer=AdamW", "betas=[0.8,0.9]", "lr=3e-3", "model.policy_dtype=bfloat16", "seed=4"
    )
    for run in (config.adaptation("one"), config.calibration("one")):
        found = (run.optimizer, run.betas, run.seed, run.model.policy_dtype)
        assert found == ("AdamW", [0.8, 0.9], 4, "bfloat16")
        assert run.datasets == ["one"] and type(run) is Config
    assert config.adaptation("one").lr == 3e-3
    assert config.calibration("one").lr == pytest.approx(3e-4)
    assert settings("calibrate.data_fraction=0.5").calibration("one").data_fraction == 0.5
    assert settings("method=lora", "lora_rank=4").adaptation("one").adapter.name == "lora"


BAD = [
    (["tasks=[one,nine]"], ["unknown task 'nine'", "nearest: one"]),
    (["tasks=[one,two,one]"], ["one is named twice"]),
    (["tasks=[]"], ["tasks is empty"]),
    (["sparsity=1"], ["sparsity=1.0", "below 1"]),
    (["sparsity=-0.1", "method=lot", "order=up", "lr=-1"], ["sparsity=-0.1", "method=lot:", "order=up"]),
    (["lr=-1", "batch_size=0"], ["lr=-1.0", "batch_size=0"]),
    (["calibrate.data_fraction=2"], ["calibrate: data_fraction=2.0"]),
    (["calibrate.n_steps=0"], ["calibrate.n_steps=0"]),
    (["calibrate.lr=0"], ["calibrate.lr=0 (one): the calibration would change nothing"]),
    (["+task_overrides.two.lr=0"], ["lr=0 (two): the calibration would change nothing"]),
    (["datasets=[one]"], ["datasets=['one']", "tasks=[...]"]),
    (["mask_path=m.pt"], ["+task_overrides.TASK.mask_path"]),
    (["flip_mask=true", "debug=true"], ["flip_mask=True", "debug=True"]),
    (["+task_overrides.tow.lr=1"], ["task_overrides.tow", "did you mean two?"]),
    (["+task_overrides.one.leaning_rate=1"], ["unknown key task_overrides.one.leaning_rate"]),
    (["+task_overrides.one.lr=fast"], ["task_overrides.one.lr: ", "'fast'", "Float"]),
    (["+task_overrides.one.calibrate.lr=fast"], ["task_overrides.one.calibrate.lr: ", "'fast'"]),
    (["+task_overrides.one.n_eval_examples=3"], ["one for all tasks"]),
    (["+task_overrides.one.mask_path=m.pt", "method=fft"], ["method=fft trains without masks"]),
    (["+task_overrides.one.mask_path=absent.pt"], ["absent.pt does not exist"]),
    (["adapter=lora"], ["choose method=lora"]),
    (["protect_masks=[absent.pt]"], ["absent.pt does not exist"]),
    (["exp_name=../up"], ["exp_name=../up"]),
    (["method=lota", "optimizer_state=factored"], ["method=lota: its masks keep single entries"]),
    (["method=random", "+task_overrides.two.optimizer_state=factored"], ["method=random: its masks keep"]),
    (["calibrate.optimizer_state=factored"], ["calibrate.optimizer_state=factored", "what other tasks keep"]),
    (["+task_overrides.two.calibrate.optimizer_state=factored"], ["leaves alone what other tasks keep"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), BAD)
def test_bad_settings_are_refused_before_anything_is_trained(workplace, overrides, expected):
    text = refused(*overrides)
    assert [part for part in expected if part not in text] == []
    assert not (workplace / "cache").exists()


def test_calibrations_that_are_alone_may_be_factored():
    assert checked("method=lota", "calibrate.optimizer_state=factored")
    assert checked("method=fft", "optimizer_state=factored")
    text = refused("optimizer_state=factored")
    assert text.count("its masks keep single entries") == text.count("what other tasks keep") == 1


def test_tasks_and_masks_are_told_with_the_other_problems(workplace):
    text = refused("lr=-1", "tasks=[one,nine]", "+task_overrides.one.mask_path=absent.pt")
    assert all(part in text for part in ("lr=-1", "unknown task 'nine'", "absent.pt does not exist"))


def test_a_mistake_is_reported_once():
    assert refused("lr=-1", "n_eval_examples=0").count("n_eval_examples=0") == 1


def test_tasks_that_do_not_fit_are_refused_with_what_would():
    text = refused("sparsity=0.4")
    assert "enough for 1 of 2 tasks" in text and "sparsity=0.5 or more" in text
    text = refused("tasks=[one,two,three]", "sparsity=0.5")
    assert "1,069,056 entries" in text and "712,704" in text and "enough for 2 of 3 tasks" in text
    least = float(text.split("all fit at sparsity=")[1].split()[0])
    assert checked("tasks=[one,two,three]", f"sparsity={least}")
    assert "enough for 2 of 3" in refused("tasks=[one,two,three]", f"sparsity={least - 1e-5}")
    assert checked("sparsity=0.4", "method=lota")
    assert checked("sparsity=0.4", "+task_overrides.two.sparsity=0.6")


def test_whole_blocks_count_against_the_capacity(workplace):
    """Of a few scattered entries every block is touched."""
    write_mask(workplace / "few.pt", density=0.02)
    settings_of = ("protect_masks=[few.pt]", "sparsity=0.5", "tasks=[one]")
    checked(*settings_of)
    text = refused(*settings_of, "granularity=block", "block=64")
    assert "but 0 of the scope's" in text


def test_masks_count_against_the_capacity(workplace):
    kept = write_mask(workplace / "m.pt", 0.25).n_kept
    text = refused("sparsity=0.6", f"protect_masks=[{workplace}/m.pt]")
    assert f"{712_704 - kept:,} of the scope's 712,704 are free" in text
    text = refused("tasks=[one,two,three]", "sparsity=0.6", f"+task_overrides.two.mask_path={workplace}/m.pt")
    assert "(one 285,082, three 285,082)" in text


def test_masks_that_overlap_are_refused(workplace):
    first, second = write_mask(workplace / "a.pt", seed=1), write_mask(workplace / "b.pt", seed=2)
    shared = f"{first.overlap(second):,}"
    text = refused(f"+task_overrides.one.mask_path={workplace}/a.pt", f"protect_masks=[{workplace}/b.pt]")
    assert f"both keep {shared} entries" in text and "protect_masks" in text
    both = [
        f"+task_overrides.{task}.mask_path={workplace}/{name}.pt"
        for task, name in (("one", "a"), ("two", "b"))
    ]
    assert f"both keep {shared} entries" in refused(*both)
    assert checked("method=lota", *both)


def test_a_mask_of_another_model_is_refused(workplace):
    other = Mask.from_dense({"model.layers.0.mlp.up_proj.weight": torch.ones(3, 5, dtype=torch.bool)})
    other.save(workplace / "other.pt")
    assert "does not belong to this model" in refused(f"+task_overrides.one.mask_path={workplace}/other.pt")
    assert "does not belong to this model" in refused(f"protect_masks=[{workplace}/other.pt]")


def test_a_folder_of_another_run_is_refused(workplace, monkeypatch):
    config = settings()
    with SequenceFolder(config), pytest.raises(ValueError, match="another process"):
        SequenceFolder(config).__enter__()
    text = refused(f"model.name_or_path={shutil.copytree(MODEL, workplace / 'other')}", "lr=1e-3")
    assert "model.name_or_path: " in text and "lr: 0.01 -> 0.001" in text and "overwrite=true" in text
    assert "tasks: ['one', 'two'] -> ['two']" in refused("tasks=[two]")
    assert "holds a run" in refused("resume=never")
    assert checked("n_eval_examples=3", "eval_every=5")
    (config.run_dir / "1_one").mkdir()
    (config.run_dir / "config.yaml").unlink()
    assert "config.yaml is missing" in refused()
    assert checked("overwrite=true")


def test_a_training_run_of_that_name_is_refused():
    train("exp_name=sequence", "n_examples=8", "datasets=[one]")
    assert "tasks: [] -> ['one', 'two']" in refused()


def test_unused_settings_are_listed():
    assert settings().unused() == []
    found = settings("method=fft", "sparsity=0.5", "calibrate.n_steps=3").unused()
    assert found == ["sparsity=0.5 (method=fft)", "calibrate.n_steps=3 (method=fft)"]


def test_names_are_all_of_the_scope():
    found = checked().checked
    assert found.everything.n_total == 712_704 == found.everything.n_kept
    assert found.everything.names == list(find_scope(meta_model(MODEL)))
    assert [h.task.name for h in found.held_out] == list(NAMES[:2])


def test_a_checkpoint_that_was_being_written_begins_no_sequence(tmp_path):
    folder = SequenceFolder(settings())
    for name, begun in ((".epoch-1.0badcafe-1-1.tmp", False), ("epoch-1", True)):
        inside = folder.path / "1_one" / "calibrate" / name
        inside.mkdir(parents=True)
        (inside / "resume.pt").touch()
        assert folder.begun() is begun


def test_earlier_tasks_are_replayed_from_the_second_stage_on():
    config = settings("tasks=[one,two,three]", "retain.replay_fraction=0.2")
    for run in (config.adaptation, config.calibration):
        assert [run(task).replay for task in NAMES] == [[], ["one"], ["one", "two"]]
        assert run("three").replay_fraction == 0.2
    reversed_order = settings("tasks=[one,two]", "order=reversed", "retain.replay_fraction=0.2")
    assert [reversed_order.adaptation(task).replay for task in ("one", "two")] == [["two"], []]
    assert all(settings().adaptation(task).replay == [] for task in ("one", "two"))
    assert "retain.replay_fraction replays rows of the earlier tasks" in refused("replay=[three]")
    assert "replay_fraction=0.5: not with a sequence" in refused("replay_fraction=0.5")
