"""Log-likelihoods: contexts read once or with every continuation, and memory running out in a batch."""

from __future__ import annotations

import inspect

import pytest
import torch

import lota.evaluate.loglik
from lota.evaluate.batching import can_drop_rows
from lota.evaluate.loglik import logliks
from tests.chars import char_model
from tests.tiny import make


def test_running_out_of_memory_within_a_batch_changes_no_value(monkeypatch):
    """The batch that failed is run again whole, and nothing of it has been reported before."""
    model = char_model()
    requests = [([3 + i], [4 + i, 5]) for i in range(8)]
    expected = logliks(model, requests, batch_size=8)
    reported, calls, sum_of = [], [], lota.evaluate.loglik._sum_of

    def failing_once(logits, continuation):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory left")
        return sum_of(logits, continuation)

    monkeypatch.setattr(lota.evaluate.loglik, "_sum_of", failing_once)
    again = logliks(model, requests, batch_size=8, on_done=lambda i, value: reported.append(i))
    assert again == pytest.approx(expected)
    assert sorted(reported) == list(range(8))


def choices() -> list[tuple[list[int], list[int]]]:
    """Six contexts of 5 to 20 tokens with 2 to 4 continuations of 1 to 5 tokens each, shuffled."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 60, (n,), generator=generator).tolist()

    requests = [
        (context, draw(1 + (i + k) % 5))
        for i in range(6)
        for context in [draw(5 + 3 * i)]
        for k in range(2 + i % 3)
    ]
    return [requests[i] for i in torch.randperm(len(requests), generator=generator)]


def tokens_read(model, monkeypatch) -> list[int]:
    """Number of tokens of every forward pass from now on."""
    seen, forward = [], model.forward

    def watched(input_ids=None, **given):
        seen.append(input_ids.numel())
        return forward(input_ids=input_ids, **given)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", watched)
    return seen


def one_by_one(model, requests) -> list[float]:
    """Without padding, batches or caches."""
    found = []
    with torch.no_grad():
        for context, after in requests:
            scores = model(input_ids=torch.tensor([context + after])).logits[0].log_softmax(-1)
            at = torch.arange(len(context) - 1, len(context) + len(after) - 1)
            found.append(scores[at, torch.tensor(after)].sum().item())
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("batch_size", [3, 64])  # 3 cuts a context's continuations apart
def test_a_context_is_read_once_for_all_its_continuations(architecture, batch_size, monkeypatch):
    model, requests = make(architecture).eval(), choices()
    expected = one_by_one(model, requests)
    seen = tokens_read(model, monkeypatch)
    torch.testing.assert_close(logliks(model, requests, batch_size=batch_size), expected, rtol=0, atol=1e-5)
    shared, seen[:] = sum(seen), []
    monkeypatch.setattr(lota.evaluate.loglik, "WORTH_SHARING", 2.0)  # never
    torch.testing.assert_close(logliks(model, requests, batch_size=batch_size), expected, rtol=0, atol=1e-5)
    assert shared < 0.8 * sum(seen)


def test_a_cache_that_cannot_be_shared_is_not(monkeypatch):
    model, requests = make("llama").eval(), choices()
    expected = one_by_one(model, requests)
    asked = []
    monkeypatch.setattr(
        lota.evaluate.loglik, "can_drop_rows", lambda cache: asked.append(can_drop_rows(cache)) or False
    )
    torch.testing.assert_close(logliks(model, requests, batch_size=8), expected, rtol=0, atol=1e-5)
    assert asked == [True]  # and is not asked again in later batches
