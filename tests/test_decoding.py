"""The choice of a token against draws made in plain Python, and stop texts against decoding at every step."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from lota.evaluate.decoding import Decoding, StopCheck, choose, uniforms
from tests.conftest import ROOT


def test_draws_have_the_distribution_of_the_scores():
    """Frequencies of 20,000 draws against softmax computed here, within 5 standard errors."""
    torch.manual_seed(0)
    logits = torch.randn(1, 12)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8}):
        decoding = Decoding(1, temperature=0.7, **settings)
        n = 20_000
        uniform = torch.rand(n, dtype=torch.float64)
        counts = torch.bincount(choose(logits.repeat(n, 1), uniform, decoding), minlength=12)
        weights = (logits[0].double() / 0.7).exp()
        order = weights.argsort(descending=True).tolist()
        kept, mass = order[: settings.get("top_k", 12)], 0.0
        nucleus = []
        for token in kept:
            if mass >= settings.get("top_p", 1.0) * weights[kept].sum():
                break
            nucleus.append(token)
            mass += float(weights[token])
        expected = torch.zeros(12, dtype=torch.float64)
        expected[nucleus] = weights[nucleus] / weights[nucleus].sum()
        error = (expected * (1 - expected) / n).sqrt()
        assert ((counts / n - expected).abs() <= 5 * error + 1e-12).all()


def by_sorting(logits: torch.Tensor, uniform: torch.Tensor, decoding: Decoding) -> list[int]:
    """The draw of each row, in Python: tokens sorted by probability, equal ones in their own order."""
    drawn = []
    for row, u in zip(logits.double().tolist(), uniform.tolist(), strict=True):
        weights = [math.exp(score / decoding.temperature) for score in row]
        order = sorted(range(len(row)), key=lambda token: -weights[token])[: decoding.top_k or None]
        bound = decoding.top_p * math.fsum(weights[token] for token in order)
        kept, mass = [], 0.0
        for token in order:
            if mass < bound:
                kept.append(token)
            mass += weights[token]
        goal, reached = u * math.fsum(weights[token] for token in kept), 0.0
        for token in sorted(kept):
            reached += weights[token]
            if reached > goal:
                break
        drawn.append(token)
    return drawn


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 50, "top_p": 0.9}, {"top_k": 7}, {"top_p": 0.5}, {"top_p": 0.97}, {"top_k": 9999}],
)
def test_draws_among_the_likeliest_tokens(settings: dict):
    """Against sorting, for flat scores (all of the vocabulary is needed), steep ones, many equal ones."""
    torch.manual_seed(1)
    flat, steep = torch.randn(20, 3000) / 9, torch.randn(20, 3000) * 3
    logits = torch.cat([flat, steep, steep.round()])
    decoding = Decoding(1, temperature=0.9, **settings)
    uniform = torch.rand(60, dtype=torch.float64)
    assert choose(logits, uniform, decoding).tolist() == by_sorting(logits, uniform, decoding)


@pytest.mark.parametrize("word", [".\n", "é", " the", "e ", "l", "Lily. She", "\u20ac\u20ac", "<s>"])
@pytest.mark.parametrize("folder", ["assets/tiny-llama", "../shared/models/stories260K"])
def test_stop_texts_are_found_at_the_token_that_completes_them(word: str, folder: str):
    """As decoding after every token would find them; tokens of single bytes and of markup among them."""
    path = ROOT / folder
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    encoded = [id for text in (word, "é\u20ac") for id in tokenizer(text).input_ids]
    torch.manual_seed(2)
    found = 0
    for _ in range(30):
        tokens = torch.randint(0, len(tokenizer), (60,)).tolist()
        at = int(torch.randint(0, 50, ()))
        tokens[at:at] = encoded
        check = StopCheck(tokenizer, (word, "never seen"))
        reached = [check.reached(tokens[: n + 1]) for n in range(len(tokens))]
        wholes = [tokenizer.decode(tokens[: n + 1], clean_up_tokenization_spaces=False) for n in range(60)]
        first = next((n for n, whole in enumerate(wholes) if word in whole), None)
        assert (reached.index(True) if True in reached[:60] else None) == first
        found += first is not None
    assert found > 5


def test_numbers_drawn_are_the_prompts_own():
    decoding = Decoding(8, temperature=1.0, seed=3)
    same = uniforms(decoding, 4, 0)
    assert torch.equal(same, uniforms(decoding, 4, 0))
    others = [uniforms(decoding, 5, 0), uniforms(decoding, 4, 1), uniforms(Decoding(8, 1.0, seed=4), 3, 0)]
    assert all(not torch.equal(same, other) for other in others)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_bad_settings_are_refused(settings: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Decoding(**{"max_new_tokens": 5} | settings)
