"""snip=true: the mask against the command that extracts it, stored, reused, set aside; runs that use it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from mask_pairs import sorted_masks
from runs import MODEL, base, policy, same, settings, stopped_after, train, write_mask
from written_out import logp

import extract_masks
from lota.data.batches import epoch_batches
from lota.masks import Mask, kept_count
from lota.models.scope import find_scope, meta_model
from tasks import get_task

SNIP = ("snip=true", "snip_batches=3", "n_epochs=1")


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def told(caplog):
    caplog.set_level("INFO")
    return caplog


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["element", "block"])
def test_the_mask_is_that_of_extract_masks(granularity):
    wholes = (f"snip_granularity={granularity}", "snip_block=32")
    trainer, last = train(*SNIP, "save_snip_mask_path=s/mask.pt", "seed=4", *wholes)
    mask = Mask.load("s/mask.pt")
    extract_masks.main(
        f"--base {MODEL} --name m --sparsities 0.9 --score snip --datasets mini --score_batches 3 --seed 4 "
        f"--out masks --granularity {granularity} --block 32".split()
    )
    extracted = Mask.load("masks/m/0.9_mask.pt")
    short = kept_count(0.9, mask.n_total) - mask.n_kept
    assert trainer.optimizer.n_trained == mask.n_kept and short == extracted.meta["shortfall"] < 32 * 32
    assert mask.meta["granularity"] == granularity and (short == 0 or granularity == "block")
    assert mask.fingerprint() == extracted.fingerprint()
    assert all(mask.meta[key] == extracted.meta[key] for key in ("data", "base_hash"))
    # and the run is that of this mask, bit for bit
    _, other = train("mask_path=s/mask.pt", "seed=4", "n_epochs=1", "exp_name=by_file")
    assert same(policy(last), policy(other))


@pytest.mark.slow
def test_reused_by_an_equal_run_and_set_aside_by_another(told, tmp_path, monkeypatch):
    path = tmp_path / "mask.pt"
    _, first = train(*SNIP, f"save_snip_mask_path={path}")
    before = path.read_bytes()
    with monkeypatch.context() as patch:  # a second run computes nothing
        patch.setattr("lota.train.snip.collect", None)
        again = (*SNIP, f"save_snip_mask_path={path}", "exp_name=again", "lr=1e-3", "eval_batch_size=4")
        _, second = train(*again)
    assert f"reusing the mask {path}" in told.text and path.read_bytes() == before
    assert same(policy(first), policy(second))
    told.clear()
    train(*SNIP, f"save_snip_mask_path={path}", "exp_name=half", "snip_sparsity=0.5")
    assert "not reused: made with another sparsity" in told.text and "now mask.1.pt" in told.text
    assert (tmp_path / "mask.1.pt").read_bytes() == before
    assert Mask.load(path).meta["sparsity"] == 0.5
    told.clear()
    train(*SNIP, f"save_snip_mask_path={path}", "exp_name=other", "snip_sparsity=0.5", "seed=1")
    assert "made with another data.data_hash" in told.text


@pytest.mark.slow
def test_without_a_path_the_run_keeps_it(private_cache):
    train(*SNIP)
    path = private_cache / "run" / "snip_mask.pt"
    assert Mask.load(path).meta["score"] == "snip"
    train(*SNIP, "exp_name=quick", "debug=true")
    assert not list((private_cache / "quick").rglob("*.pt"))


@pytest.mark.slow
def test_data_protection_and_accumulation():
    protect = write_mask(Path("first.pt"), 0.2)
    protected = (*SNIP, "protect_masks=[first.pt]")
    trainer, _ = train(*protected, "save_snip_mask_path=a.pt")
    mask = Mask.load("a.pt")
    assert mask.overlap(protect) == 0 and mask.n_kept == kept_count(0.9, mask.n_total)
    assert trainer.optimizer.n_trained == mask.n_kept
    half, _ = train(
        *protected, "save_snip_mask_path=b.pt", "exp_name=parts", "gradient_accumulation_steps=2",
        "freeze_odd_layers=true", "activation_checkpointing=true",
    )  # fmt: skip
    parts = Mask.load("b.pt")
    assert parts.meta["data"]["data_hash"] == mask.meta["data"]["data_hash"]
    assert parts.overlap(mask) > 0.999 * mask.n_kept  # sums in another order
    layers = {n: t.layer for n, t in find_scope(meta_model(MODEL)).items()}
    assert half.optimizer.n_trained == sum(parts.kept(n) for n, layer in layers.items() if layer % 2 == 0)


@pytest.mark.slow
def test_bf16_weights():
    trainer, _ = train(*SNIP, "model.fsdp_policy_mp=bfloat16", "save_snip_mask_path=a.pt")
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    assert Mask.load("a.pt").meta["data"]["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupted_run_continues_bit_for_bit(lost):
    options = (*SNIP, "batch_size=4", "save_snip_mask_path=m.pt")
    _, whole = train(*options, "exp_name=whole")
    with stopped_after(5, signal.SIGTERM):
        train(*options, "exp_name=cut")
    if lost:
        Path("m.pt").unlink()  # it is computed again, and is the same
    _, continued = train(*options, "exp_name=cut")
    assert same(policy(whole), policy(continued))
    if lost:  # a run does not continue under another mask
        with pytest.raises(ValueError, match="snip_sparsity"):
            train(*options, "exp_name=cut", "snip_sparsity=0.8")


@pytest.mark.slow
def test_a_preference_run_takes_its_own_loss():
    """At the start policy and reference agree: the gradient of DPO is -b / 2 times that of the log-ratio."""
    how = ("loss=dpo", "datasets=[pairs]", "snip_sparsity=0.5", "save_snip_mask_path=m.pt", "n_examples=8")
    trainer, _ = train(*SNIP, *how)
    mask, model, tokenizer, task = Mask.load("m.pt"), base(), trainer.data.tokenizer, get_task("pairs")
    assert mask.meta["data"]["loss"]["name"] == "dpo" and trainer.optimizer.n_trained == mask.n_kept
    rows = [task.preference(row) for row in task.load("train", None)]
    total = torch.zeros(())
    for row in (rows[i] for numbers in epoch_batches(len(rows), 8, seed=0, epoch=0)[:3] for i in numbers):
        chosen, rejected = (logp(model, tokenizer, row.prompt, text) for text in (row.chosen, row.rejected))
        total = total + chosen - rejected
    total.backward()
    weights = {n: p for n, p in model.named_parameters() if n in mask.names}
    scores = {n: (p.grad * p.detach()).abs() for n, p in weights.items()}
    expected = sorted_masks(scores, mask.n_kept)
    differ = sum((mask.dense(n) != flags).sum().item() for n, flags in expected.items())
    assert differ < 1e-3 * mask.n_kept


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("mask_path=some.pt",), "snip=true with mask_path=some.pt: snip computes the mask itself"),
        (("flip_mask=true",), "flip_mask=true with snip=true: store the mask"),
        (("snip_sparsity=1.0",), "snip_sparsity=1.0: must be at least 0 and below 1"),
        (("snip_batches=0",), "snip_batches=0: must be at least 1"),
        (("adapter=lora",), "snip=True with adapter=lora"),
        (("loss=dpo", "model.reference_archive=x"), "snip=true with model.reference_archive=x"),
    ],
)
def test_contradictions(overrides, message):
    with pytest.raises(ValueError) as refused:
        settings("snip=true", *overrides)
    assert message in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, message",
    [
        (("protect_masks=[dense.pt]",), "protected masks leave .* free"),
        (("save_snip_mask_path=dense.pt",), "dense.pt holds a mask that snip=true did not make"),
        (
            ("model.pad_token='<PAD>'", "model.scope=embed_tokens"),
            "pad_token=<PAD>: model.embed_tokens.weight grows",
        ),
        (("save_snip_mask_path=broken.pt",), "broken.pt cannot be read"),
    ],
)
def test_refused_before_a_model_loads(no_model, overrides, message):
    write_mask(Path("dense.pt"), 0.95)
    Path("broken.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=message):
        train(*SNIP, *overrides)
