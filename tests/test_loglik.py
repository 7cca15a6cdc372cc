"""Log-likelihoods when memory runs out in the midst of a batch."""

from __future__ import annotations

import pytest
import torch

import lota.loglik
from lota.loglik import logliks
from tests.chars import char_model


def test_running_out_of_memory_within_a_batch_changes_no_value(monkeypatch):
    """The batch that failed is run again whole, and nothing of it has been reported before."""
    model = char_model()
    requests = [([3 + i], [4 + i, 5]) for i in range(8)]
    expected = logliks(model, requests, batch_size=8)
    reported, calls, sum_of = [], [], lota.loglik._sum_of

    def failing_once(logits, continuation):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory left")
        return sum_of(logits, continuation)

    monkeypatch.setattr(lota.loglik, "_sum_of", failing_once)
    again = logliks(model, requests, batch_size=8, on_done=lambda i, value: reported.append(i))
    assert again == pytest.approx(expected)
    assert sorted(reported) == list(range(8))
