"""Prompts: chat templates in training and evaluation alike, examples in front, what is cut."""

from __future__ import annotations

import pytest

from lota.data.batches import Example, Prompt, encode
from lota.data.examples import load_examples, load_held_out
from lota.data.prompts import FewShot, Limits, Prompter
from tasks import get_task
from tests.chars import char_tokenizer
from tests.runs import settings, train, with_mini_task

CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GSM8K = get_task("gsm8k")
ROWS = [{"question": f"What is {i}?", "answer": f"It is <<{i}>>{i}.\n#### {i}"} for i in range(9)]


def chat_tokenizer(template=CHATML):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_never_is_the_tasks_own_text_even_with_a_template():
    prompter = Prompter(chat_tokenizer(), "never")
    assert prompter.prompt(GSM8K, ROWS[0]) == Prompt(GSM8K.prompt(ROWS[0]), GSM8K.closing)
    assert prompter.key == "never"


def test_auto_and_always_use_the_template():
    tokenizer = chat_tokenizer()
    text = "<s>[user]Question: What is 3?</s>[assistant]"
    for choice in ("auto", "always"):
        prompt = Prompter(tokenizer, choice).prompt(GSM8K, ROWS[3])
        assert prompt == Prompt(text, "</s>[assistant]", templated=True)
        by_transformers = tokenizer.apply_chat_template(
            GSM8K.messages(ROWS[3]), add_generation_prompt=True, return_dict=False
        )
        assert prompt.ids(tokenizer) == by_transformers  # one token for the beginning of text
    assert Prompter(tokenizer, "auto").key != Prompter(chat_tokenizer("x" + CHATML), "auto").key


def test_without_a_template_auto_is_never_and_always_an_error():
    assert Prompter(char_tokenizer(), "auto").key == "never"
    with pytest.raises(ValueError, match="chat_template=always, but the tokenizer has none"):
        Prompter(char_tokenizer(), "always")
    with pytest.raises(ValueError, match="chat_template=sometimes: choose one of auto, never, always"):
        Prompter(char_tokenizer(), "sometimes")


def test_a_template_that_refuses_names_the_task():
    tokenizer = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"task gsm8k: .*roles must alternate.*chat_template=never"):
        Prompter(tokenizer, "auto").prompt(GSM8K, ROWS[0])


def test_training_reads_the_ids_of_evaluation():
    tokenizer = chat_tokenizer()
    prompt = Prompter(tokenizer, "auto").prompt(GSM8K, ROWS[2])
    example = Example(prompt, "two")
    encoded = encode(tokenizer, example, max_length=200, max_prompt_length=100)
    assert encoded.input_ids[: encoded.prompt_length] == prompt.ids(tokenizer)
    assert tokenizer.decode(encoded.input_ids[encoded.prompt_length :]) == "two</s>"


@pytest.mark.parametrize("keep_end", [False, True])
def test_a_cut_prompt_keeps_its_frame(keep_end):
    tokenizer = chat_tokenizer()
    text = "<s>[user]abcdefghijklmnopqrstuvwxyz12345</s>[assistant]"
    ids = Prompt(text, "</s>[assistant]", keep_end, templated=True).ids(tokenizer, 30)
    assert len(ids) == 30
    frame = "</s>[assistant]"
    room = 30 - 12 - 1  # of the 30 tokens 12 are the closing words and 1 starts the text
    inner = text.removeprefix("<s>").removesuffix(frame)
    assert tokenizer.decode(ids) == "<s>" + (inner[-room:] if keep_end else inner[:room]) + frame


def test_examples_stand_in_front():
    prompter = Prompter(char_tokenizer())
    text = prompter.prompt(GSM8K, ROWS[0], ROWS[1:3]).text
    parts = [f"Question: What is {i}?\nAnswer:\nIt is {i}.\n#### {i}\n\n" for i in (1, 2)]
    assert text == "".join(parts) + "Question: What is 0?\nAnswer:\n"
    chat = Prompter(chat_tokenizer(), "auto").prompt(GSM8K, ROWS[0], ROWS[1:2])
    assert chat.text == (
        "<s>[user]Question: What is 1?</s>[assistant]It is 1.\n#### 1</s>"
        "[user]Question: What is 0?</s>[assistant]"
    )


