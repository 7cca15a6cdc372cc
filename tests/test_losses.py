"""Losses against log-softmax written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lota.train.losses
from lota.data.batches import IGNORED
from lota.train.losses import sequence_logps, sft_loss


def test_sequence_logps_against_a_loop():
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 11)
    labels = torch.randint(0, 11, (3, 6))
    labels[0, :3] = IGNORED
    labels[1, 4:] = IGNORED
    labels[2, :] = IGNORED
    logps, counts = sequence_logps(logits, labels)
    for row in range(3):
        total, n = 0.0, 0
        for t in range(5):
            if labels[row, t + 1] != IGNORED:
                total += torch.log_softmax(logits[row, t].double(), 0)[labels[row, t + 1]].item()
                n += 1
        torch.testing.assert_close(logps[row].item(), total, rtol=1e-5, atol=1e-6)
        assert counts[row] == n


def test_bf16_logits_are_summed_in_fp32():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 300, 50), torch.randint(0, 50, (2, 300))
    narrow = sequence_logps(logits.bfloat16(), labels)[0]
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, sequence_logps(logits.bfloat16().float(), labels)[0])


def test_sft_loss_is_the_sum_unless_averaged():
    logps, counts = torch.tensor([-6.0, -4.0, 0.0]), torch.tensor([3.0, 1.0, 0.0])
    assert sft_loss(logps, counts).tolist() == [6.0, 4.0, 0.0]
    assert sft_loss(logps, counts, average_log_prob=True).tolist() == [2.0, 4.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_gradient_of_the_chunked_loss(monkeypatch, dtype, chunk):
    """Against autograd through cross_entropy in fp64, with chunks of one row, of a few, and of all."""
    monkeypatch.setattr(lota.train.losses, "CHUNK_ENTRIES", chunk)
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 13).to(dtype).requires_grad_()
    labels = torch.randint(0, 13, (3, 7))
    labels[0, :4] = IGNORED
    weights = torch.tensor([0.5, -2.0, 3.0])
    (sequence_logps(logits, labels)[0] * weights).sum().backward()
    exact = logits.detach().double().requires_grad_()
    nll = F.cross_entropy(
        exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    (-nll.view(3, 6).sum(1) * weights).sum().backward()
    assert logits.grad.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(logits.grad.double(), exact.grad, **tolerance)
    assert logits.grad[0, :3].abs().max() == 0


def test_no_counted_token_gives_zero():
    logits = torch.randn(2, 4, 5, requires_grad=True)
    logps, counts = sequence_logps(logits, torch.full((2, 4), IGNORED))
    logps.sum().backward()
    assert logps.tolist() == [0.0, 0.0]
    assert counts.tolist() == [0.0, 0.0]
    assert logits.grad.abs().max() == 0
