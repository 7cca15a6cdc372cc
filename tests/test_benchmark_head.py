"""What benchmarks/head.py compares: contestants that compute the same, and a small run."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import head


@pytest.mark.parametrize("trains", [True, False])
def test_contestants_compute_the_same(trains):
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(31, 8, requires_grad=trains)
    counted = torch.arange(5, 12)
    targets = torch.randint(0, 31, (7,))
    wanted = [hidden, weight] if trains else [hidden]
    found = {}
    for name, contestant in head.CONTESTANTS.items():
        logps = contestant(hidden, weight, targets, counted)
        found[name] = [logps, *torch.autograd.grad(logps.sum(), wanted)]
    for values in found.values():
        for a, b in zip(values, found["inside"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "peaks", [[], pytest.param(["--peaks", "--contestants", "inside"], marks=pytest.mark.slow)]
)
def test_a_small_run(monkeypatch, capsys, peaks):
    options = ["--tokens", "8", "--words", "40", "--width", "4", "--rounds", "1", *peaks]
    monkeypatch.setattr(sys, "argv", ["head", *options])
    head.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("head")] == [
        f"head {how}, {which} tokens count"
        for how in ("frozen", "trained")
        for which in ("all", "half of the")
    ]
    rows = [line.split() for line in lines if line.split()[:1] == ["inside"]]
    assert len(rows) == 4 and all(row[2] == "1.00" for row in rows)
