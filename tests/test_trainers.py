"""The training loop: what it computes, what it writes, what it refuses."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from hf_models import save_policy
from runs import MODEL, assert_frozen, base, metrics, policy, same, settings, train, write_mask
from safetensors.torch import load_file, save_file
from tolerance import assert_same_training, chain
from written_out import logp, train_plainly

import lota
from lota.data.batches import epoch_batches
from lota.evaluate.decoding import Decoding
from lota.evaluate.generation import generate
from lota.masks import Mask
from lota.models.head_logps import HeadLogProbs
from lota.models.loading import load_tokenizer
from lota.optim.optimizers import learning_rate
from lota.train import objectives, run_model
from lota.train.preflight import prepare
from tasks import get_task

pytestmark = pytest.mark.usefixtures("workplace")
MASKED = "mask_path=0.9_mask.pt"


@pytest.mark.parametrize(
    ("accumulation", "scheduler"), [(1, "constant"), (4, "constant"), (1, "linear"), (1, "cosine")]
)
def test_weights_equal_a_plain_loop(mask, accumulation, scheduler):
    schedule = ("warmup_steps=2", f"lr_scheduler={scheduler}", f"gradient_accumulation_steps={accumulation}")
    trainer, folder = train(MASKED, "eps=1.0", *schedule)
    model, start, task = base(), base().state_dict(), get_task("mini")
    done = [max(0, step - 2) / 3 for step in range(5)]
    decay = {
        "constant": [1.0] * 5,
        "linear": [1 - d for d in done],
        "cosine": [(1 + math.cos(math.pi * d)) / 2 for d in done],
    }[scheduler]
    train_plainly(
        {name: p for name, p in model.named_parameters() if name in mask},
        lambda row: -logp(model, trainer.data.tokenizer, task.prompt(row), task.target(row)),
        task.load("train", None),
        [1e-3 * min(1.0, (step + 1) / 2) * decay[step] for step in range(5)],
        mask,
    )
    terms = chain(trainer.model, tokens=200)
    assert_same_training(policy(folder), model.state_dict(), start, terms=terms, steps=5)
    assert assert_frozen(mask, policy(folder), start) > 0.95
    assert trainer.optimizer.n_trained == mask.n_kept


@pytest.mark.parametrize("overrides", [(), (MASKED,), ("adapter=lora",)])
def test_a_run_that_has_ended_holds_no_model(mask, overrides):
    """A sequence of tasks trains one model after the other in one process."""
    trainer, _ = train(*overrides)
    model = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None


def test_dense_training_learns_and_reports():
    trainer, folder = train("n_epochs=6", "do_first_eval=true", "eval_every=80", "sample_during_eval=true",
                            "n_eval_model_samples=3")  # fmt: skip
    rows = metrics(trainer)
    steps = [row for row in rows if "loss/train" in row]
    assert [row["step"] for row in steps] == list(range(1, 31))
    assert {"examples", "step", "loss/train", "grad_norm", "lr", "tokens_per_second", "examples_per_second",
            "trained_entries", "peak_memory_bytes"} <= set(steps[0])  # fmt: skip
    evaluated = [row for row in rows if "loss/eval" in row]
    assert [row["examples"] for row in evaluated] == [0, 80, 160, 240]
    assert evaluated[-1]["loss/eval"] < 0.8 * evaluated[0]["loss/eval"]
    assert evaluated[0]["ppl"] == pytest.approx(math.exp(evaluated[0]["nats_per_token/eval"]))
    assert folder.name == "epoch-6"
    assert sorted(p.name for p in folder.iterdir()) == ["checksums.json", "policy.pt", "resume.pt"]
    record = torch.load(folder / "policy.pt", weights_only=True)
    assert record["step_idx"] == 30
    assert all(type(value) in (int, float) for value in record["metrics"].values())
    samples = (trainer.config.run_dir / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 4 * 3


def test_held_out_loss_is_the_models_own():
    """The first evaluation equals the mean summed loss, computed row by row without padding."""
    trainer, _ = train("do_first_eval=true", "lr=0")
    model, tokenizer, task = base(), trainer.data.tokenizer, get_task("mini")
    rows = task.load("test", None)
    with torch.no_grad():
        total = -sum(logp(model, tokenizer, task.prompt(row), task.target(row)).item() for row in rows)
    tokens = sum(len(tokenizer(task.target(row), add_special_tokens=False).input_ids) + 1 for row in rows)
    first = metrics(trainer)[0]
    assert first["loss/eval"] == pytest.approx(total / len(rows), rel=1e-4)
    assert first["nats_per_token/eval"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("how", ["weight_decay=0.1", f"{MASKED} model.fsdp_policy_mp=bfloat16"])
def test_learning_rate_zero_gives_back_the_base(mask, how):
    """Kept entries under bf16 too: their masters are the base's values, not those that bf16 rounded."""
    _, folder = train("lr=0", *how.split())
    assert same(policy(folder), base().state_dict())


