"""What is found out before a model loads: all problems together, and what a run is made from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_folders import begun_run, write_checkpoint
from runs import MODEL, settings, with_mini_task, write_mask
from safetensors.torch import load_file, save_file

from lota.data.batches import encoder
from lota.models.hashing import content_hash
from lota.models.weights import open_weights
from lota.train.preflight import Prepared, _refuse_other, add_snip_mask, prepare
from lota.train.run_folder import Resumable
from lota.train.snip import SnipMask
from tasks import get_task

# What a run is made from

SEEN = {"mask": "m", "data": "d", "base": "b", "config": "k", "reference": None, "tokenizer": "t"}


def refuse_other(before: dict, snip: object = None, **now: str | None) -> None:
    resumable = Resumable(Path("cache/run/step-8"), {"progress": {}, **before})
    _refuse_other(SimpleNamespace(resumable=resumable, seen={**SEEN, **now}, snip=snip))


@pytest.mark.parametrize("key", SEEN)
def test_a_run_continues_with_what_it_was_made_from_alone(key):
    refuse_other(SEEN)
    refuse_other({name: value for name, value in SEEN.items() if name != key})  # of an older release
    with pytest.raises(ValueError, match=f"run cache/run was trained with another {key} under the same name"):
        refuse_other({**SEEN, key: "x"})
    with pytest.raises(ValueError, match=f"another {key} under"):
        refuse_other({**SEEN, key: "x" if SEEN[key] is None else None})


def test_all_that_has_changed_is_named_together():
    with pytest.raises(ValueError, match="another mask and other data and other base under"):
        refuse_other({**SEEN, "base": "x", "data": "x", "mask": "x"})


def test_a_mask_that_is_still_to_be_computed_is_compared_later():
    refuse_other(SEEN, snip=object(), mask=None)
    with pytest.raises(ValueError, match="another base under"):
        refuse_other({**SEEN, "base": "x"}, snip=object(), mask=None)


def test_a_new_run_is_compared_with_nothing():
    _refuse_other(SimpleNamespace(resumable=None, seen=SEEN, snip=None))


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A model that a test may change, in a working directory with tasks."""
    monkeypatch.chdir(with_mini_task(tmp_path))
    return shutil.copytree(MODEL, tmp_path / "model")


def seen(*overrides: str) -> dict[str, str | None]:
    return prepare(settings(*overrides), get_task).seen


def change_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


