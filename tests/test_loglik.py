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
from tests.tolerance import assert_same, chain


def test_running_out_of_memory_within_a_batch_changes_no_value(monkeypatch):
    """The batch that failed is run again whole, and nothing of it has been reported before."""
    model = char_model()
    requests = [([3 + i], [4 + i, 5]) for i in range(8)]
    expected = logliks(model, requests, batch_size=8)
    reported, calls, sum_of = [], [], lota.evaluate.loglik._sum_of

    def failing_once(logps):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory left")
        return sum_of(logps)

    monkeypatch.setattr(lota.evaluate.loglik, "_sum_of", failing_once)
    again = logliks(model, requests, batch_size=8, on_done=lambda i, value: reported.append(i))
    assert_alike(model, again, expected)
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


def peaked(architecture: str):
    """A random model with scores of several nats: a flat one would say little about its log-likelihoods."""
    model = make(architecture).eval()
    model.get_output_embeddings().weight.data *= 20
    return model


def one_by_one(model, requests) -> list[float]:
    """Without padding, batches or caches."""
    found = []
    with torch.no_grad():
        for context, after in requests:
            scores = model(input_ids=torch.tensor([context + after])).logits[0].log_softmax(-1)
            at = torch.arange(len(context) - 1, len(context) + len(after) - 1)
            found.append(scores[at, torch.tensor(after)].sum().item())
    return found


def assert_alike(model, found: list[float], expected: list[float]) -> None:
    """To 2e-5 of a log-likelihood of 20 nats: the rounding of all sums before it, in fp32."""
    assert_same(torch.tensor(found), torch.tensor(expected), terms=chain(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("batch_size", [3, 64])  # 3 cuts a context's continuations apart
def test_a_context_is_read_once_for_all_its_continuations(architecture, batch_size, monkeypatch):
    model, requests = peaked(architecture), choices()
    expected = one_by_one(model, requests)
    seen = tokens_read(model, monkeypatch)
    assert_alike(model, logliks(model, requests, batch_size=batch_size), expected)
    shared, seen[:] = sum(seen), []
    monkeypatch.setattr(lota.evaluate.loglik, "WORTH_SHARING", 2.0)  # never
    assert_alike(model, logliks(model, requests, batch_size=batch_size), expected)
    assert shared < 0.8 * sum(seen)


def test_a_cache_that_cannot_be_shared_is_not(monkeypatch):
    model, requests = peaked("llama"), choices()
    expected = one_by_one(model, requests)
    asked = []
    monkeypatch.setattr(
        lota.evaluate.loglik, "can_drop_rows", lambda cache: asked.append(can_drop_rows(cache)) or False
    )
    assert_alike(model, logliks(model, requests, batch_size=8), expected)
    assert asked == [True]  # and is not asked again in later batches
