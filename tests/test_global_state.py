"""An optimizer's state on disk in global coordinates: bit for bit, refused by others, run by nobody."""

from __future__ import annotations

import pickle

import pytest
import tiny
import torch

from lota.distributed.global_state import load_state, save_state, stretches
from lota.distributed.processes import ALONE
from lota.optim.optimizers import MaskedAdamW, MaskedRMSprop


def trained(kind=MaskedRMSprop, mask=None, **settings):
    """(optimizer after some steps, where its entries stand)."""
    model = tiny.make("mixtral", dtype=torch.bfloat16)
    optimizer = kind(
        model, tiny.line_mask(model, "block") if mask is None else mask(model), lr=1e-2, **settings
    )
    tiny.learn(model, optimizer)
    return optimizer, stretches(optimizer, ALONE, [0])


@pytest.mark.parametrize("mask", [None, tiny.random_mask])
def test_state_is_read_as_it_was_written(mask, tmp_path):
    one, places = trained(mask=mask, momentum=0.5)
    rest = save_state(one, places, tmp_path / "state", ALONE)
    model = tiny.make("mixtral", dtype=torch.bfloat16)
    mask = tiny.line_mask(model, "block") if mask is None else mask(model)
    two = MaskedRMSprop(model, mask, lr=1.0, momentum=0.5)
    load_state(two, rest, places, tmp_path / "state", ALONE)
    assert tiny.same_state(one.state_dict(), two.state_dict())
    assert two.param_groups[0]["lr"] == 1e-2


def test_positions_are_those_of_the_whole_parameter(tmp_path):
    """What is stored is in their order, also of blocks, whose values stand otherwise in memory."""
    optimizer, places = trained()
    save_state(optimizer, places, tmp_path / "state", ALONE)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "state", tmp_path / "whole.pt")
    stored = torch.load(tmp_path / "whole.pt", weights_only=True)
    for p, name in optimizer.names.items():
        whole = torch.zeros(p.numel())
        whole[optimizer.kept[p].positions().long()] = optimizer.state[p]["master"]
        kept = optimizer.kept[p].positions().long().sort().values
        assert torch.equal(stored[f"{name}/master"], whole[kept])


@pytest.mark.parametrize(
    ("kind", "mask", "message"),
    [
        (MaskedAdamW, None, "is missing: it belongs to another update rule"),
        (MaskedRMSprop, tiny.random_mask, "it belongs to another mask|of other parameters"),
    ],
)
def test_state_of_another_optimizer_is_refused(kind, mask, message, tmp_path):
    one, places = trained()
    rest = save_state(one, places, tmp_path / "state", ALONE)
    other, own = trained(kind, mask)
    with pytest.raises(ValueError, match=message):
        load_state(other, rest, own, tmp_path / "state", ALONE)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_list_of_contents_that_would_run_code_is_refused(tmp_path, capsys):
    optimizer, places = trained()
    rest = save_state(optimizer, places, tmp_path / "state", ALONE)
    (tmp_path / "state" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"is damaged \(it names builtins.print"):
        load_state(optimizer, rest, places, tmp_path / "state", ALONE)
    assert "run" not in capsys.readouterr().out
