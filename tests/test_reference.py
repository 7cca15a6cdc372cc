"""The reference of a preference loss: swapped entries come back, three ways give the same, what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from chars import save_pair
from runs import MODEL, base, policy, same, settings, train
from tolerance import assert_same, assert_same_training, chain
from written_out import logp

import lota
from lota.models.loading import load_model
from lota.train.interrupt import Interrupted, StopBetweenSteps
from lota.train.reference import starting_values, swapped
from trainers import TRAINERS

DPO = ("loss=dpo", "datasets=[pairs]", "do_first_eval=true")


pytestmark = pytest.mark.usefixtures("mask")
MASKED = (*DPO, "mask_path=0.9_mask.pt")


def trained(architecture: str, dtype: torch.dtype, masked: bool = True):
    """(model, optimizer, its starting values, the weights at its start) after three steps."""
    model = tiny.make(architecture, dtype=dtype)
    optimizer = lota.MaskedRMSprop(model, tiny.random_mask(model) if masked else None, lr=1e-2)
    lota.fuse_in_backward(optimizer)
    starts = starting_values(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for ids in tiny.batches(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model, optimizer, starts, before


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("architecture", "masked"),
    [("llama", True), ("gpt2", True), ("qwen2", True), ("mixtral", True), ("llama", False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_inside_and_the_very_bits_afterwards(architecture, masked, dtype):
    model, optimizer, starts, before = trained(architecture, dtype, masked)
    now = bits(model)
    masters = {p: state["master"].clone() for p, state in optimizer.state.items() if "master" in state}
    assert not same(now, before)
    with swapped(optimizer, starts):
        assert same(bits(model), before)
    assert same(bits(model), now)
    assert all(torch.equal(optimizer.state[p]["master"], master) for p, master in masters.items())
    assert sum(values.numel() for values in starts.values()) == optimizer.n_trained


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("written", [0, 1, 4, None])
def test_bits_come_back_when_something_falls_in_between(monkeypatch, error, written):
    """In the midst of the swapping, right before or after a tensor is written, or in the forward pass."""
    model, optimizer, starts, _ = trained("llama", torch.float32)
    now, write, calls = bits(model), optimizer.write, []

    def failing(p, values):
        calls.append(p)
        if written is not None and len(calls) == written + 1:
            write(p, values)
            raise error
        write(p, values)

    monkeypatch.setattr(optimizer, "write", failing)
    with pytest.raises(error), swapped(optimizer, starts):
        raise error
    assert same(bits(model), now)


@pytest.mark.parametrize("precision", ["null", "bfloat16"])
@pytest.mark.parametrize("pad_token", ["null", '"<PAD>"'])
@pytest.mark.parametrize("from_archive", [False, True])
def test_a_continued_run_reads_the_same_start_from_the_base(precision, pad_token, from_archive):
    """All layers but the odd ones train, embeddings too, whose added row the base does not have."""
    how = [f"model.fsdp_policy_mp={precision}", f"model.pad_token={pad_token}", "freeze_odd_layers=true"]
    if from_archive:
        _, folder = train("exp_name=first", "n_examples=8")
        how.append(f"model.archive={folder}/policy.pt")
    trainer = TRAINERS["BasicTrainer"](settings(*DPO, *how))
    trainer.load()
    now = trainer.objective.reference.set_back.args[1]
    again = starting_values(trainer.optimizer, trainer.base())
    assert now.keys() == again.keys()
    assert all(torch.equal(now[p], again[p]) and now[p].dtype == again[p].dtype for p in now)


def loss_of_held_out(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """(reference's, policy's) log-probabilities of all held-out rows."""
    batch = trainer.objective.batch(trainer.data.held_out)
    with torch.no_grad():
        return trainer.objective.reference(batch), trainer.objective.logps(batch)[0]


def by_hand(trainer, model) -> torch.Tensor:
    """The same row by row, without padding: all chosen responses, then all rejected ones."""
    examples, tokenizer = trainer.data.held_out, trainer.data.tokenizer
    pairs = [(e.prompt.text, e.response) for e in examples] + [(e.prompt.text, e.rejected) for e in examples]
    with torch.no_grad():
        return torch.stack([logp(model, tokenizer, *pair) for pair in pairs])


@pytest.mark.slow
def test_three_ways_give_the_same():
    found = {}
    for kind in ("swap", "model", "precomputed", "null"):
        trainer, folder = train(
            *MASKED, "lr=1e-2", "eps=1.0", f"model.reference={kind}", f"exp_name=r_{kind}"
        )
        found[kind] = (*loss_of_held_out(trainer), policy(folder))
    start, terms = by_hand(trainer, base()), chain(base(), tokens=400)
    for of_reference, of_policy, _ in found.values():
        assert_same(of_reference, start, terms=terms)
        assert (of_policy - of_reference).abs().max() > 0.1
    first, weights = base().state_dict(), {kind: trained for kind, (_, _, trained) in found.items()}
    for kind in ("model", "null", "precomputed"):
        assert_same_training(weights[kind], weights["swap"], first, terms=terms, steps=5)


@pytest.mark.slow
def test_lora_is_left_out_for_the_reference():
    trainer, _ = train(*DPO, "adapter=lora", "lr=1e-2")
    of_reference, of_policy = loss_of_held_out(trainer)
    assert_same(of_reference, by_hand(trainer, base()), terms=chain(base()))
    assert (of_policy - of_reference).abs().max() > 1


def stored(trainer) -> list[Path]:
    return sorted((trainer.config.cache_dir / "reference_logps").glob("*.pt"))


@pytest.mark.slow
def test_stored_values_are_read_back_under_the_same_key_only(caplog):
    caplog.set_level("INFO")
    options = (*MASKED, "model.reference=precomputed")
    first, _ = train(*options, "exp_name=first")
    assert "40 training pairs stored" in caplog.text and "12 held-out pairs stored" in caplog.text
    files = stored(first)
    assert len(files) == 2
    caplog.clear()
    train(*options, "exp_name=second", "lr=1e-4", "n_eval_examples=5")  # of a new held-out sample anew
    assert "40 of 40 training pairs read from" in caplog.text and "5 held-out pairs stored" in caplog.text
    _, archive = train("exp_name=other", "n_examples=8", "loss=sft")
    changes = [
        "max_length=20 max_prompt_length=8",
        "seed=1 data_fraction=0.5",
        "model.fsdp_policy_mp=bfloat16",
    ]
    for change in (*changes, f"model.archive={archive}/policy.pt"):
        caplog.clear()
        train(*options, "exp_name=third", "overwrite=true", "do_first_eval=false", *change.split())
        assert "training pairs stored" in caplog.text, change
        assert "read from" not in caplog.text.replace("rows from", ""), change


def tamper(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["key"]["model"] = "another"
    torch.save(content, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def lose(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "logps": content["logps"][:-1]}, path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [tamper, cut, lose])
def test_what_does_not_fit_is_set_aside(caplog, damage):
    options = (*DPO, "model.reference=precomputed", "n_examples=8", "do_first_eval=false")
    trainer, folder = train(*options, "exp_name=first")
    (path,) = stored(trainer)
    whole = torch.load(path, weights_only=True)["logps"]
    damage(path)
    again, second = train(*options, "exp_name=second")
    assert "is not reused" in caplog.text
    assert sorted(stored(again)) == [path.with_name(f"{path.stem}.1.pt"), path]
    assert torch.equal(torch.load(path, weights_only=True)["logps"], whole)
    assert same(policy(folder), policy(second))


def test_only_pairs_that_the_run_sees_are_computed(caplog):
    caplog.set_level("INFO")
    train(*DPO, "model.reference=precomputed", "n_examples=16", "fast_forward=1")
    assert "16 training pairs stored" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "precomputed", "null"])
def test_a_reference_that_is_given(kind):
    _, archive = train("exp_name=sft", "loss=sft", "n_epochs=2")
    given = (f"model.reference_archive={archive}/policy.pt", "model.reference_dtype=float32")
    trainer, _ = train(*MASKED, f"model.reference={kind}", *given)
    reference = load_model(MODEL, archive=archive / "policy.pt")
    assert_same(loss_of_held_out(trainer)[0], by_hand(trainer, reference), terms=chain(reference))


def test_a_reference_of_another_vocabulary_is_refused_before_loading(workplace, no_model):
    save_pair(workplace / "chars")
    with pytest.raises(ValueError, match=r"reference_archive=.*chars has another vocabulary"):
        train(*DPO, "max_length=256", "model.reference_archive=chars", "max_prompt_length=128")
    (workplace / "chars" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"another vocabulary \(99 rows\)"):
        train(*DPO, "max_length=256", "model.reference_archive=chars", "max_prompt_length=128")
    with pytest.raises(ValueError, match=r"model.reference_archive=/nowhere does not exist"):
        train(*DPO, "model.reference_archive=/nowhere")


def test_a_reference_with_the_same_tokenizer_is_taken():
    trainer, _ = train(*DPO, f"model.reference_archive={MODEL}", 'model.pad_token="<PAD>"', "n_examples=8")
    assert loss_of_held_out(trainer)[0].isfinite().all()


def test_no_reference_is_loaded_without_one(monkeypatch):
    monkeypatch.setattr("lota.train.objectives.make_reference", None)
    trainer, _ = train(*DPO, "loss.reference_free=true")
    assert trainer.objective.reference is None


def test_the_reference_has_no_graph():
    trainer, _ = train(*MASKED, "n_examples=8")
    batch = trainer.objective.batch(trainer.data.held_out)
    assert not trainer.objective.reference(batch).requires_grad
    assert trainer.objective.logps(batch)[0].requires_grad


@pytest.mark.slow
def test_a_second_model_has_the_dtype_of_the_policy_or_its_own(caplog):
    caplog.set_level("INFO")
    short = ("n_examples=8", "overwrite=true", "do_first_eval=false")
    for how, dtype in (
        ("", "float32"),
        ("model.fsdp_policy_mp=bfloat16", "bfloat16"),
        ("model.reference_dtype=float16", "float16"),
    ):
        trainer, _ = train(*MASKED, "model.reference=model", *short, *how.split())
        assert str(trainer.objective.reference.model.dtype) == f"torch.{dtype}"
    assert "not used here" not in caplog.text
    train(*MASKED, *short, "model.reference_dtype=float16")
    assert "not used here: model.reference_dtype=float16" in caplog.text


@pytest.mark.slow
def test_a_run_that_is_stopped_while_computing_goes_on_from_there(monkeypatch, caplog):
    caplog.set_level("INFO")
    options = (*DPO, "model.reference=precomputed", "eval_batch_size=5", "n_examples=16")
    calls = []

    def asked_to_stop(self):
        calls.append(self)
        if len(calls) == 2:
            raise Interrupted(2)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StopBetweenSteps, "check", asked_to_stop)
        train(*options, "exp_name=stopped")
    _, folder = train(*options, "exp_name=stopped")
    assert "10 of 16 training pairs read from" in caplog.text
    assert "6 training pairs stored" in caplog.text
    again, whole = train(*options, "exp_name=whole")
    assert "16 of 16 training pairs read from" in caplog.text
    assert same(policy(folder), policy(whole))
    assert len(stored(again)) == 2
