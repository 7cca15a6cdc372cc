"""PEFT's comparison of methods on MetaMathQA: rows, prompts, answers, measures, fields of results."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lota.models.loading import load_model, load_tokenizer
from scripts import metamathqa as script
from tasks import get_task
from tests.evaluations import json_lines, write_rows
from tests.runs import MODEL, composed, train, write_mask

TASK = get_task("metamathqa")
# Keys of a result there, 5d602fd
FIELDS = {
    "run_info": "created_at total_time experiment_name peft_branch train_config peft_config error_msg",
    "train_info": "accelerator_memory_reserved_avg accelerator_memory_max accelerator_memory_reserved_99th "
    "train_time file_size num_trainable_params num_total_params status metrics",
    "meta_info": "model_info dataset_info package_info system_info pytorch_info",
    "train_config": "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile "
    "use_gc query_template seed grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp "
    "autocast_adapter_dtype generation_kwargs attn_implementation init_kv_cache_prefix",
}


def row(i: int) -> dict:
    return {"query": f"What is {i} + 1?", "response": f"It is {i + 1}.\nThe answer is: {i + 1}", "type": "x"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, "metamathqa", "train", [row(i) for i in range(24)])
    for split, n in (("train", 70), ("test", 6)):
        rows = [{"question": f"{split} {i}?", "answer": f"So.\n#### {i}"} for i in range(n)]
        write_rows(folder, "gsm8k", split, rows)
    write_rows(folder, "finewiki", "test", [{"text": f"The cat number {i} is red. " * 30} for i in range(3)])
    return folder


def test_prompt_and_rows(data, tmp_path):
    (first, *_) = TASK.load("train", data)
    assert TASK.prompt(first) + TASK.target(first) == (
        "Question: What is 0 + 1? Think step by step.\nAnswer:It is 1.\nThe answer is: 1"
    )
    long = [
        {"query": "q" * 600, "response": "r" * n, "type": "x"} for n in (699, 700)
    ]  # a blank between them
    write_rows(tmp_path, "metamathqa", "train", long)
    assert [len(found["response"]) for found in TASK.load("train", tmp_path)] == [699]
    assert TASK.load("test", data)[5] == {"query": "test 5?", "response": "So.\n#### 5"}
    np.random.seed(0)
    order = np.arange(70)
    np.random.shuffle(order)
    assert [found["query"] for found in TASK.load("validation", data)] == [f"train {i}?" for i in order[:50]]


@pytest.mark.parametrize(
    ("completion", "extracted"),
    [
        ("So 3.\nThe answer is: 16", "16"),
        ("The answer is: 3. No: the sum. The answer is: $1,200.", "1,200"),  # the last one
        ("The answer is 50%!", "50"),
        ("#### 7\n\nThe final answer is: 8 \nQuestion: #### 9", "8"),  # in the order of the marks
        ("The final answer is 2/4.", "2/4"),
        ("it is 12", None),
    ],
)
def test_what_counts_as_an_answer(completion, extracted):
    assert TASK.extract(completion) == extracted


def test_what_is_right():
    for answer, gold in (
        ("0.5", "1/2"),
        ("16.0", "16"),
        ("2/4", "0.5"),
        ("x + 1", "x + 1"),
        ("1,200", "1,200"),
    ):
        assert TASK.score(answer, gold) == 1.0
    for answer, gold in (("1/0", "1"), ("1,200", "1200"), ("nan", "1"), ("1/2/3", "1"), ("", "1")):
        assert TASK.score(answer, gold) == 0.0
    assert TASK.score(None, "1") == 0.0


def test_only_the_first_articles_are_fetched(monkeypatch):
    asked = {}

    def load_dataset(**arguments):
        asked.update(arguments)
        return ({"text": f"{i}"} for i in itertools.count())

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = get_task("finewiki").hub.load("test")
    assert [found["text"] for found in rows] == [f"{i}" for i in range(100)]
    assert asked["streaming"] and asked["path"] == "HuggingFaceFW/finewiki" and asked["split"] == "train"


def wiki_loss(model, tokenizer, texts: list[str]) -> float:
    """Mean over all tokens of all texts, after BOS, at most 512 with it."""
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids[:512]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits.double()
        losses.append(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_progress_of_a_run():
    """An entry per 250 steps: losses weigh by their examples, rates are of the time that training took."""
    lines = [
        (100, 400, 2.0, 4.0),
        (250, 1000, 1.0, 8.0),
        (300, 1200, 0.5, 10.0),
    ]  # step, examples, loss, rate
    log = [  # of (step, examples, loss, examples per second)
        {
            "step": step,
            "examples": examples,
            "nats_per_token/train": loss,
            "examples_per_second": rate,
            "tokens_per_second": 10 * rate,
        }
        for step, examples, loss, rate in lines
    ]
    first, second = script.progress(log)
    assert (first["step"], first["train samples"], second["step"]) == (250, 1000, 300)
    assert first["train loss"] == pytest.approx((400 * 2.0 + 600 * 1.0) / 1000)
    assert first["train time"] == pytest.approx(400 / 4 + 600 / 8)
    assert first["tokens / sec"] == pytest.approx(10_000 / 175)
    assert second["elapsed train time"] == pytest.approx(175 + 20)
    assert second["train total tokens"] == 12_000


@pytest.mark.slow
def test_a_run_is_measured(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    write_mask(tmp_path / "mask.pt", 0.05)
    recipe = composed("+experiment=metamathqa")
    assert (recipe.batch_size * 5000, recipe.warmup_steps, recipe.max_length) == (recipe.n_examples, 500, 768)
    small = ["n_examples=16", "warmup_steps=1", "max_length=256", "max_prompt_length=128", "lr=1e-2"]
    _, folder = train(
        "+experiment=metamathqa", "exp_name=run", "datasets=[metamathqa]", f"data_dir={data}",
        "save_delta=true", f"mask_path={tmp_path / 'mask.pt'}", f"model.name_or_path={MODEL}",
        "model.policy_dtype=float32", *small,
    )  # fmt: skip
    out = tmp_path / "results"
    options = ["--name", "entry", "--out", str(out), "--data_dir", str(data), "--device", "cpu", "--bs", "3"]
    script.main([str(folder), *options])
    found = json.loads((out / "lota--entry.json").read_text())
    parts = {**found, "train_config": found["run_info"]["train_config"]}
    for part, keys in FIELDS.items():
        assert set(keys.split()) <= set(parts[part]), part
    config, info = parts["train_config"], found["train_info"]
    assert config["query_template"] == "Question: {query} Think step by step.\nAnswer:"
    assert (config["max_steps"], config["batch_size"], config["optimizer_kwargs"]["lr"]) == (2, 8, 1e-2)
    assert info["num_trainable_params"] == found["run_info"]["peft_config"]["kept"] > 30_000
    assert info["file_size"] == (folder / "delta.safetensors").stat().st_size
    last = info["metrics"][-1]
    texts = [f"The cat number {i} is red. " * 30 for i in range(3)]
    tokenizer = load_tokenizer(MODEL)
    models = [load_model(MODEL), load_model(MODEL, archive=folder / "policy.pt")]
    before, after = (wiki_loss(model.eval(), tokenizer, texts) for model in models)
    assert last["forgetting"] == pytest.approx(after - before, abs=1e-5) and abs(after - before) > 1e-3
    predictions = json_lines(folder / "metrics" / "metamathqa_predictions.jsonl")
    right = [TASK.score(TASK.extract(p["completion"]), str(i)) for i, p in enumerate(predictions)]
    assert len(right) == 6 and last["test accuracy"] == sum(right) / 6
    assert last["train samples"] == 16 and info["train_time"] > 0
    assert sum(line["train time"] for line in info["metrics"][:-1]) == pytest.approx(info["train_time"])
