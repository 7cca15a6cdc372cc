"""Training on preference pairs: against a loop written out, under every setting, continued, on real pairs."""

from __future__ import annotations

import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from runs import (
    MODEL,
    assert_frozen,
    base,
    metrics,
    policy,
    same,
    settings,
    stopped_after,
    train,
    write_mask,
)  # fmt: skip
from tolerance import assert_same_training, chain
from transformers import AutoModelForCausalLM, AutoTokenizer
from written_out import logp, train_plainly

import convert_policy_to_hf_resize
from lota.data.batches import Example, Prompt, encode_rows
from lota.masks import Mask
from lota.train.cli import closing_words
from scripts import score_runs
from tasks import get_task

pytestmark = pytest.mark.usefixtures("workplace")
DPO = ("loss=dpo", "datasets=[pairs]")
MASKED = (*DPO, "mask_path=0.9_mask.pt")


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_weights_equal_a_plain_loop_with_two_models(mask, accumulation):
    how = ("n_examples=24", "loss.beta=0.2", "eps=1.0", f"gradient_accumulation_steps={accumulation}")
    trainer, folder = train(*MASKED, *how)
    model, reference, tokenizer, task = base(), base(), trainer.data.tokenizer, get_task("pairs")

    def loss_of(preference):
        ratios = []
        for response in (preference.chosen, preference.rejected):
            with torch.no_grad():
                of_reference = logp(reference, tokenizer, preference.prompt, response)
            ratios.append(logp(model, tokenizer, preference.prompt, response) - of_reference)
        return torch.log1p(torch.exp(-0.2 * (ratios[0] - ratios[1])))

    train_plainly(
        {name: p for name, p in model.named_parameters() if name in mask},
        loss_of,
        [task.preference(row) for row in task.load("train", None)],
        [5e-4, 1e-3, 1e-3],
        mask,
    )
    got, start, terms = policy(folder), reference.state_dict(), chain(model, tokens=400)
    assert_same_training(got, model.state_dict(), start, terms=terms, steps=3)
    assert_frozen(mask, got, start)


KEYS = {
    f"{group}_{split}/{name}"
    for group, names in {
        "rewards": ("chosen", "rejected", "margins", "accuracies"),
        "logps": ("chosen", "rejected"),
        "logps_ref": ("chosen", "rejected"),
    }.items()
    for name in names
    for split in ("train", "eval")
}


@pytest.mark.slow
def test_metrics(mask):
    """The keys, and their values at the start: by hand, on held-out pairs."""
    trainer, _ = train(*MASKED, "do_first_eval=true", "loss.beta=0.5")
    lines = metrics(trainer)
    found = {key for line in lines for key in line}
    assert {key for key in found if key.startswith(("rewards", "logps"))} == KEYS
    assert {"loss/train", "loss/eval", "grad_norm", "lr"} <= found
    assert not {key for key in found if "nats" in key or key == "ppl"}
    first, last = lines[0], lines[-1]
    assert first["loss/eval"] == pytest.approx(math.log(2))
    assert [first[f"rewards_eval/{name}"] for name in ("chosen", "rejected", "margins")] == [0.0, 0.0, 0.0]
    model, tokenizer, task = base(), trainer.data.tokenizer, get_task("pairs")
    pairs = [task.preference(row) for row in task.load("test", None)]
    with torch.no_grad():
        for which in ("chosen", "rejected"):
            mean = sum(logp(model, tokenizer, p.prompt, getattr(p, which)).item() for p in pairs) / len(pairs)
            assert first[f"logps_eval/{which}"] == pytest.approx(mean, rel=1e-4)
            assert last[f"logps_ref_eval/{which}"] == pytest.approx(mean, rel=1e-4)
    ratios = {w: last[f"logps_eval/{w}"] - last[f"logps_ref_eval/{w}"] for w in ("chosen", "rejected")}
    assert last["rewards_eval/chosen"] == pytest.approx(0.5 * ratios["chosen"], rel=1e-3)
    assert last["rewards_eval/margins"] == pytest.approx(
        0.5 * (ratios["chosen"] - ratios["rejected"]), rel=1e-3
    )
    assert last["rewards_eval/accuracies"] > 0.8 > last["loss/eval"]


@pytest.mark.slow
def test_reference_free_logs_no_reference(mask):
    trainer, _ = train(*MASKED, "loss.reference_free=true", "do_first_eval=true")
    found = {key for line in metrics(trainer) for key in line}
    assert {key for key in found if key.startswith(("rewards", "logps"))} == {
        k for k in KEYS if "_ref_" not in k
    }


SETTINGS = [
    "grad_norm_strategy=even",
    "grad_norm_strategy=proportional",
    "grad_norm_strategy=global gradient_accumulation_steps=2",
    "grad_norm_strategy=none optimizer=AdamW",
    "model.fsdp_policy_mp=bfloat16",
    "model.fsdp_policy_mp=bfloat16 activation_checkpointing=true gradient_accumulation_steps=4",
    "activation_checkpointing=true",
    "group_by_length=true",
    "loss.ipo=true",
    "loss.ipo=true loss.ipo_sum=true loss.beta=0.01",
    "loss.robust_eps=0.1",
    "loss.sft_reg=0.1",
    "loss.importance_correction=true",
    "loss.reference_free=true",
    "model.reference=precomputed",
]


