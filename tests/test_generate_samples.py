"""generate_samples.py: samples in AlpacaEval's format, their order, continuing, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import generate_samples
import lota.evaluate.alpaca as alpaca
from lota.data.prompts import Prompter
from lota.evaluate.alpaca import Sampler
from lota.evaluate.decoding import Decoding
from tasks import get_task
from tests.chars import char_model, char_tokenizer, save_pair

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
    sampler = Sampler(pair[0], prompter, task, generator=generator, chunk_size=chunk_size)
    return sampler.write(path, INSTRUCTIONS, prompts, decoding, **more)


def read(path) -> list[dict]:
    return json.loads(path.read_text())


def test_a_list_in_the_order_of_the_prompts(pair, tmp_path):
    path = tmp_path / "a.json"
    written = write(pair, path)
    assert read(path) == written
    assert [list(sample) for sample in written] == [["instruction", "output", "generator"]] * 5
    assert [sample["instruction"] for sample in written] == INSTRUCTIONS
    assert {sample["generator"] for sample in written} == {"me"}
    assert all(sample["output"] for sample in written)


def test_text_does_not_depend_on_chunks_or_on_the_part_asked_for(pair, tmp_path):
    whole = write(pair, tmp_path / "a.json", chunk_size=5)
    assert write(pair, tmp_path / "b.json", chunk_size=1) == whole
    assert write(pair, tmp_path / "c.json", chosen=[2, 3]) == whole[2:4]
    other_seed = Decoding(max_new_tokens=15, temperature=0.7, seed=4)
    assert write(pair, tmp_path / "d.json", other_seed) != whole


def test_an_interrupted_run_is_continued(pair, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    whole = write(pair, tmp_path / "whole.json")
    asked = []
    generate = alpaca.generate

    def dies_in_its_second_chunk(*arguments, indices, **settings):
        asked.extend(indices)
        if len(asked) > 3:
            raise KeyboardInterrupt
        return generate(*arguments, indices=indices, **settings)

    monkeypatch.setattr(alpaca, "generate", dies_in_its_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        write(pair, path)
    assert read(path) == whole[:2]  # whole JSON at any time
    asked.clear()
    monkeypatch.setattr(
        alpaca,
        "generate",
        lambda *a, indices, **s: asked.extend(indices) or generate(*a, indices=indices, **s),
    )
    counts = []
    assert write(pair, path, on_done=counts.append) == whole
    assert asked == [2, 3, 4]
    assert counts == [2, 2, 1]
    assert read(path) == whole


def test_samples_of_other_weights_are_set_aside(pair, tmp_path):
    path = tmp_path / "a.json"
    old = write(pair, path)
    new = write((char_model(seed=1), pair[1]), path)
    assert new != old
    assert read(path) == new
    assert read(tmp_path / "a.1.json") == old


def test_a_new_name_does_not_cost_new_samples(pair, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    old = write(pair, path)
    monkeypatch.setattr(
        alpaca, "generate", lambda *a, **s: [] if not a[2] else pytest.fail("generated again")
    )
    renamed = write(pair, path, generator="you")
    assert [sample["output"] for sample in renamed] == [sample["output"] for sample in old]
    assert {sample["generator"] for sample in read(path)} == {"you"}


def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    fields = ("instruction", "prompt", "prompt", "instruction", "prompt")
    rows = [{field: text} for field, text in zip(fields, INSTRUCTIONS, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder, tmp_path, *more: str) -> int:
    arguments = [
        "--prompt_set",
        str(prompts_file(tmp_path)),
        "--model_name",
        "N",
        "--model_path",
        str(folder),
    ]
    return generate_samples.main([*arguments, "--max_length", "70", "--max_prompt_length", "60", *more])


def test_command(folder, tmp_path):
    assert run(folder, tmp_path, "--temperatures", "0.7,1.0") == 0
    first, second = read(folder / "prompts_temp0.7.json"), read(folder / "prompts_temp1.0.json")
    assert [sample["instruction"] for sample in first] == INSTRUCTIONS
    assert [sample["output"] for sample in first] != [sample["output"] for sample in second]
    assert max(len(sample["output"]) for sample in first) <= 10  # a token is a character here
    part = ["--ff", "1", "--n_examples", "2", "--out", str(tmp_path / "out")]
    assert run(folder, tmp_path, "--temperatures", "0.7", *part) == 0
    assert read(tmp_path / "out/prompts_temp0.7.json") == first[1:3]


def test_command_with_alpaca_eval_itself(folder, tmp_path):
    data = tmp_path / "tasks/alpaca_eval/eval.json"
    data.parent.mkdir(parents=True)
    data.write_text(
        json.dumps([{"instruction": text, "output": "", "generator": "x"} for text in INSTRUCTIONS])
    )
    arguments = ["--prompt_set", "alpaca_eval", "--temperatures", "0", "--data_dir", str(tmp_path)]
    assert run(folder, tmp_path, *arguments, "--out", str(tmp_path / "out")) == 0
    assert len(read(tmp_path / "out/alpaca_eval_temp0.0.json")) == 5


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


def chat(*turns: str) -> list[dict]:
    speakers = ("user", "assistant")
    return [{"role": speakers[i % 2], "content": turn} for i, turn in enumerate(turns)]


def test_prompt_sets_of_chats(folder, tmp_path):
    """sharegpt's first questions and ultrafeedback's prompts, in the prompts that training gives them."""
    (tmp_path / "sharegpt_data").mkdir()
    chats = [{"conversations": chat("Who?", "I.", "Why?", "So.")}, {"conversations": chat("Hm?", "No.")}]
    (tmp_path / "sharegpt_data/conversations.json").write_text(json.dumps(chats))
    feedback = get_task("ultrafeedback")
    path = tmp_path / "tasks/ultrafeedback" / f"{feedback.held_out or feedback.splits[0]}.jsonl"
    path.parent.mkdir(parents=True)
    pair = {"chosen": chat("?", "D."), "rejected": chat("?", "E.")}
    rows = [{"prompt": question, **pair} for question in ("Where?", "Who?")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--data_dir", str(tmp_path), "--temperatures", "0", "--out", str(tmp_path / "out")]
    for name in ("sharegpt", "ultrafeedback"):
        assert run(folder, tmp_path, *arguments, "--prompt_set", name) == 0
    questions = read(tmp_path / "out/sharegpt_temp0.0.json")
    rest = read(tmp_path / "out/ultrafeedback_temp0.0.json")
    assert [sample["instruction"] for sample in questions] == ["Who?", "Hm?"]
    assert [sample["instruction"] for sample in rest] == ["Where?", "Who?"]
    assert rest[1]["output"] == questions[0]["output"]  # the same prompt


def test_the_instruction_of_a_longer_chat_is_all_of_it():
    row = {"messages": chat("Who?", "I.", "Why?"), "response": "So."}
    whole = "Human:\nWho?\n\nAssistant:\nI.\n\nHuman:\nWhy?"
    assert get_task("sharegpt").instruction(row) == whole


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


def test_the_chat_template_that_the_model_was_trained_with(folder, tmp_path, monkeypatch):
    """Taken from the folder's conversion.json, or from the command; its prompts reach the model."""
    seen = []

    def watched(model, tokenizer, prompts, decoding, **options):
        seen.append([tokenizer.decode(ids) for ids in prompts])
        return generate(model, tokenizer, prompts, decoding, **options)

    generate = alpaca.generate
    monkeypatch.setattr(alpaca, "generate", watched)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[reply]"
    chatty = tmp_path / "chatty"
    shutil.copytree(folder, chatty)
    tokenizer.save_pretrained(chatty)
    out = ["--temperatures", "0", "--n_examples", "1", "--out", str(tmp_path / "out")]
    assert run(chatty, tmp_path, *out) == 0
    (chatty / "conversion.json").write_text(json.dumps({"chat_template": "auto"}))
    assert run(chatty, tmp_path, *out) == 0
    assert run(chatty, tmp_path, *out, "--chat_template", "never") == 0
    plain, templated, forced = (texts[0] for texts in seen)
    assert templated == f"[user]{INSTRUCTIONS[0]}[reply]"
    assert plain == forced != templated
