"""extract_masks.py with scores that look at data, on the embedded model."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import extract_masks
from lota.masks import Mask, kept_count
from lota.models.scope import find_scope
from tests.mini_task import TASK
from tests.runs import MODEL, with_mini_task
from tests.test_selection import sorted_masks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(with_mini_task(tmp_path))
    return tmp_path


def run(arguments: str) -> None:
    extract_masks.main(f"--base {MODEL} --name m --sparsities 0.5 0.9 {arguments}".split())


def gradients(n_batches: int, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Per batch the gradient of the summed response loss, each example on its own without padding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    rows = TASK.load("train", None)
    order = list(range(len(rows)))
    random.Random(f"{seed}-0").shuffle(order)  # the order of the first epoch
    found = []
    for start in range(0, n_batches * batch_size, batch_size):
        model.zero_grad()
        for row in (rows[i] for i in order[start : start + batch_size]):
            prompt = tokenizer(TASK.prompt(row)).input_ids
            response = tokenizer(TASK.target(row), add_special_tokens=False).input_ids
            response = [*response, tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if n in find_scope(model)})
    return found


@pytest.mark.parametrize("score", ["gradient", "fisher", "snip"])
def test_masks_from_data(score, folder, capsys):
    run(f"--score {score} --datasets mini --score_batches 3 --batch_size 4 --seed 5 --out {folder}/masks")
    weights = dict(AutoModelForCausalLM.from_pretrained(MODEL).named_parameters())
    total: dict[str, torch.Tensor] = {}
    for grads in gradients(3, 4, seed=5):
        for name, grad in grads.items():
            part = grad.square() if score == "fisher" else grad
            total[name] = total[name] + part if name in total else part
    if score == "snip":
        total = {name: value * weights[name].detach() for name, value in total.items()}
    summary = json.loads((folder / "masks" / "m" / "summary.json").read_text())
    for typed in ("0.5", "0.9"):
        mask = Mask.load(folder / "masks" / "m" / f"{typed}_mask.pt")
        expected = sorted_masks(
            {n: v.abs() for n, v in total.items()}, kept_count(float(typed), mask.n_total)
        )
        differ = sum((mask.dense(n) != flags).sum().item() for n, flags in expected.items())
        assert differ <= 1e-4 * mask.n_kept  # the last digits of sums in another order
        data = mask.meta["data"]
        assert (data["datasets"], data["batches"], data["examples"]) == (["mini"], 3, 12)
        assert summary["masks"][typed]["data"] == data and mask.meta["score"] == score
    assert "0.9_mask.pt" in capsys.readouterr().out


def test_what_is_looked_at_is_recorded(folder):
    def data_of(options):
        run(f"--score snip --datasets mini --score_batches 2 {options} --out {folder}/masks")
        mask = Mask.load(folder / "masks" / "m" / "0.9_mask.pt")
        return mask.meta["data"], mask

    first, mask = data_of("--batch_size 2")
    assert data_of("--batch_size 2")[0] == first
    assert data_of("--batch_size 2 --seed 1")[0]["data_hash"] != first["data_hash"]
    longer, _ = data_of("--batch_size 100")
    assert (longer["batches"], longer["examples"]) == (1, 40)  # at most one pass
    coarse, other = data_of(
        "--batch_size 2 --score_dtype bfloat16 --dtype bfloat16 --activation_checkpointing"
    )
    assert (coarse["dtype"], coarse["score_dtype"]) == ("bfloat16", "bfloat16")
    assert 0.85 * mask.n_kept < mask.overlap(other) < mask.n_kept == other.n_kept


def test_base_of_a_run(folder):
    """A policy.pt and a folder that gives its structure: the same mask as from the folder."""
    state = AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
    torch.save({"step_idx": 0, "state": state, "metrics": {}}, folder / "policy.pt")
    options = "--sparsities 0.9 --score snip --datasets mini --score_batches 2"
    run(f"{options} --out {folder}/a")
    extract_masks.main(
        f"--base {folder}/policy.pt --model {MODEL} --name m {options} --out {folder}/b".split()
    )
    first, second = (Mask.load(folder / out / "m" / "0.9_mask.pt") for out in "ab")
    assert all(torch.equal(first.bits[name], second.bits[name]) for name in first.names)


def test_rows_by_data(folder):
    run(f"--score snip --datasets mini --score_batches 2 --granularity row --per layer --out {folder}/masks")
    mask = Mask.load(folder / "masks" / "m" / "0.9_mask.pt")
    assert (mask.meta["per"], mask.meta["granularity"]) == ("layer", "row")
    for name in mask.names:
        by_row = mask.dense(name).float().mean(1)
        assert ((by_row == 0) | (by_row == 1)).all()
    assert 0 < mask.n_kept <= kept_count(0.9, mask.n_total)


@pytest.mark.parametrize(
    "options, messages",
    [
        ("--score gradient", ["--datasets null: name the tasks"]),
        (
            "--score fischer --datasets mini --per module",
            ["--score 'fischer'", "did you mean fisher", "--per 'module'"],
        ),
        ("--score snip --datasets minni", ["unknown task 'minni'"]),
        ("--score snip --datasets mini --score_batches 0", ["--score_batches 0: must be at least 1"]),
        ("--score snip --datasets mini --batch_size 0", ["--batch_size 0: must be at least 1"]),
        (
            "--score snip --datasets mini --score_dtype float16",
            ["--score_dtype float16: choose one of float32"],
        ),
        ("--score snip --datasets mini --dtype half", ["--dtype half: choose one of float32"]),
        ("--score snip --datasets mini --max_prompt_length 600", ["--max_prompt_length 600 leaves no room"]),
        ("--score snip --datasets mini --device tpu", ["--device tpu"]),
        ("--score snip --datasets mini --tokenizer_path nowhere", ["no tokenizer at nowhere"]),
        (
            "--score snip --granularity rows --protect none.pt --score_dtype int8",
            [
                "did you mean row",
                "none.pt does not exist",
                "--datasets null: name the tasks",
                "--score_dtype int8",
            ],
        ),
        ("--per module", ["--per 'module'", "--tuned"]),
    ],
)
def test_refusals_tell_all_and_load_nothing(options, messages, folder, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lota.train.run_model.load_model", load)
    with pytest.raises(SystemExit) as stopped:
        run(f"{options} --out {folder}/masks")
    for message in messages:
        assert message in str(stopped.value.code)
    assert not (folder / "masks").exists()


def test_flags_that_nothing_reads_are_told(folder, capsys):
    run(f"--score magnitude --tuned nowhere --datasets mini --batch_size 4 --seed 3 --out {folder}/masks")
    shown = capsys.readouterr().err
    assert "not used here: --datasets, --batch_size, --tuned, --seed (--score magnitude)" in shown
    run(f"--score random --seed 3 --out {folder}/masks")
    assert "not used" not in capsys.readouterr().err
