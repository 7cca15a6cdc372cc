"""Files that version 0.1 wrote are still read, and a run that it began is continued."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from runs import assert_frozen, metrics, policy, same, train
from safetensors.torch import load_file

from lota.config import Config
from lota.delta import apply, extract, revert
from lota.masks import Mask
from lota.models.hashing import content_hash
from lota.models.weights import open_weights
from lota.share.convert import convert_policy
from trainers import TRAINERS

OLD = Path(__file__).with_name("fixtures") / "v0_1"
BASE = "bfcb904c41d1578846115bcea1be719d6335f352d718676f4807cc980b28a37e"  # content hash of base/
COMMON = ("model.name_or_path=base", "max_length=48", "max_prompt_length=24", "n_examples=8")


@pytest.fixture(autouse=True)
def folder(workplace, private_cache):
    """A working directory with the old files; the run lies in the cache."""
    shutil.copytree(OLD, workplace, dirs_exist_ok=True)
    shutil.move(workplace / "run", private_cache / "run")
    return workplace


@pytest.fixture
def config(private_cache):
    """The settings of the run."""
    stored = OmegaConf.load(private_cache / "run" / "config.yaml")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), stored))


def finished() -> dict[str, torch.Tensor]:
    return torch.load("finished.pt", weights_only=True)["state"]


def test_masks_of_both_layouts(folder):
    packed, dense = Mask.load("mask_packed.pt"), Mask.load("mask_dense.pt")
    assert packed.fingerprint() == "be598844bb24a72522b9702aba787bca38f02b0bfa3b57493964fb92ba70de10"
    assert (packed.n_kept, packed.n_total, dense.n_kept) == (400, 3840, 400)
    assert dense.only(packed.names).fingerprint() == packed.fingerprint()


def test_a_policy_is_converted(folder):
    convert_policy("base", "finished.pt", "converted")
    assert same(load_file("converted/model.safetensors"), finished())


def test_a_delta_is_applied_and_reverted(folder):
    assert content_hash(open_weights("base")) == BASE
    apply("base", "delta.safetensors", "applied")
    assert same(load_file("applied/model.safetensors"), finished())
    revert("applied", "delta.safetensors", "reverted")
    assert content_hash(open_weights("reverted")) == BASE


def test_a_delta_is_written_to_the_same_bytes(folder):
    extract("base", "finished.pt", "again.safetensors", mask="mask_packed.pt", task="mini")
    assert (folder / "again.safetensors").read_bytes() == (folder / "delta.safetensors").read_bytes()


def test_a_run_is_continued_from_its_checkpoint(config):
    """It ends where the old code ended, but for rounding: that was another processor."""
    trainer = TRAINERS["BasicTrainer"](config)
    assert trainer.data.resumable.folder.name == "step-32"
    last = trainer.train()
    assert [line["step"] for line in metrics(trainer) if "loss/train" in line] == list(range(1, 11))
    assert_frozen(Mask.load("mask_packed.pt"), policy(last), load_file("base/model.safetensors"))
    torch.testing.assert_close(policy(last), finished(), rtol=1e-3, atol=1e-4)


def test_a_run_is_not_continued_with_another_mask_or_other_data(folder, config):
    Mask.load("mask_packed.pt").flip(Mask.load("mask_packed.pt").shapes).save("mask_packed.pt")
    task = folder / "tasks" / "mini.py"
    task.write_text(task.read_text().replace("7 * i + 3 * k", "5 * i + 3 * k"))
    with pytest.raises(ValueError, match="another mask and other data"):
        TRAINERS["BasicTrainer"](config)


def test_a_snip_mask_is_reused(folder, caplog):
    caplog.set_level("INFO")
    snip = ("snip=true", "snip_batches=2", f"save_snip_mask_path={folder}/mask_snip.pt")
    train(*COMMON, *snip, "exp_name=snip")
    assert f"reusing the mask {folder}/mask_snip.pt" in caplog.text


def test_reference_log_probabilities_have_the_same_key(folder, private_cache):
    """But for the hash of the model's config, to which a release of transformers may add a field."""
    old = torch.load("reference_logps.pt", weights_only=True)
    train(*COMMON, "datasets=[pairs]", "loss=dpo", "model.reference=precomputed", "exp_name=dpo")
    (file,) = (private_cache / "reference_logps").glob("*.pt")
    new = torch.load(file, weights_only=True)
    assert old["key"] == new["key"] | {"model_config": old["key"]["model_config"]}
    torch.testing.assert_close(new["logps"], old["logps"], rtol=1e-4, atol=1e-3)