def margins(trainer) -> list[float]:
    """On held-out preferences, at every evaluation."""
    return [line["rewards_eval/margins"] for line in metrics(trainer) if "rewards_eval/margins" in line]


@pytest.mark.slow
@pytest.mark.parametrize("how", SETTINGS)
def test_margins_grow_and_frozen_entries_stay(mask, how):
    trainer, folder = train(*MASKED, "do_first_eval=true", "lr=3e-4", *how.split())
    first, *_, last = margins(trainer)
    assert last > first + 0.01
    assert assert_frozen(mask, policy(folder), base().state_dict()) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["null", "swap", "precomputed"])
@pytest.mark.parametrize("precision", ["null", "bfloat16"])
def test_dense_training(reference, precision):
    how = (f"model.reference={reference}", f"model.fsdp_policy_mp={precision}", "lr=1e-4")
    trainer, _ = train(*DPO, *how, "do_first_eval=true")
    first, *_, last = margins(trainer)
    assert last > first + 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "model.reference=swap model.fsdp_policy_mp=bfloat16",
        "model.reference=swap optimizer=AdamW gradient_accumulation_steps=2 grad_norm_strategy=global",
        "model.reference=model",
        "model.reference=precomputed",
        "model.reference=precomputed lost",
        "adapter=lora",
        "dense",
    ],
)
def test_a_continued_run_ends_with_the_same_bits(mask, how):
    """Stopped in the middle of an epoch; its reference is that of its start, not of where it was stopped."""
    words = how.split()
    kind = DPO if words[0] in ("dense", "adapter=lora") else MASKED
    options = [*kind, "n_epochs=2", "n_examples=48", "lr=3e-4", *(word for word in words if "=" in word)]
    with stopped_after(4):
        train("exp_name=stopped", *options)
    if words[-1] == "lost":  # computed again, from the starting values in the base
        shutil.rmtree(settings(*options).cache_dir / "reference_logps")
    trainer, folder = train("exp_name=stopped", *options)
    whole, reference = train("exp_name=whole", *options)
    assert same(policy(folder), policy(reference))
    assert metrics(trainer)[-1]["rewards_train/margins"] == metrics(whole)[-1]["rewards_train/margins"]


@pytest.mark.slow
def test_a_snip_mask_of_the_preference_loss():
    """Before training the policy is its own reference: its gradients are those of the loss at ln 2."""
    how = ("snip=true", "snip_sparsity=0.9", "save_snip_mask_path=snip_mask.pt", "lr=3e-4")
    trainer, _ = train(*DPO, *how, "do_first_eval=true")
    assert metrics(trainer)[0]["loss/eval"] == pytest.approx(math.log(2))
    assert margins(trainer)[-1] > 0.5
    assert Mask.load("snip_mask.pt").n_kept == trainer.optimizer.n_trained


def test_sft_on_the_preferred_answer():
    trainer, _ = train("datasets=[pairs]", "n_examples=8")
    task = get_task("pairs")
    rows = task.load("train", None)
    assert [example.response for example in trainer.data.train] == [task.target(row) for row in rows]
    assert {example.rejected for example in trainer.data.train} == {None}


@pytest.mark.parametrize(("max_length", "cut"), [(60, False), (20, True), (9, True)])
def test_both_responses_follow_the_same_prompt(max_length, cut):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = Prompt("a b c d e f g h ->", " ->")
    example = Example(prompt, " h g", rejected=" a b c d e f g h i j k l m n o p q r")
    chosen, rejected = encode_rows(tokenizer, example, max_length=max_length, max_prompt_length=6)
    prompt_ids = tokenizer(prompt.text).input_ids
    n = chosen.prompt_length
    assert chosen.prompt_length == rejected.prompt_length == (6 if cut else len(prompt_ids))
    assert chosen.input_ids[:n] == rejected.input_ids[:n]
    assert max(len(chosen), len(rejected)) <= max_length
    assert min(len(chosen), len(rejected)) > n
    assert tokenizer.decode(chosen.input_ids[:n]).endswith("->")


@pytest.mark.slow
def test_margins_grow_on_real_held_out_pairs(stories, shared):
    """stories260K on hh under a random mask: frozen entries are bit for bit the base's."""
    mask = write_mask(Path("0.9_mask.pt"), model=stories)
    trainer, folder = train(
        *MASKED, "datasets=[hh]", f"data_dir={shared}/data", f"model.name_or_path={stories}",
        "max_length=160", "max_prompt_length=64", "lr=3e-4", "n_examples=64", "n_eval_examples=20",
        "do_first_eval=true",
    )  # fmt: skip
    first, last = margins(trainer)
    assert last > first + 0.05
    assert_frozen(mask, policy(folder), base(model=stories).state_dict())


def test_the_next_command_converts_what_started_from_a_policy(mask):
    """Preference tuning starts where SFT ended: from weights that have no config beside them."""
    _, start = train("datasets=[mini]", "exp_name=sft", "n_examples=8")
    trainer, folder = train(*MASKED, f"model.archive={start}", "n_examples=8")
    command = closing_words(trainer, folder).partition("python convert_policy_to_hf_resize.py ")[2]
    convert_policy_to_hf_resize.main(shlex.split(command))
    assert (score_runs.base_of(folder.parent), score_runs.config_of(folder.parent)) == (
        str(start),
        str(MODEL),
    )
    assert same(AutoModelForCausalLM.from_pretrained(folder).state_dict(), policy(folder))
