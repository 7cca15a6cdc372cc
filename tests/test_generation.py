"""Generation against Hugging Face's own, row by row, and independence of the batch."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import transformers

import lota.evaluate.generation as generation
from lota.evaluate.decoding import Decoding
from lota.evaluate.generation import generate, prompt_bound
from tests import tiny
from tests.chars import ALPHABET, char_model, char_tokenizer

STOPPED = Decoding(40, stop=("q",))  # some of the completions of TEXTS hold a q, at different places
TEXTS = ["Hello", "a", "The longest of these prompts, by far", "x = 3;", "Why?", "12 + 30 ="]


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


@pytest.fixture(scope="module")
def model():
    return char_model()


def alone(model, ids: list[int], n: int) -> list[int]:
    """transformers' greedy completion of one prompt, unpadded."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=n, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_equals_transformers(architecture: str, batch_size: int, tokenizer):
    """Token by token, with left padding, rows that end early at an end token, and all rows together."""
    model = tiny.make(architecture).eval()
    for parameter in model.parameters():
        parameter.data *= 6  # flat random models repeat one token
    prompts = [batch.tolist() for batch in torch.randint(3, tiny.VOCAB, (6, 9))]
    prompts = [prompt[: 2 + i] for i, prompt in enumerate(prompts)]
    expected = [alone(model, prompt, 20) for prompt in prompts]
    # an end token that some of the completions hold
    model.generation_config.eos_token_id = [2, expected[0][5]]
    expected = [alone(model, prompt, 20) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 1
    ends = set(model.generation_config.eos_token_id)
    texts = [
        tokenizer.decode([t for t in tokens if t not in ends], skip_special_tokens=True)
        for tokens in expected
    ]
    assert generate(model, tokenizer, prompts, Decoding(20), batch_size=batch_size) == texts


def test_sliding_window_equals_transformers(tokenizer):
    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.MistralForCausalLM(config).eval()
    model.generation_config.eos_token_id = 2
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    expected = [tokenizer.decode(alone(model, ids, 30), skip_special_tokens=True) for ids in prompts]
    assert generate(model, tokenizer, TEXTS, Decoding(30), batch_size=3) == expected


@pytest.mark.slow
def test_stories_golden_fact(stories):
    model = transformers.AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    golden = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert generate(model, tokenizer, [""], Decoding(60), batch_size=1)[0].startswith(golden)
    prompts = ["Once", "Tom and his dog went to the big park and", "", "One day, Lily"]
    texts = generate(model, tokenizer, prompts, Decoding(80), batch_size=4)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt).input_ids or [tokenizer.bos_token_id]
        assert text == tokenizer.decode(alone(model, ids, 80), skip_special_tokens=True)


def test_the_prompt_is_cut_off_by_tokens_not_by_text(stories):
    """A tokenizer may decode a prompt to another text than it read; the completion must lose nothing."""
    model = transformers.AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    prompt = "Once <s> upon a time, a big"
    ids = tokenizer(prompt).input_ids
    expected = tokenizer.decode(alone(model, ids, 12), skip_special_tokens=True)
    assert generate(model, tokenizer, [prompt], Decoding(12), batch_size=1) == [expected]
    whole = tokenizer.decode(ids + alone(model, ids, 12), skip_special_tokens=True)
    assert whole[len(prompt) :] != expected  # what cutting the text would give


def test_a_draw_depends_on_its_prompt_only(model, tokenizer):
    drawn = Decoding(25, temperature=1.0, top_p=0.9, top_k=40, seed=7)
    whole = generate(model, tokenizer, TEXTS, drawn, batch_size=6)
    assert generate(model, tokenizer, TEXTS, drawn, batch_size=1) == whole
    assert generate(model, tokenizer, TEXTS, drawn, batch_size=4) == whole
    part = generate(model, tokenizer, TEXTS[3:], drawn, batch_size=2, indices=[3, 4, 5])
    assert part == whole[3:]
    twice = generate(model, tokenizer, ["Hello", "Hello"], drawn, batch_size=2)
    assert twice[0] == whole[0] != twice[1]
    assert generate(model, tokenizer, TEXTS, replace(drawn, seed=8), batch_size=6) != whole
    assert generate(model, tokenizer, TEXTS, drawn, batch_size=6, sample=1) != whole


