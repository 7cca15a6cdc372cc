"""save_delta=true: a run's delta gives what the converter gives; what cannot be is refused first."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import pytest
import torch
from delta_models import same_files, tensors
from runs import MODEL, base, metrics, policy, same, settings, train, write_mask

import trainers
from lota.config_checks import differences, unused_settings
from lota.delta import Delta, apply, extract, verify
from lota.models.hashing import content_hash
from lota.models.provenance import recorded_prompts
from lota.models.weights import open_weights
from lota.share.convert import convert_policy

pytestmark = pytest.mark.usefixtures("workplace")
SAVED = ("save_delta=true", "mask_path=0.9_mask.pt")


@pytest.mark.parametrize("precision", ["null", "bfloat16"])
def test_base_and_delta_are_what_the_converter_writes(mask, tmp_path, precision):
    base(torch.bfloat16).save_pretrained("base")
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, "base")
    options = ("model.name_or_path=base", f"model.fsdp_policy_mp={precision}")
    trainer, folder = train(*SAVED, *options)
    delta = Delta.open(folder / "delta.safetensors")
    assert 0 < delta.n_changed <= mask.n_kept == delta.meta["kept"]
    assert delta.meta["task"] == "mini" and delta.meta["sparsity"] == pytest.approx(1 - mask.density)
    assert delta.meta["tuned"] == str(folder / "policy.pt") and delta.meta["chat_template"] == "never"
    verify(tmp_path / "base", folder / "delta.safetensors")
    convert_policy(tmp_path / "base", folder, tmp_path / "converted")
    apply(tmp_path / "base", folder / "delta.safetensors", tmp_path / "applied")
    assert same_files(tmp_path / "applied", tmp_path / "converted")
    config = trainer.config
    prompts = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    for name in ("applied", "converted"):  # how the run wrote and cut its prompts goes along
        assert recorded_prompts(str(tmp_path / name)) == {"chat_template": "never", **prompts}
    assert metrics(trainer)[-1]["step"] > 0


def test_a_checkpoint_with_a_delta_beside_it_is_still_a_checkpoint(mask, tmp_path):
    _, folder = train(*SAVED)
    assert content_hash(open_weights(folder)) == content_hash(open_weights(folder / "policy.pt"))
    extract(MODEL, folder, tmp_path / "again.safetensors")  # as a user names it: RUN/epoch-1
    again, saved = (
        Delta.open(file) for file in (tmp_path / "again.safetensors", folder / "delta.safetensors")
    )
    assert again.meta["tuned_hash"] == saved.meta["tuned_hash"]
    convert_policy(MODEL, folder, folder)  # nor does it stand in the way of the converter
    apply(MODEL, folder / "delta.safetensors", tmp_path / "applied")
    assert content_hash(open_weights(folder)) == content_hash(open_weights(tmp_path / "applied"))
    assert (folder / "delta.safetensors").is_file()


@pytest.mark.slow
def test_it_changes_nothing_else_and_a_run_continues_with_or_without(mask):
    options = ("n_epochs=2", "mask_path=0.9_mask.pt")
    plain = train("exp_name=plain", *options)[1]
    _, folder = train("exp_name=with", "save_delta=true", *options)
    assert same(policy(plain), policy(folder))
    for epoch in ("epoch-1", "epoch-2"):  # each is a delta of the base, not of the epoch before
        delta = Delta.open(folder.parent / epoch / "delta.safetensors")
        state, start = policy(folder.parent / epoch), tensors(MODEL)
        for name in delta.names:
            assert torch.equal(delta.tuned(name, start[name]), state[name])
    old = settings("exp_name=with", *options)
    assert not differences(asdict(old), settings("exp_name=with", "save_delta=true", *options))


def test_from_an_archive_the_delta_is_of_the_archive(mask, tmp_path):
    write_mask(tmp_path / "other.pt", seed=2)
    _, first = train("exp_name=first", "mask_path=other.pt")
    _, second = train(*SAVED, "exp_name=second", f"model.archive={first}/policy.pt")
    delta = Delta.open(second / "delta.safetensors")
    before, after = policy(first), policy(second)
    changed = 0
    for name, parameter in delta.parameters.items():
        assert torch.equal(delta.tuned(name, before[name]), after[name])
        changed += parameter.changed
    assert changed == delta.n_changed > 0 and delta.meta["base"] == str(first / "policy.pt")


def test_a_checkpoint_is_saved_even_where_the_delta_cannot_be(mask, caplog):
    shutil.copytree(MODEL, "base")
    trainer = trainers.TRAINERS["BasicTrainer"](settings(*SAVED, "model.name_or_path=base"))
    other = base()
    other.model.embed_tokens.weight.data += 1
    other.save_pretrained("base")  # after the checks: frozen entries come from elsewhere
    start = trainer.load

    def load_then_restore():
        start()
        shutil.rmtree("base")
        shutil.copytree(MODEL, "base")

    trainer.load = load_then_restore
    folder = trainer.train()
    assert (folder / "policy.pt").is_file() and not (folder / "delta.safetensors").exists()
    assert "entries changed outside the mask" in caplog.text


def test_under_debug_it_is_not_used():
    unused = unused_settings(settings("save_delta=true", "debug=true"))
    assert unused["save_delta"] == "save_delta=True (debug=true)"