CHANGES = {
    "base": change_tensor,
    "config": lambda model: change_text(
        model / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'
    ),
    "tokenizer": lambda model: change_text(
        model / "tokenizer.json", '"normalizer": null', '"normalizer": {"type": "NFC"}'
    ),
    "chat template": lambda model: (model / "chat_template.jinja").write_text("{{ 1 }}"),
    "mask": lambda model: write_mask(model.parent / "0.9_mask.pt", seed=1),
    "data": lambda model: change_text(model.parent / "tasks" / "mini.py", "7 * i + 3 * k", "15 * i + 3 * k"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_every_hash_sees_its_part_alone(model, changed):
    write_mask(model.parent / "0.9_mask.pt")
    options = ("model.name_or_path=model", "mask_path=0.9_mask.pt")
    before = seen(*options)
    assert before == seen(*options) and set(before) == {*CHANGES, "reference"}
    CHANGES[changed](model)
    after = seen(*options)
    assert {name for name, value in after.items() if value != before[name]} == {changed}


def test_hashes_are_those_of_the_weights_that_are_used(model):
    """The base is model.archive, if given; a reference counts only where a loss reads it."""
    other = shutil.copytree(MODEL, model.parent / "other")
    change_tensor(other)
    hashes = {name: content_hash(open_weights(model.parent / name)) for name in ("model", "other")}
    named = ("model.name_or_path=model",)
    assert seen(*named)["base"] == hashes["model"] and seen(*named)["reference"] is None
    assert seen(*named, "model.archive=other")["base"] == hashes["other"]
    pairs = (*named, "datasets=[pairs]", "loss=dpo")
    assert seen(*pairs)["reference"] is None
    assert seen(*pairs, "model.reference_archive=other")["reference"] == hashes["other"]
    assert seen(*pairs, "model.reference_archive=other")["base"] == hashes["model"]
    free = ("model.reference_archive=other", "loss.reference_free=true")
    assert seen(*pairs, *free)["reference"] is None
    assert seen(*named, "model.reference_archive=other")["reference"] is None
    assert seen(*named)["mask"] is None
    assert set(seen(*named, "debug=true")) == {"mask", "data"}  # nothing is stored that could be continued


@pytest.mark.parametrize("changed", ["base", "data"])
def test_a_run_whose_parts_have_changed_is_refused_before_a_model_loads(model, changed, no_model):
    options = ("model.name_or_path=model",)
    run = begun_run(settings(*options))
    write_checkpoint(run, "step-8", 1, **seen(*options))
    prepare(settings(*options), get_task)
    CHANGES[changed](model)
    with pytest.raises(ValueError, match=f"trained with another {changed} under the same name"):
        prepare(settings(*options), get_task)


# All problems together


def prepared(*overrides: str) -> Prepared:
    return prepare(settings("model.name_or_path=model", *overrides), get_task)


def told(*overrides: str) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(ValueError) as error:
        prepared(*overrides)
    return str(error.value).splitlines()


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def test_run_task_and_mask_are_told_together(model, no_model):
    begun_run(settings("model.name_or_path=model"))
    lines = told("resume=never", "datasets=[mini,nope]", "mask_path=absent.pt", "snip=false")
    assert len(lines) == 3
    for line, words in zip(lines, ("resume=never, but", "unknown task 'nope'", "absent.pt"), strict=True):
        assert words in line


def test_weights_are_looked_at_without_a_tokenizer_too(model, no_model):
    damage(model / "model.safetensors")
    for file in model.glob("tokenizer*"):
        file.unlink()
    lines = told()
    assert len(lines) == 2 and "tokenizer" in lines[0] and "model.safetensors" in lines[1]


def test_what_needs_a_model_waits_for_one(model, no_model):
    damage(model / "model.safetensors")
    (line,) = told("snip=true")
    assert "model.safetensors" in line
    (line,) = told("mask_path=absent.pt")
    assert "model.safetensors" in line


def test_what_needs_data_waits_for_it(model, no_model):
    (line,) = told("snip=true", "datasets=[nope]")
    assert "unknown task 'nope'" in line


def test_scope_delta_and_reference_are_told_together(model, no_model):
    other = shutil.copytree(MODEL, model.parent / "other")
    change_text(other / "tokenizer.json", '"~": ', '"~~": ')
    pairs = ("datasets=[pairs]", "loss=dpo", "model.reference_archive=other")
    lines = told(*pairs, "save_delta=true", "model.policy_dtype=float16", "model.block_name=Nope")
    assert len(lines) == 3
    for line, words in zip(lines, ("Nope", "save_delta=true", "reference_archive=other"), strict=True):
        assert words in line


def test_settings_are_checked_first(model):
    config = replace(settings("model.name_or_path=model"), batch_size=-1)
    with pytest.raises(ValueError, match=r"^invalid settings:\n  batch_size=-1"):
        prepare(config, get_task)


# What a trainer starts from


@pytest.mark.parametrize("options", [(), ("datasets=[pairs]", "loss=dpo")])
def test_lengths_are_those_of_the_longest_row_of_an_example(model, options):
    assert prepared(*options).lengths is None
    found = prepared(*options, "group_by_length=true")
    encode = encoder(settings("model.name_or_path=model", *options), found.tokenizer)
    rows = [[len(row) for row in encode(example)] for example in found.train]
    assert found.lengths == [sorted(each)[-1] for each in rows]
    assert len(set(found.lengths)) > 1 and (not options or any(len(set(each)) > 1 for each in rows))


SNIP = ("snip=true", "snip_batches=2", "save_snip_mask_path=snip.pt", "eval_every=100000")


def test_a_mask_of_snip_is_computed_once(model, monkeypatch):
    """By `add_snip_mask`, unless it is stored already; a run that had another one is refused."""
    mask = write_mask(Path("made.pt"))
    monkeypatch.setattr(SnipMask, "compute", lambda self, *given: mask)
    data = prepared(*SNIP)
    config = settings("model.name_or_path=model", *SNIP)
    assert data.mask is None and data.snip.key["data"]["examples"] == 16 and data.seen["mask"] is None
    data.resumable = Resumable(Path("run/step-8"), {**data.seen, "mask": "another"})
    _refuse_other(data)
    with pytest.raises(ValueError, match="another mask under"):
        add_snip_mask(data, config, torch.device("cpu"), bool)
    data = prepared(*SNIP)
    add_snip_mask(data, config, torch.device("cpu"), bool)
    assert data.snip is None and data.mask.fingerprint() == data.seen["mask"] == mask.fingerprint()
    mask.meta["snip_key"] = prepared(*SNIP).snip.key
    mask.save("snip.pt")
    data = prepared(*SNIP)
    assert data.snip is None and data.seen["mask"] == mask.fingerprint()
    add_snip_mask(data, config, torch.device("cpu"), bool)  # there is nothing to compute
    assert data.mask.fingerprint() == mask.fingerprint()
