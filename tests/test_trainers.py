"""The training loop: what it computes, what it writes, what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from runs import MODEL, metrics, policy, same, settings, train, with_mini_task, write_mask
from tolerance import assert_same_training, chain
from transformers import AutoModelForCausalLM, AutoTokenizer

from lota.data.batches import Example, Prompt, encode, epoch_batches
from lota.models.scope import find_scope
from lota.optim.optimizers import learning_rate
from tasks import get_task


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(with_mini_task(tmp_path))
    return tmp_path


@pytest.fixture
def mask(tmp_path):
    return write_mask(tmp_path / "0.9_mask.pt")


def base() -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).state_dict()


def plain_run(
    mask, *, steps: int, batch_size: int, lr: float, warmup: int, scheduler: str = "constant"
) -> dict[str, torch.Tensor]:
    """The same training written out: torch.optim.RMSprop on masked gradients, sharing only the data."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    task = get_task("mini")
    rows = [Example(Prompt(task.prompt(r), task.closing), task.target(r)) for r in task.load("train", None)]
    kept = {name: mask.dense(name) for name in mask.names}
    trained = {name: p for name, p in model.named_parameters() if name in kept}
    optimizer = torch.optim.RMSprop(trained.values(), lr=lr, alpha=0.99, eps=1.0, foreach=False)
    for step, numbers in enumerate(epoch_batches(len(rows), batch_size, seed=0, epoch=0)[:steps]):
        encoded = [encode(tokenizer, rows[i], max_length=512, max_prompt_length=256) for i in numbers]
        total = 0.0
        for row in encoded:  # one by one: no padding, no attention mask
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_length - 1 : -1]
            targets = torch.tensor(row.input_ids[row.prompt_length :])
            total = total - torch.log_softmax(logits, -1).gather(1, targets[:, None]).sum()
        model.zero_grad()
        (total / len(encoded)).backward()
        for name, p in trained.items():
            p.grad *= kept[name]
            p.grad *= min(1.0, 10.0 / p.grad.norm().item())
        done = max(0, step - warmup) / (steps - warmup)
        decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[scheduler]
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup) * decay
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("accumulation", "scheduler"), [(1, "constant"), (4, "constant"), (1, "linear"), (1, "cosine")]
)
def test_weights_equal_a_plain_loop(mask, tmp_path, accumulation, scheduler):
    schedule = ("warmup_steps=2", f"lr_scheduler={scheduler}", f"gradient_accumulation_steps={accumulation}")
    # eps=1 is as large as the gradients are: under the default 1e-8, rounding of an entry whose gradient is
    # almost zero moves it by a whole step, either way
    trainer, folder = train(f"mask_path={tmp_path}/0.9_mask.pt", "eps=1.0", *schedule)
    expected = plain_run(mask, steps=5, batch_size=8, lr=1e-3, warmup=2, scheduler=scheduler)
    got, start = policy(folder), base()
    assert_same_training(got, expected, start, terms=chain(trainer.model, tokens=200), steps=5)
    for name, want in expected.items():
        frozen = ~mask.dense(name) if name in mask else torch.ones_like(want, dtype=torch.bool)
        assert torch.equal(got[name][frozen], start[name][frozen]), name
    moved = sum((got[n] != start[n])[mask.dense(n)].sum().item() for n in mask.names)
    assert moved > 0.95 * mask.n_kept
    assert trainer.optimizer.n_trained == mask.n_kept


