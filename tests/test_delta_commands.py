"""--delta: evaluation, samples and conversion on a base with a delta do what they do on the tuned folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import convert_policy_to_hf_resize
import eval_model_all
import generate_samples
from lota.delta import apply, extract
from lota.evaluate.cli import load_chosen_model, model_parser
from lota.models.loading import load_tokenizer
from tests.chars import save_pair
from tests.delta_models import bits, change, same_files


@pytest.fixture
def models(tmp_path):
    """(base, tuned, delta): the embedded alphabet's model, and what noise made of it."""
    base = save_pair(tmp_path / "base")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    change(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), density=0.3).save_pretrained(tuned)
    extract(base, tuned, tmp_path / "noise.safetensors", task="noise")
    return base, tuned, tmp_path / "noise.safetensors"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "tasks" / "gsm8k"
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"question": f"test {i}?", "answer": f"#### {i}"}) + "\n" for i in range(6))
    (folder / "test.jsonl").write_text(rows)
    return tmp_path / "data"


def evaluate(model, data, *more, code=0):
    line = f"--model {model} --datasets gsm8k --data_dir {data} --max_new_tokens 8"
    assert eval_model_all.main([*line.split(), *map(str, more)]) == code


def load_as_command(model, *flags):
    """The model that a command gives these flags."""
    parser = model_parser(None, "--model")
    args = parser.parse_args(["--model", str(model), "--device", "cpu", *map(str, flags)])
    return load_chosen_model(args, load_tokenizer(model))


def predictions(folder):
    text = (folder / "metrics" / "gsm8k_predictions.jsonl").read_text()
    return [json.loads(line)["completion"] for line in text.splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation(models, data, tmp_path, dtype):
    base, tuned, delta = models
    evaluate(tuned, data, "--dtype", dtype)
    evaluate(base, data, "--dtype", dtype)
    evaluate(base, data, "--dtype", dtype, "--delta", delta)
    results = tmp_path / "noise_results"
    assert predictions(results) == predictions(tuned) != predictions(base)
    stored = json.loads((results / "metrics" / "gsm8k.json").read_text())
    assert stored["model"] == f"{base} + {delta}"
    journals = (folder / "metrics/gsm8k_predictions.journal" for folder in (results, tuned, base))
    keys = [json.loads(journal.read_text().splitlines()[0])["key"] for journal in journals]
    assert keys[0]["weights"] == keys[1]["weights"] != keys[2]["weights"]


def test_samples(models, data, tmp_path):
    base, tuned, delta = models
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": "Say hello."}, {"instruction": "Count."}]))
    shared = f"--prompt_set {prompts} --model_name me --max_length 60 --max_prompt_length 40".split()
    assert generate_samples.main([*shared, "--model_path", str(tuned)]) == 0
    assert generate_samples.main([*shared, "--model_path", str(base), "--delta", str(delta)]) == 0
    name = "prompts_temp0.7.json"
    assert (tmp_path / "noise_results" / name).read_text() == (tuned / name).read_text()
    assert not (base / name).exists()


def test_conversion(models, tmp_path, capsys):
    base, tuned, delta = models
    shared = ["--model_path", str(base), "--save_path", str(tmp_path / "out")]
    convert_policy_to_hf_resize.main([*shared, "--delta", str(delta)])
    assert same_files(tmp_path / "out", tuned) and str(tmp_path / "out") in capsys.readouterr().out
    for wrong in (f"--delta {delta} --dtype bfloat16", f"--delta {delta} --policy_path x", ""):
        with pytest.raises(SystemExit):
            convert_policy_to_hf_resize.main([*shared, *wrong.split()])
    with pytest.raises(SystemExit, match="is not the base but the tuned model"):
        convert_policy_to_hf_resize.main(["--model_path", str(tuned), *shared[2:], "--delta", str(delta)])


def test_a_narrower_dtype_rounds_the_tuned_weights_as_loading_them_does(models, tmp_path):
    base, _, delta = models
    apply(base, delta, tmp_path / "applied")
    for dtype in ("bfloat16", "float32", "float16"):
        model = load_as_command(base, "--dtype", dtype, "--delta", delta)
        expected = load_as_command(tmp_path / "applied", "--dtype", dtype)
        for (name, p), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert p.dtype == other.dtype and torch.equal(bits(p), bits(other)), name
        for p, other in zip(model.buffers(), expected.buffers(), strict=True):
            assert p.dtype == other.dtype and torch.equal(p, other)
        assert model.config.dtype == expected.config.dtype


def test_what_is_refused(models, data, tmp_path, capsys):
    base, tuned, delta = models
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(delta.read_bytes()[:-3])
    for model, files, words in (
        (tuned, [delta], "is not the base"),
        (base, [damaged], "truncated or changed"),
        (base, [delta, delta], "--out"),
    ):
        evaluate(model, data, "--delta", *files, code=1)
        assert words in capsys.readouterr().err
    evaluate(base, data, "--delta", delta, delta, "--out", tmp_path / "both", code=1)
    assert "is there twice, or a copy of another" in capsys.readouterr().err
    assert not (tmp_path / "noise_results").exists()