def test_schedules():
    options = {"peak": 2.0, "warmup_steps": 4, "total_steps": 12}
    rates = {
        s: [learning_rate(i, scheduler=s, **options) for i in range(13)]
        for s in ("constant", "linear", "cosine")
    }
    for values in rates.values():
        assert values[:4] == [0.5, 1.0, 1.5, 2.0]
    assert set(rates["constant"][4:]) == {2.0}
    assert rates["linear"][4:] == pytest.approx([2.0 - i / 4 for i in range(9)])
    assert rates["cosine"][4:] == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(9)])


def test_fsdp_trainer_in_one_process_gives_the_same_weights(mask, monkeypatch):
    _, one = train(MASKED, "exp_name=basic")
    _, two = train(MASKED, "exp_name=fsdp", "trainer=FSDPTrainer", "fsdp_port=12355")
    assert same(policy(one), policy(two))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for trainer in ("FSDPTrainer", "BasicTrainer"):
        with pytest.raises(ValueError, match="WORLD_SIZE=2"):
            train(MASKED, f"trainer={trainer}", "exp_name=several")


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_bf16_under_a_mask_saves_the_base_exactly_and_kept_entries_in_fp32(mask, checkpointing):
    trainer, folder = train(MASKED, "model.fsdp_policy_mp=bfloat16", "lr=1e-4",
                            f"activation_checkpointing={checkpointing}", "weight_decay=0.1")  # fmt: skip
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    state = policy(folder)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert assert_frozen(mask, state, base().state_dict()) > 0.9
    kept = torch.cat([state[name][mask.dense(name)] for name in mask.names])
    assert (kept != kept.bfloat16().float()).float().mean() > 0.9


@pytest.fixture
def seen(monkeypatch):
    """What the trainer computes with: dtypes of the head's operands, lengths of the rows of each batch."""
    record = {"dtypes": [], "lengths": []}
    logps, gather = HeadLogProbs.apply, objectives.collate

    def watched_logps(hidden, weight, bias, targets, after, narrow, keep):
        record["dtypes"].append(narrow)
        return logps(hidden, weight, bias, targets, after, narrow, keep)

    def watched_collate(rows, pad_token_id):
        record["lengths"].append([len(row) for row in rows])
        return gather(rows, pad_token_id)

    monkeypatch.setattr(HeadLogProbs, "apply", watched_logps)
    monkeypatch.setattr(objectives, "collate", watched_collate)
    return record


def test_dense_mixed_precision_computes_in_bf16_over_fp32_weights(seen):
    trainer, folder = train("model.fsdp_policy_mp=bfloat16", "n_examples=16")
    assert set(seen["dtypes"]) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not same(policy(folder), base().state_dict())


@pytest.mark.slow
def test_lengths_fractions_and_groups_are_used(seen):
    train("max_length=12", "max_prompt_length=6", "exp_name=short")
    assert max(n for rows in seen["lengths"] for n in rows) == 12
    seen["lengths"].clear()
    half, _ = train("data_fraction=0.5", "exp_name=half")
    assert sum(len(rows) for rows in seen["lengths"]) == half.progress.examples == 20
    every = [get_task("mini").prompt(r) for r in get_task("mini").load("train", None)]
    assert [e.prompt.text for e in half.data.train] != every[:20]
    seen["lengths"].clear()
    train("group_by_length=true", "exp_name=grouped")
    spread = sum(max(rows) - min(rows) for rows in seen["lengths"])
    seen["lengths"].clear()
    train("exp_name=mixed")
    assert spread < sum(max(rows) - min(rows) for rows in seen["lengths"])


def test_average_log_prob_is_the_mean_over_tokens():
    trainer, _ = train("loss.average_log_prob=true", "lr=0", "n_examples=8")
    model, means = base(), []
    for number in epoch_batches(40, 8, seed=0, epoch=0)[0]:
        example = trainer.data.train[number]
        (row,) = trainer.objective.rows(example)
        total = logp(model, trainer.data.tokenizer, example.prompt.text, example.response).item()
        means.append(-total / (len(row) - row.prompt_length))
    assert metrics(trainer)[0]["loss/train"] == pytest.approx(sum(means) / 8, rel=1e-4)