def test_examples_are_a_seeded_draw_without_the_row_itself():
    few = FewShot(8, 0, ROWS)
    for index, row in enumerate(ROWS):
        drawn = few.examples(GSM8K, row, index)
        assert sorted(drawn, key=str) == sorted((r for r in ROWS if r is not row), key=str)
    few = FewShot(3, 0, ROWS)
    assert few.examples(GSM8K, {"question": "?"}, 4) == FewShot(3, 0, ROWS).examples(
        GSM8K, {"question": "?"}, 4
    )
    draws = {
        str(FewShot(3, seed, ROWS).examples(GSM8K, {"question": "?"}, i)) for seed in (0, 1) for i in range(4)
    }
    assert len(draws) > 4
    for n in (0, 9):
        with pytest.raises(ValueError, match=f"num_fewshot={n}: there are 9 training rows"):
            FewShot(n, 0, ROWS)


def test_a_prompt_that_is_too_long_loses_whole_examples_first():
    tokenizer = char_tokenizer()
    prompter = Prompter(tokenizer)

    def fitted(bound):
        found = prompter.fit(GSM8K, ROWS[0], ROWS[1:4], bound)
        assert bound is None or len(found.ids) <= bound
        return found.prompt, found.shortened

    two = len(prompter.prompt(GSM8K, ROWS[0], ROWS[2:4]).ids(tokenizer))
    assert fitted(None) == (prompter.prompt(GSM8K, ROWS[0], ROWS[1:4]), False)
    assert fitted(two) == (prompter.prompt(GSM8K, ROWS[0], ROWS[2:4]), True)
    assert fitted(two - 1) == (prompter.prompt(GSM8K, ROWS[0], ROWS[3:4]), True)
    assert fitted(5) == (prompter.prompt(GSM8K, ROWS[0]), True)


def test_runs_render_prompts_as_asked(tmp_path, monkeypatch):
    """A run's examples under each setting, and what is refused before its model loads."""
    monkeypatch.chdir(with_mini_task(tmp_path))
    task = get_task("mini")
    row = task.load("train", tmp_path)[0]
    for choice, prompt in (
        ("never", task.prompt(row)),
        ("auto", f"<s>[user]{row['letters']}</s>[assistant]"),
    ):
        config = settings(f"chat_template={choice}")
        prompter = Prompter(chat_tokenizer(), config.chat_template)
        (example, *_) = load_examples([task], "train", config, prompter)
        assert (example.prompt.text, example.response) == (prompt, task.target(row))
        assert example.prompt.templated == (choice == "auto")
        (held_out, *_) = load_held_out([task], config, prompter)
        assert held_out.prompt.text.startswith("<s>[user]") == (choice == "auto")
    with pytest.raises(ValueError, match="chat_template=always, but the tokenizer has none"):
        train("chat_template=always")
    with pytest.raises(ValueError, match="chat_template=often: choose one of auto, never, always"):
        settings("chat_template=often")


def test_prompts_are_cut_as_training_cut_them():
    """The ids of evaluation against `encode`'s, for prompts around the run's limits."""
    tokenizer = char_tokenizer()
    limits = Limits(max_length=60, max_prompt_length=40)
    prompter = Prompter(tokenizer, limits=limits)
    for n in (10, 40, 41, 80):  # the prompt is 19 tokens longer
        row = {"question": "x" * n, "answer": "#### 1"}
        found = prompter.fit(GSM8K, row, [], bound=200)
        example = Example(Prompt(GSM8K.prompt(row), GSM8K.closing), "")  # the shortest response: its end
        trained = encode(tokenizer, example, max_length=60, max_prompt_length=40)
        seen = trained.input_ids[: trained.prompt_length]
        assert found.ids == seen
        assert (found.cut, found.limit) == ((False, None) if len(seen) == n + 19 else (True, 40))
    assert found.ids == Prompter(tokenizer).fit(GSM8K, row, [], bound=40).ids
    assert len(prompter.fit(GSM8K, row, [], bound=30).ids) == 30  # the model's context comes first
    shot = prompter.fit(GSM8K, row, ROWS[:1], bound=200)  # no run trained on such prompts
    assert not shot.cut and len(shot.ids) > 60
