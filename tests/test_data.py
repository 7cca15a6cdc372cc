"""Encoding, truncation, collation and the order of batches."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lota.config import Config
from lota.data import batches
from lota.data.batches import (
    IGNORED,
    Encoded,
    Example,
    Prompt,
    collate,
    cut_text,
    encode,
    epoch_batches,
    fraction_of,
    seeded_sample,
)


@pytest.fixture(params=[False, True], ids=["plain", "bos"])
def tokenizer(request):
    """A word-level tokenizer: word wN has id N; with `bos` it puts <s> in front and </s> behind."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 200)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if request.param:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def bos(tokenizer) -> list[int]:
    return [1] if tokenizer("w3").input_ids[0] == 1 else []


def test_short_example(tokenizer):
    got = encode(tokenizer, Example(Prompt(words(3, 4, 5)), words(6, 7)), max_length=20, max_prompt_length=10)
    assert got.input_ids == [*bos(tokenizer), 3, 4, 5, 6, 7, 2]
    assert got.prompt_length == 3 + len(bos(tokenizer))


@pytest.mark.parametrize("keep_end", [False, True])
def test_long_prompt_keeps_its_closing_words(tokenizer, keep_end):
    prompt = words(*range(3, 23)) + " " + words(100, 101)
    example = Example(Prompt(prompt, " " + words(100, 101), keep_end), words(150, 151))
    got = encode(tokenizer, example, max_length=15, max_prompt_length=8)
    n = 8 - 2 - len(bos(tokenizer))
    body = list(range(3, 23))[-n:] if keep_end else list(range(3, 23))[:n]
    assert got.input_ids == [*bos(tokenizer), *body, 100, 101, 150, 151, 2]
    assert got.prompt_length == 8


def test_prompt_is_cut_only_when_the_whole_is_too_long(tokenizer):
    prompt = words(*range(3, 15))
    example = Example(Prompt(prompt), words(50))
    whole = encode(tokenizer, example, max_length=20, max_prompt_length=4)
    assert whole.prompt_length == 12 + len(bos(tokenizer))
    assert encode(tokenizer, example, max_length=12, max_prompt_length=4).prompt_length == 4


def test_response_is_cut_last_and_then_has_no_end(tokenizer):
    example = Example(Prompt(words(3, 4, 5, 6, 7, 8)), words(*range(50, 70)))
    got = encode(tokenizer, example, max_length=10, max_prompt_length=4)
    assert len(got) == 10
    assert got.input_ids[4:] == list(range(50, 56))


@pytest.mark.parametrize("at_most", [5, 1000])
def test_what_is_cut_is_counted(tokenizer, monkeypatch, at_most):
    """Every prompt and response that encoding shortens, also of a preference's rejected answer."""
    monkeypatch.setattr(batches, "COUNTED", at_most)
    fits = Example(Prompt(words(3, 4)), words(5))
    prompt = Example(Prompt(words(*range(3, 30))), words(50, 51))
    response = Example(Prompt(words(3, 4, 5)), words(*range(50, 80)))
    rejected = Example(Prompt(words(3, 4, 5)), words(50), words(*range(50, 80)))
    both = Example(Prompt(words(*range(3, 30))), words(*range(50, 80)))
    settings = Config(max_length=20, max_prompt_length=10)
    examples = [fits] * 3 + [prompt, response, rejected, both] * 2
    found = cut_text(settings, tokenizer, examples)
    if at_most == 1000:
        assert found.startswith("4 prompts and 6 responses of 11 examples are cut (max_length=20")
    else:
        assert found.startswith("about ")
    assert cut_text(settings, tokenizer, [fits] * 3) == ""
    assert cut_text(Config(max_length=200, max_prompt_length=100), tokenizer, examples) == ""


def test_closing_longer_than_the_limit_keeps_its_end(tokenizer):
    got = Prompt(words(3, 4, 5, 6), words(4, 5, 6)).ids(tokenizer, 2)
    assert got == [5, 6]


def test_closing_words_are_the_prompts_own_tokens():
    """A tokenizer that marks the start of every text would put a mark before closing words cut out alone."""
    vocab = {"<unk>": 0, "</s>": 2, "\u2581": 3, "\n": 4, "A:": 5, **{f"\u2581w{i}": i for i in range(6, 60)}}
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocab], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    prompt = words(*range(6, 26)) + "\nA:"
    whole = tokenizer(prompt, add_special_tokens=False).input_ids
    alone = tokenizer("\nA:", add_special_tokens=False).input_ids
    assert whole[-2:] == alone[-2:] and len(alone) == 3
    cut = Prompt(prompt, "\nA:").ids(tokenizer, 10)
    assert cut == whole[:8] + whole[-2:]


def test_training_and_generation_read_the_same_prompt(tokenizer):
    example = Example(Prompt(words(*range(3, 40)), " " + words(38, 39)), words(50, 51))
    got = encode(tokenizer, example, max_length=20, max_prompt_length=10)
    assert got.input_ids[: got.prompt_length] == example.prompt.ids(tokenizer, 10)


def test_collate_pads_on_the_right_and_hides_prompts():
    batch = collate([Encoded([5, 6, 7, 2], 2), Encoded([8, 2], 1)], pad_token_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [8, 2, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 2], [IGNORED, 2, IGNORED, IGNORED]]
    assert batch.n_tokens == 6
    assert len(batch) == 2


def test_a_padding_token_that_is_also_the_end_token_still_counts_as_the_end():
    batch = collate([Encoded([5, 6, 2], 1), Encoded([8, 2], 1)], pad_token_id=2)
    assert batch.labels.tolist() == [[IGNORED, 6, 2], [IGNORED, 2, IGNORED]]


@pytest.mark.parametrize(
    "lengths", [None, [((i * 37) % 101) + 1 for i in range(103)]], ids=["any", "by length"]
)
def test_every_row_once_per_epoch_in_a_seeded_order(lengths):
    options = {"seed": 3, "lengths": lengths}
    first = epoch_batches(103, 8, epoch=0, **options)
    assert sorted(i for batch in first for i in batch) == list(range(103))
    assert sorted(len(b) for b in first) == [7] + [8] * 12
    assert first == epoch_batches(103, 8, epoch=0, **options)
    assert first != epoch_batches(103, 8, epoch=1, **options)
    assert first != epoch_batches(103, 8, epoch=0, seed=4, lengths=lengths)


def test_length_groups_waste_less_padding():
    lengths = [((i * 37) % 101) + 1 for i in range(400)]

    def padding(batches):
        return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)

    grouped = epoch_batches(400, 8, seed=0, epoch=0, lengths=lengths)
    assert padding(grouped) < 0.2 * padding(epoch_batches(400, 8, seed=0, epoch=0))


def test_samples_are_seeded_and_not_the_first_rows():
    items = list(range(1000))
    sample = seeded_sample(items, 50, seed=0)
    assert sample == sorted(sample)
    assert len(set(sample)) == 50
    assert sample == seeded_sample(items, 50, seed=0)
    assert sample != seeded_sample(items, 50, seed=1)
    assert max(sample) > 500
    assert seeded_sample(items, 5000, seed=0) == items
    assert len(fraction_of(items, 0.1, seed=0)) == 100
    assert len(fraction_of(items, 1e-9, seed=0)) == 1


def test_labels_move_to_the_device_with_the_batch():
    batch = collate([Encoded([5, 2], 1)], 0).to(torch.device("meta"))
    assert batch.labels.device.type == "meta"