def test_finished_rows_leave_the_batch(model, tokenizer, monkeypatch):
    expected = generate(model, tokenizer, TEXTS, STOPPED, batch_size=6)
    assert len(set(map(len, expected))) > 2
    widths, forward = [], model.forward

    @functools.wraps(forward)
    def spy(input_ids, **rest):
        widths.append(len(input_ids))
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", spy)
    assert generate(model, tokenizer, TEXTS, STOPPED, batch_size=6) == expected
    assert widths[0] == 6 > widths[-1]
    assert widths == sorted(widths, reverse=True)
    monkeypatch.setattr(generation, "can_drop_rows", lambda cache: False)  # they stay, and nobody sees them
    widths.clear()
    assert generate(model, tokenizer, TEXTS, STOPPED, batch_size=6) == expected
    assert set(widths) == {6}


def test_a_model_without_cache(model, tokenizer, monkeypatch):
    expected = generate(model, tokenizer, TEXTS, STOPPED, batch_size=6)
    forward = model.forward

    def forgetful(input_ids, attention_mask, position_ids, past_key_values=None, use_cache=None):
        assert past_key_values is None
        return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)

    monkeypatch.setattr(model, "forward", forgetful)
    assert generate(model, tokenizer, TEXTS, STOPPED, batch_size=6) == expected


def test_stop_texts_end_a_completion(model, tokenizer):
    free = generate(model, tokenizer, TEXTS, Decoding(40), batch_size=3)
    stop = (free[0][10:13], free[1][20:22], "never seen")
    stopped = generate(model, tokenizer, TEXTS, Decoding(40, stop=stop), batch_size=3)
    for text, whole in zip(stopped, free, strict=True):
        ends = [whole.find(word) for word in stop if word in whole]
        assert text == whole[: min(ends, default=len(whole))]
    assert len(stopped[0]) <= 10


def test_context_is_never_exceeded(tokenizer):
    """GPT-2's position table has 64 rows: one step beyond is an index error."""
    model = tiny.make("gpt2").eval()
    model.generation_config.eos_token_id = None
    long, short = [5] * 60, [6, 7]
    assert prompt_bound(64, 50) == 32
    assert prompt_bound(64, 10) == 54
    assert prompt_bound(64, 10, 20) == 20
    seen = []
    forward = model.forward

    @functools.wraps(forward)
    def spy(**inputs):
        seen.append(int(inputs["position_ids"].max()))
        return forward(**inputs)

    model.forward = spy
    texts = generate(model, tokenizer, [long, short], Decoding(50), batch_size=2)
    assert max(seen) == 62  # the token after it ends the completion and is never read
    assert len(tokenizer(texts[0]).input_ids) <= 32
    # alone, the long prompt keeps its last 32 tokens and gets the other 32 positions
    assert generate(model, tokenizer, [long], Decoding(50), batch_size=1) == [texts[0]]
    assert generate(model, tokenizer, [long[-32:]], Decoding(50), batch_size=1) == [texts[0]]


def test_out_of_memory_halves_the_batch(model, tokenizer, monkeypatch):
    prompts = TEXTS * 3
    expected = generate(model, tokenizer, prompts, Decoding(12), batch_size=18)
    tried, done, forward = [], {}, model.forward

    @functools.wraps(forward)
    def small_memory(input_ids, past_key_values, **rest):
        if past_key_values is None:  # a batch begins
            tried.append(len(input_ids))
        if len(input_ids) > 5:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, past_key_values=past_key_values, **rest)

    monkeypatch.setattr(model, "forward", small_memory)
    assert (
        generate(model, tokenizer, prompts, Decoding(12), batch_size=18, on_done=done.setdefault) == expected
    )
    assert [done[i] for i in range(18)] == expected
    assert tried == [18, 9, 4, 4, 4, 4, 2]


def test_training_goes_on_afterwards(tokenizer):
    model = tiny.make("llama")
    generate(model, tokenizer, [[5, 6]], Decoding(3), batch_size=1)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_broken_weights_are_an_error(tokenizer):
    model = tiny.make("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        generate(model, tokenizer, [[5, 6]], Decoding(3), batch_size=1)


def test_alphabet_survives_the_tokenizer(tokenizer):
    assert tokenizer.decode(tokenizer(ALPHABET).input_ids) == ALPHABET
