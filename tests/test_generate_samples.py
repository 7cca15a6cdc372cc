"""generate_samples.py: samples in AlpacaEval's format, their order, continuing, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import generate_samples
import lota.evaluate.engine as engine
from lota.data.prompts import Prompter
from lota.evaluate.alpaca import Sampler
from lota.evaluate.decoding import Decoding
from tasks import get_task
from tests.chars import char_model, char_tokenizer, save_pair
from tests.evaluations import write_rows
from tests.test_tasks_chat import said

INSTRUCTIONS = ["Say hello.", "Name a colour, please, and say why you like it.", "Why?", "Count.", "Rhyme!"]
DRAWN = Decoding(max_new_tokens=15, temperature=0.7, seed=3)


@pytest.fixture(scope="module")
def pair():
    return char_model(), char_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("model"))


def write(pair, path, decoding=DRAWN, chunk_size=2, generator="me", **more) -> list[dict]:
    task, prompter = get_task("alpaca_eval"), Prompter(pair[1])
    prompts = [prompter.prompt(task, {"instruction": text}) for text in INSTRUCTIONS]
    local = engine.TransformersEngine(*pair, chunk_size)
    sampler = Sampler(local, prompter, task, generator=generator, chunk_size=chunk_size)
    return sampler.write(path, INSTRUCTIONS, prompts, decoding, **more)


def read(path) -> list[dict]:
    return json.loads(path.read_text())


@pytest.fixture
def calls(monkeypatch) -> list[tuple[list[int], list[str]]]:
    """Numbers and texts of the prompts of every call to generate."""
    calls, generate = [], engine.generate

    def watched(model, tokenizer, prompts, decoding, *, indices, **settings):
        calls.append((list(indices), [tokenizer.decode(ids) for ids in prompts]))
        return generate(model, tokenizer, prompts, decoding, indices=indices, **settings)

    monkeypatch.setattr(engine, "generate", watched)
    return calls


def test_a_list_in_the_order_of_the_prompts(pair, tmp_path):
    written = write(pair, tmp_path / "a.json")
    assert read(tmp_path / "a.json") == written
    assert [list(sample) for sample in written] == [["instruction", "output", "generator"]] * 5
    assert [sample["instruction"] for sample in written] == INSTRUCTIONS
    assert {sample["generator"] for sample in written} == {"me"}
    assert all(sample["output"] for sample in written)


def test_text_does_not_depend_on_chunks_or_on_the_part_asked_for(pair, tmp_path):
    whole = write(pair, tmp_path / "a.json", chunk_size=5)
    assert write(pair, tmp_path / "b.json", chunk_size=1) == whole
    assert write(pair, tmp_path / "c.json", chosen=[2, 3]) == whole[2:4]
    assert write(pair, tmp_path / "d.json", replace(DRAWN, seed=4)) != whole


def test_an_interrupted_run_is_continued(pair, tmp_path, calls):
    def interrupt(count):
        counts.append(count)
        if sum(counts) == 3:
            raise KeyboardInterrupt

    path, counts = tmp_path / "a.json", []
    whole = write(pair, tmp_path / "whole.json")
    with pytest.raises(KeyboardInterrupt):
        write(pair, path, on_done=interrupt)
    assert read(path) == whole[:2]  # whole JSON at any time; the longest two prompts come first
    calls.clear()
    counts.clear()
    assert write(pair, path, on_done=counts.append) == whole == read(path)
    assert [numbers for numbers, _ in calls] == [[2, 4]]
    assert counts == [3, 1, 1]


def test_samples_of_other_weights_are_set_aside(pair, tmp_path):
    path = tmp_path / "a.json"
    old = write(pair, path)
    new = write((char_model(seed=1), pair[1]), path)
    assert read(path) == new != old
    assert read(tmp_path / "a.1.json") == old


def test_a_new_name_does_not_cost_new_samples(pair, tmp_path, calls):
    old = write(pair, tmp_path / "a.json")
    calls.clear()
    renamed = write(pair, tmp_path / "a.json", generator="you")
    assert [sample["output"] for sample in renamed] == [sample["output"] for sample in old]
    assert {sample["generator"] for sample in read(tmp_path / "a.json")} == {"you"}
    assert calls == []


def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    fields = ("instruction", "prompt", "prompt", "instruction", "prompt")
    rows = [{field: text} for field, text in zip(fields, INSTRUCTIONS, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder, tmp_path, *more: str) -> int:
    arguments = ["--prompt_set", str(prompts_file(tmp_path)), "--model_name", "N"]
    arguments += ["--model_path", str(folder), "--max_length", "70", "--max_prompt_length", "60"]
    return generate_samples.main([*arguments, *more])


def test_command(folder, tmp_path):
    assert run(folder, tmp_path, "--temperatures", "0.7,1.0") == 0
    first, second = read(folder / "prompts_temp0.7.json"), read(folder / "prompts_temp1.0.json")
    assert [sample["instruction"] for sample in first] == INSTRUCTIONS
    assert [sample["output"] for sample in first] != [sample["output"] for sample in second]
    assert max(len(sample["output"]) for sample in first) <= 10  # a token is a character here
    part = ["--ff", "1", "--n_examples", "2", "--out", str(tmp_path / "out")]
    assert run(folder, tmp_path, "--temperatures", "0.7", *part) == 0
    assert read(tmp_path / "out/prompts_temp0.7.json") == first[1:3]


def test_several_samples_of_a_prompt(folder, tmp_path):
    """Each its own draw, in a file of its own, the same however the run is batched or continued."""
    out = ["--out", str(tmp_path / "a"), "--temperatures", "0.7", "--num_samples_per_prefix"]
    assert run(folder, tmp_path, *out, "3") == 0
    names = ["prompts_temp0.7.json", "prompts_temp0.7_sample1.json", "prompts_temp0.7_sample2.json"]
    files = [read(tmp_path / "a" / name) for name in names]
    for i, instruction in enumerate(INSTRUCTIONS):
        assert {samples[i]["instruction"] for samples in files} == {instruction}
        assert len({samples[i]["output"] for samples in files}) == 3
    out[1] = str(tmp_path / "b")
    assert run(folder, tmp_path, *out, "1", "--chunk_size", "2") == 0  # one now, the others afterwards
    assert not (tmp_path / "b" / names[1]).exists()
    assert run(folder, tmp_path, *out, "3", "--chunk_size", "2", "--n_examples", "4") == 0
    assert run(folder, tmp_path, *out, "3", "--chunk_size", "3") == 0
    assert [read(tmp_path / "b" / name) for name in names] == files


def test_prompt_sets(folder, tmp_path):
    """sharegpt's first questions and ultrafeedback's prompts are in the prompts that training gives them."""
    write_rows(tmp_path, "alpaca_eval", "eval", [{"instruction": t, "output": ""} for t in INSTRUCTIONS])
    chats = [{"conversations": said("Who?", "I.", "Why?", "So.")}, {"conversations": said("Hm?", "No.")}]
    (tmp_path / "sharegpt_data").mkdir()
    (tmp_path / "sharegpt_data/conversations.json").write_text(json.dumps(chats))
    feedback = get_task("ultrafeedback")
    answers = {"chosen": said("?", "D."), "rejected": said("?", "E.")}
    rows = [{"prompt": question, **answers} for question in ("Where?", "Who?")]
    write_rows(tmp_path, "ultrafeedback", feedback.held_out or feedback.splits[0], rows)
    found = {}
    for name in ("alpaca_eval", "sharegpt", "ultrafeedback"):
        where = ["--data_dir", str(tmp_path), "--out", str(tmp_path / "out"), "--prompt_set", name]
        assert run(folder, tmp_path, "--temperatures", "0", *where) == 0
        found[name] = read(tmp_path / f"out/{name}_temp0.0.json")
    asked = {name: [sample["instruction"] for sample in samples] for name, samples in found.items()}
    questions = {"sharegpt": ["Who?", "Hm?"], "ultrafeedback": ["Where?", "Who?"]}
    assert asked == {"alpaca_eval": INSTRUCTIONS, **questions}
    assert found["ultrafeedback"][1]["output"] == found["sharegpt"][0]["output"]  # the same prompt


def test_archive_puts_other_weights_on_top(folder, tmp_path):
    other = char_model(seed=5)
    archive = tmp_path / "epoch-1"
    archive.mkdir()
    torch.save({"step_idx": 1, "state": other.state_dict(), "metrics": {}}, archive / "policy.pt")
    common = ["--temperatures", "0", "--out"]
    assert run(folder, tmp_path, *common, str(tmp_path / "with"), "--archive", str(archive)) == 0
    assert run(folder, tmp_path, *common, str(tmp_path / "without")) == 0
    assert run(save_pair(tmp_path / "other", seed=5), tmp_path, *common, str(tmp_path / "converted")) == 0
    with_archive = read(tmp_path / "with/prompts_temp0.0.json")
    assert with_archive == read(tmp_path / "converted/prompts_temp0.0.json")
    assert with_archive != read(tmp_path / "without/prompts_temp0.0.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--temperatures", "warm"], "--temperatures warm"),
        (["--temperatures", "0.7,-1"], "temperature=-1.0"),
        (["--temperatures", ""], "--temperatures"),
        (["--max_prompt_length", "70"], "--max_prompt_length 70"),
        (["--ff", "5"], "--ff 5 leaves none"),
        (["--chunk_size", "0"], "--chunk_size"),
        (["--num_samples_per_prefix", "0"], "--num_samples_per_prefix 0"),
        (["--num_samples_per_prefix", "2", "--temperatures", "0.7,0"], "--temperatures 0: greedy"),
        (["--prompt_set", "ultrafeedback", "--split", "best"], "no split 'best'"),
        (["--top_p", "2"], "top_p=2.0"),
        (["--prompt_set", "alpaca"], "neither alpaca_eval, sharegpt, ultrafeedback nor a"),
        (["--prompt_set", "absent.json"], "no such file"),
        (["--prompt_set", "alpaca_eval", "--data_dir", "/nowhere"], "no data for split 'eval'"),
    ],
)
def test_command_refuses_before_the_model_loads(folder, tmp_path, capsys, nothing_loads, change, words):
    assert run(folder, tmp_path, *change) == 1
    assert words in capsys.readouterr().err


def test_a_malformed_prompt_is_refused(folder, tmp_path, capsys, nothing_loads):
    path = tmp_path / "bad.json"
    path.write_text('[\n {"instruction": "fine"},\n {"question": "what?"}\n]')
    assert run(folder, tmp_path, "--prompt_set", str(path)) == 1
    assert "bad.json, line 3: none of the fields 'instruction'" in capsys.readouterr().err
    assert not list(tmp_path.glob("bad_temp*"))


def test_a_folder_without_tokenizer(tmp_path, capsys):
    char_model().save_pretrained(tmp_path / "bare")
    assert run(tmp_path / "bare", tmp_path) == 1
    assert "no tokenizer" in capsys.readouterr().err


def test_the_chat_template_that_the_model_was_trained_with(folder, tmp_path, calls):
    """Taken from the folder's conversion.json, or from the command; its prompts reach the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[reply]"
    chatty = shutil.copytree(folder, tmp_path / "chatty")
    tokenizer.save_pretrained(chatty)
    out = ["--temperatures", "0", "--n_examples", "1", "--out", str(tmp_path / "out")]
    assert run(chatty, tmp_path, *out) == 0
    (chatty / "conversion.json").write_text(json.dumps({"chat_template": "auto"}))
    assert run(chatty, tmp_path, *out) == 0
    assert run(chatty, tmp_path, *out, "--chat_template", "never") == 0
    plain, templated, forced = (texts[0] for _, texts in calls)
    assert templated == f"[user]{INSTRUCTIONS[0]}[reply]"
    assert plain == forced != templated


def test_all_that_is_wrong_with_flags_is_told(tmp_path, capsys, nothing_loads):
    (tmp_path / "prompts.json").write_text('["Hi"]')
    line = f"--model_path model --prompt_set {tmp_path}/prompts.json --chunk_size 0 --seed -1 --model_name"
    assert generate_samples.main([*line.split(), " "]) == 1
    error = capsys.readouterr().err
    for words in ("--chunk_size 0: must be at", "--seed -1: must be at least 0", "--model_name is empty"):
        assert words in error
