"""A masked optimizer that waits for the gradients of others: here of a twin in the same process."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import lota

IDS = torch.arange(48).view(4, 12) * 7 % tiny.VOCAB


class Twin:
    """Peers of two optimizers with the same names; `halves` has what either has begun."""

    def __init__(self, optimizer, halves: list[dict], parts: bool = False, factor: float = 1.0):
        self.optimizer, self.halves, self.parts, self.factor = optimizer, halves, parts, factor
        self.own: dict = {}
        self.completed: list[str] = []
        halves.append(self.own)

    def begin(self, p, grad):
        self.own[self.optimizer.names[p]] = grad.clone()
        return self.own[self.optimizer.names[p]]

    def complete(self, p):
        self.completed.append(self.optimizer.names[p])

    def gradients(self, grads):
        assert all(grads[p].data_ptr() == self.own[self.optimizer.names[p]].data_ptr() for p in grads)
        return {p: sum(half[name] for half in self.halves) for p, name in self.optimizer.names.items()}

    def squares(self, squares):
        assert squares.shape == (len(self.optimizer.names),)
        return squares * self.factor


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss * len(ids) / 4


def made(model, mask, accumulation=1, **settings):
    optimizer = lota.MaskedSGD(model, mask, lr=0.1, momentum=0.9, **settings)
    lota.fuse_in_backward(optimizer, accumulation)
    return optimizer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("strategy", ["even", "proportional", "global", "none"])
def test_updates_are_those_of_all_gradients_together(strategy, accumulation):
    clip = {"grad_norm_strategy": strategy, "max_grad_norm": 0.05}
    whole = tiny.make("llama")
    mask = tiny.random_mask(whole)
    alone = made(whole, mask, **clip)
    models = [tiny.make("llama"), tiny.make("llama")]
    optimizers = [made(model, mask, accumulation, **clip) for model in models]
    halves: list[dict] = []
    for step in range(3):
        loss(whole, (IDS + step) % tiny.VOCAB).backward()
        alone.step()
        halves.clear()
        for n, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.peers = Twin(optimizer, halves)
            before = [p.clone() for p in optimizer.names]
            for part in ((IDS + step) % tiny.VOCAB)[2 * n : 2 * n + 2].chunk(accumulation):
                loss(model, part).backward()
            assert all(torch.equal(p, old) for p, old in zip(optimizer.names, before, strict=True))
            assert sorted(optimizer.peers.completed) == sorted(optimizer.names.values())
        for optimizer in optimizers:
            optimizer.step()
            assert math.isclose(optimizer.grad_norm, alone.grad_norm, rel_tol=1e-5)
    for model in models:
        for (name, p), (_, q) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6, msg=name)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("strategy", ["even", "proportional", "global"])
def test_norms_are_those_of_all_parts(strategy):
    """Of tensors of which this process has a part: the others' make each norm twice as large."""
    model = tiny.make("llama")
    mask, start = tiny.random_mask(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = lota.MaskedSGD(model, mask, lr=1.0, grad_norm_strategy=strategy, max_grad_norm=0.05)
    lota.fuse_in_backward(optimizer)
    twin = optimizer.peers = Twin(optimizer, [], parts=True, factor=4.0)
    loss(model, IDS).backward()
    grads = {name: grad.clone() for name, grad in twin.own.items()}
    optimizer.step()
    norms = {name: 2 * grad.norm() for name, grad in grads.items()}
    together = torch.stack(list(norms.values())).norm()
    assert math.isclose(optimizer.grad_norm, together, rel_tol=1e-5)
    n = len(grads)
    for p, name in optimizer.names.items():
        norm = together if strategy == "global" else norms[name]
        limit = 0.05 / math.sqrt(n) if strategy == "proportional" else 0.05
        moved = optimizer.kept[p].gather(start[name] - p.detach())
        expected = grads[name] * min(1.0, limit / (norm + 1e-6))
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6, msg=name)
