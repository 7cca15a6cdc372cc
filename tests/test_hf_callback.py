"""FusedCallback: what it refuses; and what really reaches a fused step in Hugging Face's Trainer."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

import lota
from tests.runs import same
from tests.tiny import make
from tests.tolerance import assert_same_training, chain


def trainer_for(model, optimizer, folder, callbacks=(), collate=None, **settings):
    """A trainer over ten sequences of different length; the labels of the first tokens are left out."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for n in (5, 9, 12, 7, 11, 6, 10, 8, 12, 5):
        ids = torch.randint(3, 60, (n,), generator=generator).tolist()
        data.append({"input_ids": ids, "labels": [-100] * (n // 3) + ids[n // 3 :]})
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "num_train_epochs": 1,
        "max_grad_norm": 0,
    }
    return Trainer(
        model,
        args=TrainingArguments(**defaults | settings),
        train_dataset=data,
        data_collator=collate or padded,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    blanks = [width - len(row["input_ids"]) for row in rows]
    lists = {
        "input_ids": [row["input_ids"] + [0] * n for row, n in zip(rows, blanks, strict=True)],
        "labels": [row["labels"] + [-100] * n for row, n in zip(rows, blanks, strict=True)],
        "attention_mask": [[1] * (width - n) + [0] * n for n in blanks],
    }
    return {name: torch.tensor(value) for name, value in lists.items()}


def masked(fused: int | None = None, rule=lota.MaskedRMSprop, dtype=torch.float32, **settings):
    """(model, mask, optimizer); fused: after how many backward passes it updates."""
    model = tiny.make("llama", dtype=dtype)
    mask = tiny.random_mask(model)
    optimizer = rule(model, mask, **{"lr": 1e-2, **settings})
    if fused is not None:
        lota.fuse_in_backward(optimizer, gradient_accumulation_steps=fused)
    return model, mask, optimizer


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0: set it to 0 .* grad_norm_strategy"),
        ({"gradient_accumulation_steps": 4}, r"=4, but the optimizer updates after 2 backward .*_steps=4\)"),
        (
            {"max_grad_norm": 0.5, "gradient_accumulation_steps": 1},
            r"(?s)max_grad_norm=0\.5.*gradient_accumulation_steps=1, but",
        ),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "activation_checkpointing_kwargs: set",
        ),
    ],
)
def test_refused_when_the_trainer_is_made(tmp_path, settings, words):
    model, _, optimizer = masked(fused=2)
    given = {"gradient_accumulation_steps": 2, **settings}
    with pytest.raises(ValueError, match=words):
        trainer_for(model, optimizer, tmp_path, [lota.FusedCallback()], **given)


def test_refused_before_the_first_step(tmp_path):
    """A callback that is added later, an optimizer that was forgotten, and settings changed on the way."""
    model, _, optimizer = masked(fused=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_for(model, optimizer, tmp_path, max_grad_norm=1.0)
    trainer.add_callback(lota.FusedCallback())
    with pytest.raises(ValueError, match="max_grad_norm=1"):
        trainer.train()
    trainer = trainer_for(model, None, tmp_path, [lota.FusedCallback()])
    with pytest.raises(ValueError, match="the trainer's optimizer is AdamW, which trains whole tensors"):
        trainer.train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_nothing_is_refused_without_need(tmp_path):
    model, _, optimizer = masked()  # deferred: the trainer clips and accumulates itself
    settings = {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2}
    trainer_for(model, optimizer, tmp_path, [lota.FusedCallback()], **settings).train()
    model, _, optimizer = masked(fused=2, grad_norm_strategy="global", max_grad_norm=1.0)
    trainer_for(model, optimizer, tmp_path, [lota.FusedCallback()], gradient_accumulation_steps=2).train()
    assert 0 < optimizer.grad_norm < float("inf")
    assert optimizer.gradient_accumulation_steps == 2


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_sees_the_mean_over_all_its_tokens(tmp_path, accumulation, fused):
    """Against torch.optim.SGD on masked dense gradients of one big batch per step; RMSprop would not notice a
    wrong factor.

    The trainer divides the loss of each part by the number of labels in all parts, and five batches in steps
    of two or three leave a last step with fewer parts.
    """
    model, mask, optimizer = masked(accumulation if fused else None, lota.MaskedSGD, lr=0.5)
    seen = []

    def collate(rows):
        seen.append(rows)
        return padded(rows)

    settings = {"gradient_accumulation_steps": accumulation, "collate": collate}
    trainer_for(model, optimizer, tmp_path, [lota.FusedCallback()], **settings).train()
    assert len(seen) == 5

    expected = tiny.make("llama")
    parameters = {name: p for name, p in expected.named_parameters() if mask.kept(name)}
    reference = torch.optim.SGD(parameters.values(), lr=0.5)
    for start in range(0, 5, accumulation):
        batch = padded([row for rows in seen[start : start + accumulation] for row in rows])
        scores = expected(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels.flatten()).backward()
        for name, p in parameters.items():
            p.grad *= mask.dense(name)
        reference.step()
        expected.zero_grad()
    got, want, first = (dict(m.named_parameters()) for m in (model, expected, make("llama")))
    assert_same_training(got, want, first, terms=chain(model, tokens=100), steps=5)


@pytest.mark.parametrize("fused", [None, 1])
def test_bf16_weights_resume_exactly(tmp_path, fused):
    """torch's own load_state_dict would turn position 257 into 256, and fp32 masters into bf16."""

    def train(resume: bool):
        model, _, optimizer = masked(fused, dtype=torch.bfloat16, lr=1e-3)
        settings = {"save_strategy": "steps", "save_steps": 2}
        trainer = trainer_for(model, optimizer, tmp_path, [lota.FusedCallback()], **settings)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict(), optimizer.state_dict()

    weights, state = train(resume=False)
    for name in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    again, state_again = train(resume=True)
    assert same(again, weights)
    assert tiny.same_state(state, state_again)
    entries = state["state"].values()
    assert all(
        e["master"].dtype == e["square_avg"].dtype == torch.float32 and e["step"] == 5 for e in entries
    )
    assert max(int(e["positions"].max()) for e in entries if "positions" in e) > 257
