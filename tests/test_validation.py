"""The validation split that is cut from training rows: who sees it, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest
import yaml

import eval_model_all
from lota.data.examples import held_out_rows, in_validation, load_examples, load_held_out, rows_of
from lota.data.prompts import Prompter
from lota.lotto.config import LottoConfig
from lota.lotto.held_out import HeldOut
from lota.train.saliency_gradients import SaliencySettings, load_saliency_data
from tasks import get_task
from tests.chars import char_tokenizer, save_pair
from tests.evaluations import write_rows
from tests.runs import MODEL, settings

GSM8K = get_task("gsm8k")
ROWS = [{"question": f"How much is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(300)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, "gsm8k", "train", ROWS)
    write_rows(folder, "gsm8k", "test", [{"question": "Test?", "answer": "#### 1"}])
    return folder


def by_hand(row: dict, fraction: float) -> bool:
    """Whether the first 8 bytes of the hash, as a number below 1, are below the fraction."""
    digest = hashlib.sha256(f"validation Question: {row['question']}\nAnswer:\n".encode()).hexdigest()
    return int(digest[:16], 16) / 16**16 < fraction


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_the_rows_are_cut_by_hand(data, fraction):
    cut = {split: rows_of(GSM8K, split, data, fraction) for split in ("train", "validation", "test")}
    assert cut["validation"] == [row for row in ROWS if by_hand(row, fraction)]
    assert cut["train"] == [row for row in ROWS if not by_hand(row, fraction)]
    assert cut["test"] == GSM8K.load("test", data)
    assert rows_of(GSM8K, "train", data) == ROWS
    assert abs(len(cut["validation"]) / len(ROWS) - fraction) < 0.08


def test_a_larger_share_holds_a_smaller_one_and_one_prompt_stays_together(data):
    small, large = (rows_of(GSM8K, "validation", data, fraction) for fraction in (0.05, 0.3))
    assert small and all(row in large for row in small) and len(large) > len(small)
    other_answer = [{**row, "answer": "#### 7"} for row in ROWS]
    places = [[in_validation(GSM8K, row, 0.3) for row in rows] for rows in (ROWS, other_answer)]
    assert places[0] == places[1]
    texts = [{"text": f"{i} words"} for i in range(100)]  # without prompts
    assert 10 < sum(in_validation(get_task("wikitext"), text, 0.3) for text in texts) < 60


def prompts(examples) -> list[str]:
    return [example.prompt.text for example in examples]


def test_runs_masks_and_sequences_leave_it_out_and_are_evaluated_on_it(data):
    apart = [GSM8K.prompt(row) for row in ROWS if by_hand(row, 0.2)]
    config = settings(
        "datasets=[gsm8k]", f"data_dir={data}", "validation_fraction=0.2", "n_eval_examples=1000"
    )
    prompter = Prompter(char_tokenizer())
    trained = prompts(load_examples([GSM8K], "train", config, prompter))
    assert len(trained) == len(ROWS) - len(apart) and not set(trained) & set(apart)
    assert sorted(prompts(load_held_out([GSM8K], config, prompter))) == sorted(apart)
    asked = SaliencySettings(
        datasets="gsm8k", data_dir=str(data), validation_fraction=0.2, score_batches=100, device="cpu"
    )
    rated = load_saliency_data(asked, get_task, MODEL, str(MODEL)).batches
    assert sorted(prompts(example for batch in rated for example in batch)) == sorted(trained)
    sequence = LottoConfig(data_dir=str(data), validation_fraction=0.2)
    assert [GSM8K.prompt(row) for row in HeldOut(sequence, GSM8K).rows] == apart
    assert len(HeldOut(LottoConfig(data_dir=str(data)), GSM8K).rows) == 1  # the test split


def test_no_split_stands_in_for_another(data, tmp_path):
    with pytest.raises(ValueError, match="task gsm8k has no validation split of its own: train and evaluate"):
        held_out_rows(GSM8K, data, "validation")
    with pytest.raises(ValueError, match=r"validation_fraction=1e-09: task gsm8k has 300 .* for validation"):
        rows_of(GSM8K, "validation", data, 1e-9)
    row = {"question": "Which?\nA)1", "choices": ["1", "2"], "answer": "A"}
    write_rows(tmp_path, "AQuA", "train", [row])
    with pytest.raises(ValueError, match="AQuA"):  # it has one of its own, which is not there
        held_out_rows(get_task("AQuA"), tmp_path, "validation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A folder that looks like the checkpoint of a run that left a fifth out."""
    run = tmp_path_factory.mktemp("run")
    config = settings("datasets=[gsm8k]", f"data_dir={data}", "validation_fraction=0.2")
    (run / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    (run / "epoch-1").mkdir()
    return save_pair(run / "epoch-1")


def evaluated(model, data, out, *more, code=0):
    arguments = ["--model", str(model), "--datasets", "gsm8k", "--data_dir", str(data), "--out", str(out)]
    assert eval_model_all.main([*arguments, "--max_new_tokens", "2", "--bs", "64", *more]) == code
    lines = (out / "validation" / "metrics" / "gsm8k_predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def test_a_model_is_scored_on_what_its_run_left_out(trained, data, tmp_path):
    apart = [GSM8K.prompt(row) for row in ROWS if by_hand(row, 0.2)]
    assert evaluated(trained, data, tmp_path, "--split", "validation") == apart
    fewer = evaluated(trained, data, tmp_path, "--split", "validation", "--validation_fraction", "0.1")
    assert fewer == [GSM8K.prompt(row) for row in ROWS if by_hand(row, 0.1)]
    assert not (tmp_path / "metrics").exists()  # where results on the test split stand
    again = tmp_path / "again"
    evaluated(
        trained,
        data,
        again,
        "--split",
        "validation",
        "--validation_fraction",
        "0.1",
        "--compare",
        str(tmp_path),
    )
    summary = json.loads((again / "validation" / "metrics" / "summary.json").read_text())
    assert summary["tasks"][0]["difference"]["exact_match"]["score"] == 0.0  # with its results on such rows


def test_rows_that_a_run_saw_are_refused(trained, data, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        evaluated(trained, data, tmp_path, "--split", "validation", "--validation_fraction", "0.3", code=1)
    assert (
        "was trained with validation_fraction=0.2, so that it has seen such rows" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        evaluated(trained, data, tmp_path, "--validation_fraction", "0.1")
    assert "add --split validation" in capsys.readouterr().err