def test_dense_training_learns_and_reports(workplace):
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
    assert sorted(p.name for p in folder.iterdir()) == ["policy.pt", "resume.pt"]
    record = torch.load(folder / "policy.pt", weights_only=True)
    assert record["step_idx"] == 30
    assert all(type(value) in (int, float) for value in record["metrics"].values())
    samples = (trainer.config.run_dir / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 4 * 3


def test_held_out_loss_is_the_models_own(workplace):
    """The first evaluation equals the mean summed loss, computed row by row without padding."""
    trainer, _ = train("do_first_eval=true", "lr=0")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    task, total, tokens = get_task("mini"), 0.0, 0
    rows = task.load("test", None)
    for row in rows:
        prompt = tokenizer(task.prompt(row)).input_ids
        response = [*tokenizer(task.target(row), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            total += model(input_ids=torch.tensor([prompt + response]), labels=labels).loss.item() * len(
                response
            )
        tokens += len(response)
    first = metrics(trainer)[0]
    assert first["loss/eval"] == pytest.approx(total / len(rows), rel=1e-4)
    assert first["nats_per_token/eval"] == pytest.approx(total / tokens, rel=1e-4)


def test_learning_rate_zero_changes_nothing(workplace):
    _, folder = train("lr=0", "weight_decay=0.1")
    assert same(policy(folder), base())


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


def test_fsdp_trainer_in_one_process_gives_the_same_weights(mask, tmp_path, monkeypatch):
    options = [f"mask_path={tmp_path}/0.9_mask.pt"]
    _, one = train(*options, "exp_name=basic")
    _, two = train(*options, "exp_name=fsdp", "trainer=FSDPTrainer", "fsdp_port=12355")
    assert same(policy(one), policy(two))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for trainer in ("FSDPTrainer", "BasicTrainer"):
        with pytest.raises(ValueError, match="WORLD_SIZE=2"):
            train(f"trainer={trainer}", "exp_name=several")


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_bf16_under_a_mask_saves_the_base_exactly_and_kept_entries_in_fp32(mask, tmp_path, checkpointing):
    trainer, folder = train(f"mask_path={tmp_path}/0.9_mask.pt", "model.fsdp_policy_mp=bfloat16", "lr=1e-4",
                            f"activation_checkpointing={checkpointing}", "weight_decay=0.1")  # fmt: skip
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    got, start = policy(folder), base()
    finer = 0
    for name, value in got.items():
        assert value.dtype == torch.float32
        kept = mask.dense(name) if name in mask else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(value[~kept], start[name][~kept]), name
        assert (value[kept] != start[name][kept]).float().mean() > 0.9 or not kept.any()
        finer += (value[kept] != value[kept].bfloat16().float()).sum().item()
    assert finer > 0.9 * mask.n_kept


@pytest.fixture
def seen(monkeypatch):
    """What the trainer computes with: dtypes of logits, lengths of the rows of each batch."""
    from lota.train import losses, objectives

    record = {"dtypes": [], "lengths": []}
    logps, gather = losses.sequence_logps, objectives.collate

    def watched_logps(logits, labels):
        record["dtypes"].append(logits.dtype)
        return logps(logits, labels)

    def watched_collate(rows, pad_token_id):
        record["lengths"].append([len(row) for row in rows])
        return gather(rows, pad_token_id)

    monkeypatch.setattr(losses, "sequence_logps", watched_logps)
    monkeypatch.setattr(objectives, "collate", watched_collate)
    return record


def test_dense_mixed_precision_computes_in_bf16_over_fp32_weights(workplace, seen):
    trainer, folder = train("model.fsdp_policy_mp=bfloat16", "n_examples=16")
    assert set(seen["dtypes"]) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not same(policy(folder), base())


def test_learning_rate_zero_under_bf16_gives_back_the_base(mask, tmp_path):
    """Kept entries too: their masters are the base's values, not those that bf16 rounded."""
    _, folder = train(f"mask_path={tmp_path}/0.9_mask.pt", "model.fsdp_policy_mp=bfloat16", "lr=0")
    assert same(policy(folder), base())


@pytest.mark.slow
def test_lengths_fractions_and_groups_are_used(workplace, seen):
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


def test_average_log_prob_is_the_mean_over_tokens(workplace):
    trainer, _ = train("loss.average_log_prob=true", "lr=0", "n_examples=8")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    means = []
    for number in epoch_batches(40, 8, seed=0, epoch=0)[0]:
        (row,) = trainer.objective.rows(trainer.data.train[number])
        ids = torch.tensor([row.input_ids])
        labels = ids.clone()
        labels[0, : row.prompt_length] = -100
        means.append(model(input_ids=ids, labels=labels).loss.item())
    assert metrics(trainer)[0]["loss/train"] == pytest.approx(sum(means) / 8, rel=1e-4)


def test_activation_checkpointing_runs_each_block_twice(workplace, monkeypatch):
    from lota.train import run_model

    calls, load = [], run_model.load_model

    def watched(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        return model

    monkeypatch.setattr(run_model, "load_model", watched)
    train("exp_name=plain")
    assert len(calls) == 5
    calls.clear()
    train("exp_name=checkpointed", "activation_checkpointing=true")
    assert len(calls) == 10


def test_policy_dtype(mask, tmp_path):
    trainer, folder = train(f"mask_path={tmp_path}/0.9_mask.pt", "model.policy_dtype=bfloat16")
    assert {value.dtype for value in policy(folder).values()} == {torch.bfloat16}
    masters = {name: values for name, _, values in trainer.optimizer.kept_values()}
    name = next(iter(masters))
    assert torch.equal(policy(folder)[name][mask.dense(name)], masters[name].bfloat16())


@pytest.mark.slow
def test_what_flip_protect_and_layer_freezing_leave_trainable(mask, tmp_path):
    other = write_mask(tmp_path / "other.pt", density=0.5, seed=1)
    scope = find_scope(AutoModelForCausalLM.from_pretrained(MODEL))
    flipped, _ = train(f"mask_path={tmp_path}/0.9_mask.pt", "flip_mask=true", "exp_name=flip", "n_examples=8")
    assert flipped.data.mask.n_kept == sum(t.numel() for n, t in base().items() if n in scope) - mask.n_kept
    protected, folder = train(f"mask_path={tmp_path}/0.9_mask.pt", f"protect_masks=[{tmp_path}/other.pt]",
                              "exp_name=protect")  # fmt: skip
    assert protected.data.mask.n_kept == mask.n_kept - mask.overlap(other)
    state, start = policy(folder), base()
    for name in other.names:
        assert torch.equal(state[name][other.dense(name)], start[name][other.dense(name)])
    dense, folder = train(f"protect_masks=[{tmp_path}/other.pt]", "exp_name=dense_protect")
    state = policy(folder)
    assert all(torch.equal(state[n][other.dense(n)], start[n][other.dense(n)]) for n in other.names)
    assert dense.optimizer.n_trained == sum(p.numel() for p in dense.model.parameters()) - other.n_kept
    _, folder = train("freeze_odd_layers=true", "exp_name=layers")
    state = policy(folder)
    for name in start:
        odd = ".layers.1." in name or ".layers.3." in name
        if ".layers." in name:
            assert torch.equal(state[name], start[name]) == odd, name


def test_checkpoints_by_examples_and_the_last_one(workplace):
    trainer, folder = train("save_every=16", "n_epochs=null", "n_examples=50")
    assert folder.name == "step-50"
    assert sorted(p.name for p in trainer.config.run_dir.glob("step-*")) == [
        "step-16", "step-32", "step-48", "step-50"]  # fmt: skip
    assert metrics(trainer)[-1]["examples"] == 50


def test_checkpoints_by_epoch_and_the_last_one(workplace):
    trainer, folder = train("save_every=epoch_2", "n_epochs=3")
    assert sorted(p.name for p in trainer.config.run_dir.glob("epoch-*")) == ["epoch-2", "epoch-3"]
    assert folder.name == "epoch-3"


def test_fast_forward_skips_batches(workplace):
    train("exp_name=whole", "n_epochs=2")
    trainer, _ = train("exp_name=later", "n_epochs=2", "fast_forward=3")
    assert trainer.progress.examples == 80 - 24
    assert trainer.progress.step == 10 - 3


def test_debug_writes_no_checkpoint(workplace):
    trainer, folder = train("debug=true", "wandb.enabled=true")
    assert folder is None
    assert not list(trainer.config.run_dir.glob("*/policy.pt"))


def test_a_diverging_run_stops_with_a_remedy(workplace):
    with pytest.raises(ValueError, match=r"training loss is .*lower lr"):
        train("lr=1e30", "optimizer=SGD", "grad_norm_strategy=none", "warmup_steps=0", "n_epochs=5")


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


def test_a_diverged_model_is_never_saved(workplace):
    """Also where no line of the log is due."""
    overrides = ("lr=1e38", "optimizer=SGD", "grad_norm_strategy=none", "warmup_steps=0", "save_every=8")
    with pytest.raises(ValueError, match="training loss is nan"):
        train(*overrides, "minimum_log_interval_secs=100")
    for folder in settings().run_dir.glob("step-*"):
        assert all(value.isfinite().all() for value in policy(folder).values())


@pytest.mark.parametrize("mask_kind", ["packed", "dense", "none"])
def test_a_grown_vocabulary_goes_with_every_kind_of_mask(tmp_path, mask_kind):
    mask = write_mask(tmp_path / "0.9_mask.pt")
    if mask_kind == "dense":
        shapes = {name: value.shape for name, value in base().items()}
        mask.save(tmp_path / "0.9_mask.pt", format="dense", all_shapes=shapes)
    path = "null" if mask_kind == "none" else f"{tmp_path}/0.9_mask.pt"
    _, folder = train(
        f"mask_path={path}", "freeze_odd_layers=true", 'model.pad_token="<PAD>"', "n_examples=16"
    )
    rows = base()["model.embed_tokens.weight"].shape[0]
    assert policy(folder)["model.embed_tokens.weight"].shape[0] == rows + 1
    _, second = train(f"mask_path={path}", f"model.archive={folder}/policy.pt", "freeze_even_layers=true",
                      "exp_name=second", "n_examples=8")  # fmt: skip
    assert policy(second)["model.embed_tokens.weight"].shape[0] == rows + 1


def test_resized_vocabulary(mask, tmp_path):
    _, folder = train(f"mask_path={tmp_path}/0.9_mask.pt", "'model.pad_token=\"<PAD>\"'".strip("'"))
    state, start = policy(folder), base()
    name = "model.embed_tokens.weight"
    assert state[name].shape[0] == start[name].shape[0] + 1
    assert torch.equal(state[name][:-1], start[name])


def test_an_archive_is_where_training_starts(workplace):
    _, first = train("exp_name=first")
    _, second = train("exp_name=second", f"model.archive={first}/policy.pt", "lr=0")
    assert same(policy(first), policy(second))


def test_samples_with_activation_checkpointing_are_those_of_the_saved_model(workplace):
    """Checkpointing switches the cache off in training; the samples are greedy completions all the same."""
    from lota.evaluate.decoding import Decoding
    from lota.evaluate.generation import generate

    trainer, folder = train("sample_during_eval=true", "eval_every=40", "activation_checkpointing=true",
                            "max_length=40", "max_prompt_length=24")  # fmt: skip
    rows = [json.loads(r) for r in (trainer.config.run_dir / "samples.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
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
        (["mask_path=0.90_mask.pt"], "0.90_mask.pt does not exist"),
        (["model.name_or_path=/nowhere"], "/nowhere"),
        (["model.archive=/nowhere/policy.pt"], "model.archive=/nowhere/policy.pt"),
        (["model.block_name=GPT2Block"], "block_name=GPT2Block"),
        (["model.scope=nothing_is_called_so"], "matches no parameter"),
        (["model.tokenizer_name_or_path=/nowhere"], "no tokenizer at /nowhere"),
        (["fast_forward=1000"], "fast_forward=1000 skips the whole run"),
        (["datasets=[minni]", "model.archive=/nowhere"], r"unknown task(.|\n)*model.archive=/nowhere"),
    ],
)
def test_refused_before_a_model_loads(workplace, monkeypatch, overrides, message):
    def no_model(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lota.train.run_model.load_model", no_model)
    with pytest.raises(ValueError, match=message):
        train(*overrides)
    assert not settings(*overrides).run_dir.exists()


def test_a_mask_of_another_model_is_refused_before_loading(tmp_path, monkeypatch):
    import tiny

    tiny.random_mask(tiny.make("llama")).save(tmp_path / "other_mask.pt")
    monkeypatch.setattr("lota.train.run_model.load_model", None)
    with pytest.raises(ValueError, match="does not belong to this model"):
        train(f"mask_path={tmp_path}/other_mask.pt")


def test_a_mask_that_protection_empties_is_refused_before_loading(mask, tmp_path, monkeypatch):
    monkeypatch.setattr("lota.train.run_model.load_model", None)
    path = f"{tmp_path}/0.9_mask.pt"
    with pytest.raises(ValueError, match="nothing would train"):
        train(f"mask_path={path}", f"protect_masks=[{path}]")


def test_more_tokens_than_positions_are_refused_before_loading(tmp_path, monkeypatch):
    import tiny

    tiny.make("gpt2").save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr("lota.train.run_model.load_model", None)
    with pytest.raises(ValueError, match="max_length=512: the model has 64 positions"):
        train(f"model.name_or_path={tmp_path}/gpt2", f"model.tokenizer_name_or_path={MODEL}")


def test_zero_mask_that_does_not_exist_is_dense(workplace):
    trainer, _ = train("mask_path=masks/none/0.0_mask.pt", "n_examples=8")
    assert trainer.data.mask is None


def test_unreadable_archive(workplace, monkeypatch):
    (workplace / "policy.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"policy\.pt"):
        train(f"model.archive={workplace}/policy.pt")