def test_activation_checkpointing_runs_each_block_twice(monkeypatch):

    calls, load = [], run_model.load_model

    def watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        return model

    monkeypatch.setattr(run_model, "load_model", watched)
    train("exp_name=plain")
    assert len(calls) == 1 + 5  # the loaded model is asked what it does after its head
    calls.clear()
    train("exp_name=checkpointed", "activation_checkpointing=true")
    assert len(calls) == 1 + 10


def test_policy_dtype(mask):
    trainer, folder = train(MASKED, "model.policy_dtype=bfloat16")
    assert {value.dtype for value in policy(folder).values()} == {torch.bfloat16}
    masters = {name: values for name, _, values in trainer.optimizer.kept_values()}
    name = next(iter(masters))
    assert torch.equal(policy(folder)[name][mask.dense(name)], masters[name].bfloat16())


@pytest.mark.parametrize("state", ["bfloat16", "factored"])
def test_dense_calibration_in_a_quarter_of_the_bytes(state):
    """Weights in bf16 alone and two bytes, or next to none, of state; it learns what the fp32 run learns."""
    options = ("n_epochs=3", "eval_every=120", "lr=3e-4")
    usual, _ = train("exp_name=usual", *options)
    low = ("model.policy_dtype=bfloat16", "stochastic_rounding=true", f"optimizer_state={state}")
    trainer, folder = train(*low, *options)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in policy(folder).values()} == {torch.bfloat16}
    weights = trainer.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in policy(folder).items())
    stored = torch.load(folder / "resume.pt", weights_only=True)["optimizer"]["state"]
    held = sum(v.nbytes for entry in stored.values() for v in entry.values() if torch.is_tensor(v))
    assert held == trainer.optimizer.state_bytes()
    assert held == 2 * 795_776 if state == "bfloat16" else held < 0.1 * 795_776
    loss, wanted = trainer.metrics["loss/eval"], usual.metrics["loss/eval"]
    assert max(loss, wanted) < 1.2 * min(loss, wanted) < 0.4 * metrics(usual)[0]["loss/train"]
    assert trainer.optimizer.precision.seed == 0


def test_stochastic_rounding_under_a_mask(mask):
    """The seed of the run decides the lots."""
    options = (MASKED, "model.policy_dtype=bfloat16", "stochastic_rounding=true", "optimizer_state=bfloat16")
    trainer, folder = train(*options, "lr=1e-4", "exp_name=one")
    start = {name: value.bfloat16() for name, value in base().state_dict().items()}
    assert 0.2 < assert_frozen(mask, policy(folder), start) < 0.9
    assert trainer.optimizer.state_bytes() <= (4 + 2) * mask.n_kept
    _, again = train(*options, "lr=1e-4", "exp_name=again")
    assert same(policy(folder), policy(again))


@pytest.mark.slow
def test_what_flip_protect_and_layer_freezing_leave_trainable(mask):
    other, start = write_mask(Path("other.pt"), density=0.5, seed=1), base().state_dict()
    flipped, _ = train(MASKED, "flip_mask=true", "exp_name=flip", "n_examples=8")
    assert flipped.data.mask.n_kept == mask.n_total - mask.n_kept
    protected, folder = train(MASKED, "protect_masks=[other.pt]", "exp_name=protect")
    assert protected.data.mask.n_kept == mask.n_kept - mask.overlap(other)
    dense, all_else = train("protect_masks=[other.pt]", "exp_name=dense_protect")
    assert dense.optimizer.n_trained == sum(p.numel() for p in dense.model.parameters()) - other.n_kept
    for state in (policy(folder), policy(all_else)):
        assert all(torch.equal(state[n][other.dense(n)], start[n][other.dense(n)]) for n in other.names)
    _, folder = train("freeze_odd_layers=true", "exp_name=layers")
    state = policy(folder)
    for name in (name for name in start if ".layers." in name):
        odd = ".layers.1." in name or ".layers.3." in name
        assert torch.equal(state[name], start[name]) == odd, name


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("save_every=16 n_epochs=null n_examples=50", ["step-16", "step-32", "step-48", "step-50"]),
        ("save_every=epoch_2 n_epochs=3", ["epoch-2", "epoch-3"]),
    ],
)
def test_checkpoints_and_the_last_one(how, names):
    trainer, folder = train(*how.split())
    assert sorted(p.name for p in trainer.config.run_dir.glob("*-*")) == names
    assert folder.name == names[-1]
    assert metrics(trainer)[-1]["examples"] == {"step-50": 50, "epoch-3": 120}[names[-1]]


