"""Batches that do not fit in memory, and padding."""

from __future__ import annotations

import pytest
import torch

from lota.evaluate.batching import in_batches, padded


@pytest.mark.parametrize(
    "words", [(), ("CUDA out of memory.\nTried to allocate",)]
)  # none: torch.OutOfMemoryError()
def test_a_batch_too_large_is_halved(words, caplog):
    done = []

    def run(rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError(*words)
        done.append(rows)

    in_batches(list(range(7)), 6, run)
    assert [row for rows in done for row in rows] == list(range(7))
    assert max(map(len, done)) <= 2
    assert "out of memory with 6 sequences in a batch, going on with 3" in caplog.text


def test_one_sequence_too_large_and_other_errors_are_raised():
    def run(rows):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        in_batches([1, 2], 2, run)

    def broken(rows):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        in_batches([1, 2], 2, broken)


def test_padding_on_either_side():
    ids, mask = padded([[5, 6, 7], [8]], torch.device("cpu"), left=True)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = padded([[5, 6, 7], []], torch.device("cpu"), left=False)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0]]
