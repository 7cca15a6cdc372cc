"""Results on disk: what is continued, what is set aside, and the keys that decide."""

from __future__ import annotations

import pytest
import torch

from lota.evaluate.journal import Journal
from lota.models.hashing import model_key, weights_key
from lota.storage import content_key
from tests.chars import char_model, char_tokenizer


@pytest.mark.parametrize("content", ["junk", "junk\n", '{"key": 5}\n', '{"index": 1, "record": 2}\n'])
def test_a_damaged_journal_is_set_aside(tmp_path, content: str):
    path = tmp_path / "a.journal"
    path.write_text(content)
    with Journal(path, {"seed": 1}) as journal:
        assert journal.records == {}
        journal.add(3, "x")
    assert (tmp_path / "a.1.journal").read_text() == content
    with Journal(path, {"seed": 1}) as journal:
        assert journal.records == {3: "x"}


def test_results_of_unknown_origin_are_not_overwritten(tmp_path):
    old = tmp_path / "a.jsonl"
    old.write_text("precious")
    with Journal(tmp_path / "a.journal", {}, made_from_it=[old]):
        pass
    assert (tmp_path / "a.1.jsonl").read_text() == "precious"


def test_keys_see_what_matters():
    model, tokenizer = char_model(), char_tokenizer()
    assert weights_key(model) == weights_key(char_model())
    assert weights_key(model) != weights_key(char_model(seed=1))
    assert weights_key(model) != weights_key(char_model().to(torch.bfloat16))
    before = model_key(model, tokenizer)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}
    assert {name for name, value in model_key(model, tokenizer).items() if value != before[name]} == {
        "config"
    }
    tokenizer.add_tokens(["new"])
    assert model_key(model, tokenizer)["tokenizer"] != before["tokenizer"]
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1}) != content_key({"a": 2, "b": 1})
