"""What lies in a run's folder decides whether a run continues, starts anew or is refused; nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from run_folders import begun_run, finished_run, folder_state, looked, write_checkpoint
from runs import settings

from lota.config import Config
from lota.train.run_folder import RunFolder

OWN = ("config.yaml", "versions.json", "metrics.jsonl", "samples.jsonl", "wandb", "step-80", "epoch-1")
STRANGE = (
    "note.txt",
    "my-config.yaml",
    "config.yaml.old",
    "step-",
    "step-8x",
    "old-step-8",
    "debug",
    "xwandb",
)


@pytest.fixture
def config(private_cache) -> Config:
    return settings()


# What lies here


def test_where_nothing_is_a_new_run_starts(config, tmp_path):
    before = tmp_path.stat().st_mtime_ns
    folder = RunFolder(config)
    assert folder.look() is None and folder.continues is False
    assert tmp_path.stat().st_mtime_ns == before  # looking makes no folder
    with folder:
        assert sorted(os.listdir(folder.path)) == [".lock", "config.yaml"]
    text = (folder.path / "config.yaml").read_text()
    assert yaml.safe_load(text) == asdict(config)
    assert list(yaml.safe_load(text)) == list(asdict(config))  # in the order of the documents


def test_only_what_a_run_writes_is_its_own(config):
    run = finished_run(config)
    for name in (*OWN, *STRANGE):
        if not (run / name).exists():
            (run / name).touch()
    folder = RunFolder(config)
    assert [item.name for item in folder.items()] == sorted(OWN)
    assert folder.results() == ["epoch-1", "step-80"]
    assert not folder.begun()
    (run / "step-80" / "resume.pt").mkdir()
    assert not folder.begun()
    (run / "step-80" / "resume.pt").rmdir()
    (run / "step-80" / "resume.pt").touch()
    assert folder.begun()  # though epoch-1 has none


@pytest.mark.parametrize(
    ("change", "checkpoints", "continues"),
    [
        ({}, ["step-8"], "step-8"),
        ({}, ["step-8", "epoch-1"], "epoch-1"),
        ({}, ["epoch-1", "step-8"], "step-8"),
        ({}, [], None),
        ({"eval_every": 3}, ["step-8"], "step-8"),  # changes no weight
        ({"overwrite": True}, ["step-8"], None),
        ({"overwrite": True, "lr": 0.5}, ["step-8"], None),
        ({"debug": True}, ["step-8"], None),
        ({"debug": True, "resume": "never"}, ["step-8"], None),
        ({"resume": "never"}, ["step-8"], "resume=never, but .* holds a run: .*overwrite=true"),
        ({"resume": "never"}, [], "resume=never, but .* holds a run"),
        ({"lr": 0.5}, ["step-8"], r"other settings \(lr: 0.001 -> 0.5\).*overwrite=true.*old settings"),
        ({"lr": 0.5, "warmup_steps": 9}, [], r"\(lr: 0.001 -> 0.5; warmup_steps: 2 -> 9\)"),
    ],
)
def test_whether_a_run_continues(config, change, checkpoints, continues):
    run = begun_run(config, *checkpoints)
    before = folder_state(run)
    folder = RunFolder(replace(config, **change))
    if continues and " " in continues:
        with pytest.raises(ValueError, match=continues):
            folder.look()
    elif continues:
        found = folder.look()
        assert found.folder == run / continues and found.content["progress"]["step"] == len(checkpoints)
    else:
        assert folder.look() is None
    assert folder.continues is (continues in checkpoints)
    assert folder_state(run) == before


@pytest.mark.parametrize(
    ("lost", "overwrite", "why"),
    [
        ("step-8/resume.pt", False, "none of its checkpoints is whole"),
        ("step-8/policy.pt", False, "none of its checkpoints is whole"),
        ("config.yaml", False, "config.yaml is missing"),
        ("step-8/resume.pt", True, None),
        ("config.yaml", True, None),
    ],
)
def test_results_that_cannot_be_continued_are_refused(config, lost, overwrite, why):
    run = begun_run(config, "step-8")
    (run / lost).unlink()
    folder = RunFolder(replace(config, overwrite=overwrite))
    if why:
        with pytest.raises(ValueError, match=rf"step-8, which cannot be continued \({why}\): .*overwrite"):
            folder.look()
    else:
        assert folder.look() is None


def test_a_folder_without_results_is_no_run(config):
    """Not even under resume=never; what lies in it stays."""
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "note.txt").write_text("mine")
    assert RunFolder(config).may_continue() is False
    assert begun_run(replace(config, resume="never"), "step-8") == config.run_dir
    assert (config.run_dir / "note.txt").read_text() == "mine"


def test_damaged_settings_are_named_with_the_remedy(config):
    run = finished_run(config)
    with pytest.raises(ValueError, match=rf"{run}/config\.yaml holds no settings.*; put the file back, use"):
        RunFolder(config).look()


@pytest.mark.parametrize("finished", [True, False])
def test_a_checkpoint_says_whether_its_run_has_finished(config, finished):
    write_checkpoint(begun_run(config), "step-8", 1, finished)
    assert RunFolder(config).look().finished is finished


def test_debug_works_beside_the_run(config):
    run = begun_run(config, "step-8")
    before = folder_state(run)
    with looked(replace(config, debug=True, overwrite=True)) as folder:
        assert folder.path == run / "debug"
    assert {k: v for k, v in folder_state(run).items() if not k.startswith("debug")} == before
    assert os.listdir(run / "debug") == ["config.yaml"]  # which stays: the run has not failed


# A run in it


def test_a_continued_run_finds_its_files(config):
    run = begun_run(config, "step-8")
    (run / "metrics.jsonl").write_text("{}\n")
    before = folder_state(run)
    with looked(config):
        assert {name: folder_state(run)[name] for name in before} == before
        assert not (run / ".replaced").exists()
    assert folder_state(run) == before


@pytest.mark.parametrize("leaves", ["nothing", "metrics", "step-8"])
@pytest.mark.parametrize("before", ["nothing", "a run", "a checkpoint without settings"])
def test_what_stays_of_a_run_that_fails(config, leaves, before):
    """A checkpoint replaces the old run; else that comes back, and without one at least the log stays."""
    config = replace(config, overwrite=True)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "note.txt").touch()
    if before != "nothing":
        finished_run(config)
    if before == "a checkpoint without settings":
        (config.run_dir / "config.yaml").unlink()
    old = folder_state(config.run_dir)
    with pytest.raises(KeyError), looked(config) as folder:
        assert "note.txt" in os.listdir(folder.path) and not (folder.path / "step-80").exists()
        (folder.path / "versions.json").touch()
        if leaves == "metrics":
            (folder.path / "metrics.jsonl").write_text("new")
        if leaves == "step-8":
            write_checkpoint(folder.path, "step-8", 1)
        new = {name: content for name, content in folder_state(folder.path).items() if name != ".lock"}
        raise KeyError
    kept = leaves == "step-8" or (leaves == "metrics" and before == "nothing")
    expected = {name: content for name, content in new.items() if not name.startswith(".replaced")}
    assert folder_state(folder.path) == (expected if kept else old)
    assert not list(folder.path.glob(".*"))


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_that_ended_between_look_and_lock_is_not_deleted(config, overwrite):
    folder = looked(replace(config, overwrite=overwrite))
    run = finished_run(config)
    before = folder_state(run)
    with pytest.raises(ValueError, match="has changed while this run was being prepared"):
        folder.__enter__()
    assert folder_state(run) == before  # and no lock is left


def rewrite(path: Path) -> None:
    """Another file of the same name, length and time."""
    times, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda run: (run / "config.yaml").open("a").write("# x\n"), True),
        (lambda run: os.utime(run / "config.yaml", (1, 1)), True),
        (lambda run: rewrite(run / "config.yaml"), True),
        (lambda run: (run / "step-8").rename(run / "step-9"), True),
        (lambda run: (run / "samples.jsonl").touch(), True),
        (lambda run: (run / "note.txt").touch(), False),
        (lambda run: (run / "step-8" / "metrics").mkdir(), False),  # an evaluation of that checkpoint
    ],
)
def test_what_changed_between_look_and_lock_is_noticed(config, change, refused):
    run = begun_run(config, "step-8")
    folder = looked(config)
    change(run)
    expected = pytest.raises(ValueError, match="has changed while") if refused else contextlib.nullcontext()
    with expected, folder:
        pass
    assert not (run / ".lock").exists()


def test_a_run_is_held_until_it_ends(config):
    run = finished_run(config)
    with looked(replace(config, overwrite=True)):
        assert not (run / "step-80").exists()
        before = folder_state(run)
        with pytest.raises(ValueError, match="is at work in"):
            RunFolder(config).look()
        assert folder_state(run) == before
        (run / "step-8").mkdir()
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "step-8"]
    assert looked(replace(config, overwrite=True)).path == run


def test_a_file_in_the_place_of_the_folder_is_named(config):
    folder = looked(config)
    config.run_dir.parent.mkdir(parents=True)
    config.run_dir.touch()
    with pytest.raises(ValueError, match=f"{config.run_dir} cannot be the folder of a run: "):
        folder.__enter__()


# Replaced runs


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("then", [{"overwrite": True}, {"resume": "auto"}])
def test_overwrite_killed_between_its_renames_loses_nothing(config, monkeypatch, n, then):
    """The process ends at its n-th rename; the next start finds the old run whole, or a new one begun."""
    overwriting = replace(config, overwrite=True)
    run = finished_run(config)
    before = folder_state(run)
    real, left = os.replace, [n]

    def rename(*paths):
        left[0] -= 1
        if left[0] <= 0:
            raise KeyboardInterrupt
        real(*paths)

    folder = looked(overwriting)
    with monkeypatch.context() as patch:
        patch.setattr("lota.train.run_folder.os.replace", rename)
        with contextlib.suppress(KeyboardInterrupt), folder:
            raise KeyboardInterrupt
    with contextlib.suppress(ValueError):  # under resume=auto the old run's config.yaml is refused
        RunFolder(replace(config, **then)).look()
    assert folder_state(run) == before


def lay(run: Path, hidden: str, *names: str) -> None:
    (run / hidden).mkdir(exist_ok=True)
    for name in names:
        os.replace(run / name, run / hidden / name)


@pytest.mark.parametrize(
    ("hidden", "moved"),
    [
        (".moving", ()),
        (".moving", ("step-80",)),
        (".moving", ("config.yaml", "metrics.jsonl", "step-80")),
        (".replaced", ("config.yaml", "metrics.jsonl", "step-80")),  # it gets that name when all is moved
    ],
)
def test_what_a_killed_command_has_moved_comes_back(config, hidden, moved):
    run = finished_run(config)
    (run / "note.txt").touch()
    before = folder_state(run)
    lay(run, hidden, *moved)
    if hidden == ".replaced":  # the new run had begun to write
        (run / "config.yaml").write_text("new")
        (run / "samples.jsonl").write_text("new")
    looked(replace(config, overwrite=True))
    assert folder_state(run) == before
    assert sorted(os.listdir(run)) == ["config.yaml", "metrics.jsonl", "note.txt", "step-80"]


def test_what_a_begun_run_has_replaced_goes(config):
    """A process was killed after its first checkpoint and before it removed the old run."""
    run = finished_run(config)
    lay(run, ".replaced", "config.yaml", "metrics.jsonl", "step-80")
    write_checkpoint(run, "step-8", 1)
    (run / "config.yaml").write_text("new")
    looked(replace(config, overwrite=True))
    assert sorted(os.listdir(run)) == ["config.yaml", "step-8"]
    assert (run / "config.yaml").read_text() == "new"


def test_what_cannot_be_removed_is_no_run_to_put_back(config, monkeypatch):
    """A network file system keeps a file that somebody has open: the new run ends well."""

    def busy(path):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    run = finished_run(config)
    with looked(replace(config, overwrite=True)) as folder:
        monkeypatch.setattr("lota.train.run_folder.remove", busy)
        folder.keep()
        assert not (run / ".replaced").exists()
    monkeypatch.undo()
    assert not (run / "step-80").exists() and (run / "config.yaml").exists()


def test_an_evaluation_that_outlives_its_run_begins_none(config):
    """It makes epoch-1/metrics again after overwrite=true has moved the run aside; the old run comes back."""
    run = finished_run(config)
    with contextlib.suppress(KeyboardInterrupt), looked(replace(config, overwrite=True)):
        (run / "step-80" / "metrics").mkdir(parents=True)
        raise KeyboardInterrupt
    assert (run / "step-80" / "policy.pt").read_text() == "old" and not (run / ".replaced").exists()


def test_what_lies_in_the_way_back_is_set_aside(config):
    run = finished_run(config)
    lay(run, ".moving", "step-80")
    (run / "step-80" / "metrics").mkdir(parents=True)
    looked(replace(config, overwrite=True))
    assert (run / "step-80" / "policy.pt").read_text() == "old" and (run / "step-80.1" / "metrics").is_dir()