def test_fast_forward_skips_batches():
    train("exp_name=whole", "n_epochs=2")
    trainer, _ = train("exp_name=later", "n_epochs=2", "fast_forward=3")
    assert trainer.progress.examples == 80 - 24
    assert trainer.progress.step == 10 - 3


@pytest.mark.parametrize("every", [0, 100])
def test_a_diverging_run_stops_with_a_remedy_and_is_never_saved(every):
    """Also if no line of the log is due."""
    how = ("lr=1e38", "optimizer=SGD", "grad_norm_strategy=none", "warmup_steps=0", "save_every=8")
    with pytest.raises(ValueError, match=r"training loss is .*lower lr"):
        train(*how, f"minimum_log_interval_secs={every}")
    for folder in settings().run_dir.glob("step-*"):
        assert all(value.isfinite().all() for value in policy(folder).values())


def test_settings_of_a_task_reach_it(shared, caplog):
    chats = ("datasets=[sharegpt]", f"data_dir={shared}/data", "n_examples=8", "debug=true", "max_length=64",
             "max_prompt_length=32")  # fmt: skip
    one, _ = train(*chats)
    three, _ = train(*chats, "num_turns=3")
    assert max(e.prompt.text.count("Assistant:") for e in one.data.train) == 1
    assert max(e.prompt.text.count("Assistant:") for e in three.data.train) > 1
    file = shared / "data" / "sharegpt_data" / "human_preferences.json"
    pairs, _ = train(*chats, f"prefs_path={file}")
    assert len(pairs.data.train) == len(json.loads(file.read_text()))
    caplog.set_level("INFO")
    train("num_turns=3", "n_examples=8")
    assert "not used here: num_turns=3 (task mini)" in caplog.text


@pytest.mark.parametrize("kind", ["packed", "dense", "none"])
def test_a_grown_vocabulary_goes_with_every_kind_of_mask(mask, kind):
    name, start = "model.embed_tokens.weight", base().state_dict()
    if kind == "dense":
        shapes = {name: value.shape for name, value in start.items()}
        mask.save("0.9_mask.pt", format="dense", all_shapes=shapes)
    path = "mask_path=null" if kind == "none" else MASKED
    _, folder = train(path, "freeze_odd_layers=true", 'model.pad_token="<PAD>"', "n_examples=16")
    grown = policy(folder)[name]
    assert grown.shape[0] == start[name].shape[0] + 1
    assert torch.equal(grown[:-1], start[name]) == (kind != "none")
    _, second = train(path, f"model.archive={folder}/policy.pt", "freeze_even_layers=true",
                      "exp_name=second", "n_examples=8")  # fmt: skip
    assert policy(second)[name].shape == grown.shape


def test_an_archive_is_where_training_starts():
    _, first = train("exp_name=first")
    _, second = train("exp_name=second", f"model.archive={first}/policy.pt", "lr=0")
    assert same(policy(first), policy(second))


