"""Step time and peak memory of preference tuning under a mask against SFT on the same number of sequences.

    python -m benchmarks.preference         # CPU, 124M-parameter Llama shape, 4 pairs = 8 rows of 128 tokens

SFT reads --batch rows; the others read them as half as many pairs. The reference is the policy with its kept
entries swapped, a second model, or log-probabilities computed before. Method as in benchmarks/step.py.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

import lota
from benchmarks import step as steps
from lota.data.batches import Batch
from lota.train.losses import ChosenRejected, preference_loss, response_logps, sft_loss
from lota.train.reference import starting_values, swapped

Reference = Callable[[Batch], Tensor]


def plain(model: torch.nn.Module, rows: Batch) -> Tensor:
    return response_logps(model, rows, contextlib.nullcontext())[0]


def by_swapping(args, model, optimizer) -> Reference:
    starts = starting_values(optimizer)

    def reference(rows: Batch) -> Tensor:
        with torch.no_grad(), swapped(optimizer, starts):
            return plain(model, rows)

    return reference


def by_second_model(args, model, optimizer) -> Reference:
    second = steps.build_model(args).requires_grad_(False)
    return torch.no_grad()(lambda rows: plain(second, rows))


def computed_before(args, model, optimizer) -> Reference:
    return lambda rows: torch.full((len(rows),), -1000.0, device=rows.input_ids.device)


def step_of(reference_of: Callable[..., Reference] | None) -> Callable[[argparse.Namespace], steps.Step]:
    """A step of SFT, or of DPO with that reference."""

    def make(args: argparse.Namespace) -> steps.Step:
        model = steps.build_model(args)
        mask = steps.random_mask(model, args.sparsity)
        optimizer = lota.MaskedRMSprop(model, mask, lr=1e-5, grad_norm_strategy="even", max_grad_norm=10.0)
        lota.fuse_in_backward(optimizer)
        reference = None if reference_of is None else reference_of(args, model, optimizer)

        def step(ids: Tensor) -> None:
            rows = Batch(ids, torch.ones_like(ids), ids, ids.numel())
            if reference is None:
                logps, counted = response_logps(model, rows, contextlib.nullcontext())
                losses = sft_loss(logps, counted)
            else:
                of_reference = ChosenRejected.split(reference(rows))
                logps, counted = response_logps(model, rows, contextlib.nullcontext())
                losses = preference_loss(
                    ChosenRejected.split(logps), of_reference, ChosenRejected.split(counted), beta=0.1
                )
            losses.mean().backward()
            optimizer.step()

        return step

    return make


CONTESTANTS: steps.Contestants = {
    "sft": step_of(None),
    "dpo_swap": step_of(by_swapping),
    "dpo_model": step_of(by_second_model),
    "dpo_precomputed": step_of(computed_before),
}


if __name__ == "__main__":
    steps.main(
        CONTESTANTS,
        list(CONTESTANTS),
        batch=8,
        description=__doc__,
        module="benchmarks.preference",
        references=["sft"],
    )
