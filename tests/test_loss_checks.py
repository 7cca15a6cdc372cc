"""Settings of one loss given to another, and settings of a reference that nothing reads."""

from __future__ import annotations

import re

import pytest
from test_config import settings

from lota.config_checks import LOSS_KEYS, unused_settings


def test_each_loss_has_its_own_keys_with_their_defaults():
    for name, keys in LOSS_KEYS.items():
        loss = settings(f"loss={name}").loss
        assert {key: getattr(loss, key) for key in keys} == keys
        others = {key for other in LOSS_KEYS.values() for key in other} - set(keys)
        assert all(getattr(loss, key) is None for key in others)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("loss=dpo loss.average_log_prob=true", "loss.average_log_prob=True: a setting of loss=sft"),
        ("loss=dpo loss.average_log_prob=false", "loss.average_log_prob=False: a setting of loss=sft"),
        ("loss=sft loss.beta=0.1 loss.ipo=true", "loss.beta=0.1, loss.ipo=True: settings of loss=dpo"),
        ("loss.name=dpo", "choose loss=sft (loss=, not loss.name=)"),
        ("loss.name=dop", "loss.name=dop: choose one of sft, dpo; did you mean dpo?"),
        ("loss=dpo loss.beta=0", "loss.beta=0.0: must be a finite number above 0"),
        ("loss=dpo loss.beta=inf", "loss.beta=inf"),
        ("loss=dpo loss.sft_reg=-1", "loss.sft_reg=-1.0"),
        ("loss=dpo loss.robust_eps=0.5", "loss.robust_eps=0.5"),
        ("loss=dpo loss.robust_eps=0.1 loss.ipo=true", "loss.robust_eps=0.1 with loss.ipo=true"),
        (
            "loss=dpo loss.reference_free=true loss.importance_correction=true",
            "loss.importance_correction=true",
        ),
        ("loss=dpo model.reference=swapped", "model.reference=swapped: choose one of null, swap"),
        (
            "loss=dpo model.reference=swap model.reference_archive=a",
            "choose model.reference=model or precomputed",
        ),
    ],
)
def test_refused_with_the_remedy(overrides, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        settings(*overrides.split())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            "loss=sft model.reference=model model.reference_dtype=float32",
            ["model.reference", "model.reference_dtype"],
        ),
        ("loss=dpo loss.ipo_sum=true", ["loss.ipo_sum"]),
        ("loss=dpo loss.ipo_sum=true loss.ipo=true loss.beta=0.5", []),
        ("loss=dpo loss.reference_free=true model.reference=swap", ["model.reference"]),
        ("loss=dpo model.reference=swap model.reference_dtype=float32", ["model.reference_dtype"]),
        ("loss=dpo model.reference=model model.reference_dtype=float32", []),
        ("loss=dpo model.reference=precomputed model.reference_archive=a model.reference_dtype=float32", []),
    ],
)
def test_what_nothing_reads_is_told(overrides, told):
    lines = unused_settings(settings(*overrides.split()))
    assert sorted(line.split("=")[0] for line in lines) == told