def test_samples_with_activation_checkpointing_are_those_of_the_saved_model():
    """Checkpointing switches the cache off in training; the samples are greedy completions all the same."""

    trainer, folder = train("sample_during_eval=true", "eval_every=40", "activation_checkpointing=true",
                            "max_length=40", "max_prompt_length=24")  # fmt: skip
    rows = [json.loads(r) for r in (trainer.config.run_dir / "samples.jsonl").read_text().splitlines()]
    model = base()
    model.load_state_dict(policy(folder))
    prompts = [row["prompt"] for row in rows]
    expected = generate(model, trainer.data.tokenizer, prompts, Decoding(16), batch_size=3)
    assert [row["completion"] for row in rows] == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["datasets=[minni]"], r"unknown task 'minni' \(nearest: mini"),
        (["datasets=[gsm8k]", "data_dir=/nowhere"], "gsm8k: no data for split 'train'"),
        (["datasets=[alpaca_eval]"], "alpaca_eval has no split 'train'"),
        (["mask_path=absent_mask.pt"], "absent_mask.pt does not exist"),
        ([MASKED, "optimizer_state=factored"], "optimizer_state=factored needs whole matrices, and "),
        (["mask_path=0.90_mask.pt"], "0.90_mask.pt does not exist"),
        (["model.name_or_path=/nowhere"], "/nowhere"),
        (["model.archive=/nowhere/policy.pt"], "model.archive=/nowhere/policy.pt"),
        (["model.block_name=GPT2Block"], "block_name=GPT2Block"),
        (["model.scope=nothing_is_called_so"], "matches no parameter"),
        (["model.tokenizer_name_or_path=/nowhere"], "no tokenizer at /nowhere"),
        (["fast_forward=1000"], "fast_forward=1000 skips the whole run"),
        (["datasets=[minni]", "model.archive=/nowhere"], r"unknown task(.|\n)*model.archive=/nowhere"),
        (["mask_path=tiny_mask.pt"], "does not belong to this model"),
        (["adapter=lora", "model.scope=norm"], "no linear layer in the scope"),
        (["save_delta=true", "model.policy_dtype=bfloat16"], r"cannot hold the torch\.float32 weights"),
        (["save_delta=true", 'model.pad_token="<PAD>"'], r"pad_token=<PAD> gives .* model\.pad_token=null"),
        (["loss=dpo"], r"task mini has none: name tasks that have, such as hh .*or choose loss=sft"),
        (["loss=dpo", "datasets=[pairs,mini]"], "task mini has none"),
        (["loss=dpo", "datasets=[sharegpt]"], "task sharegpt has none: give prefs_path=FILE"),
        ([MASKED, "protect_masks=[0.9_mask.pt]"], "nothing would train"),
        (["model.archive=policy.pt"], r"policy\.pt"),
        (
            ["model.name_or_path=gpt2", f"model.tokenizer_name_or_path={MODEL}"],
            "max_length=512: the model has 64 positions",
        ),
        (["max_length=513"], "max_length=513: the model has 512 positions; lower it"),
        (["adapter=lora", "lora_rank=100000"], r"lora_rank=100000: .* a rank above \d+; choose at most that"),
        (["model.name_or_path=damaged"], r"damaged/model\.safetensors is a Git LFS pointer"),
        (["model.name_or_path=small"], r"tokens more than the 9 embedding rows of small"),
        (["model.archive=small"], r"tokens more than the 9 embedding rows of .*small"),
        (["model.archive=delta.safetensors"], r"delta\.safetensors is a delta file, .* put it on its base"),
        (["model.archive=ints.pt"], r"ints\.pt is quantized \(.* is torch\.int32"),
    ],
)
def test_refused_before_a_model_loads(mask, no_model, overrides, message):
    tiny.random_mask(tiny.make("llama")).save("tiny_mask.pt")
    tiny.make("gpt2").save_pretrained("gpt2")
    Path("policy.pt").write_bytes(b"broken")
    shutil.copytree(MODEL, "damaged")
    Path("damaged/model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    small = base()
    small.resize_token_embeddings(9)
    small.save_pretrained("small")
    load_tokenizer(MODEL).save_pretrained("small")
    save_file({"x": torch.zeros(2)}, "delta.safetensors", metadata={"format": "lota-delta"})
    save_policy(Path("ints.pt"), {name: value.int() for name, value in base().state_dict().items()})
    with pytest.raises(ValueError, match=message):
        train(*overrides)
    assert not settings(*overrides).run_dir.exists()


def test_a_mask_of_another_base_is_refused(workplace, no_model):
    """Same names and shapes, other weights: the mask says which base it was extracted from."""
    changed = base()
    with torch.no_grad():
        changed.model.norm.weight += 1
    changed.save_pretrained("other")
    lota.extract(MODEL, sparsities=[0.9], score="magnitude")[0.9].save("own.pt")
    refused = rf"own\.pt: the mask was extracted from {MODEL} .* starts from .*other .*_of_other_base=true"
    with pytest.raises(ValueError, match=refused):
        train("mask_path=own.pt", "model.archive=other")
    assert not settings().run_dir.exists()
    Mask.load("own.pt").union(Mask.load("own.pt")).flip().save("flipped.pt")
    for taken in (
        ["mask_path=own.pt"],
        ["mask_path=own.pt", "model.archive=other", "mask_of_other_base=true"],
        ["mask_path=own.pt", "model.archive=other", "flip_mask=true"],
        ["mask_path=flipped.pt", "model.archive=other"],
        ["protect_masks=[own.pt]", "model.archive=other"],
    ):
        assert prepare(settings(*taken), get_task).mask is not None


def test_nan_in_the_base_is_told_before_the_first_step(workplace):
    shutil.copytree(MODEL, "nan")
    state = load_file("nan/model.safetensors")
    name = next(name for name in state if "down_proj" in name)
    state[name][0, 0] = math.nan
    save_file(state, "nan/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"nan/model\.safetensors: {name} holds NaN or infinity"):
        train("model.name_or_path=nan")
    assert not list(settings().run_dir.rglob("*"))


def test_zero_mask_that_does_not_exist_is_dense():
    trainer, _ = train("mask_path=masks/none/0.0_mask.pt", "n_examples=8")
    assert trainer.data.mask is None
