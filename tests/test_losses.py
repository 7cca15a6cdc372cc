"""Losses against their formulas written out, log-softmax in fp64, and TRL on the same batch and weights."""

from __future__ import annotations

import contextlib
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from chars import char_model, char_tokenizer
from tolerance import assert_same, chain, rounding

from lota.data.batches import IGNORED, Batch
from lota.train.losses import (
    ChosenRejected,
    dpo_loss,
    importance_weight,
    ipo_loss,
    log_ratios,
    preference_loss,
    response_logps,
    reward_sums,
    sft_loss,
)

POLICY = ChosenRejected(torch.tensor([-7.0, -3.5, -40.0]), torch.tensor([-9.0, -3.0, -20.0]))
REFERENCE = ChosenRejected(torch.tensor([-8.0, -3.0, -42.0]), torch.tensor([-8.5, -4.0, -21.5]))
LENGTHS = ChosenRejected(torch.tensor([4.0, 2.0, 10.0]), torch.tensor([5.0, 1.0, 8.0]))
ROWS = [
    {"prompt": "Human: hi there", "chosen": " good day to you", "rejected": " no"},
    {"prompt": "ab", "chosen": "x", "rejected": "a much longer answer"},
    {"prompt": "What is it?", "chosen": "It is a box.", "rejected": "It is a cat."},
    {"prompt": "Go on", "chosen": "!" * 30, "rejected": "?"},
]


class Fixed(torch.nn.Module):
    """A model whose logits are given: it has no head."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.asked = logits, {}

    def forward(self, **arguments):
        self.asked.update(arguments)
        return SimpleNamespace(logits=self.logits)


def response_logps_of(logits, labels):
    batch = Batch(labels.clamp(min=0), torch.ones_like(labels), labels, n_tokens=labels.numel())
    return response_logps(Fixed(logits), batch, contextlib.nullcontext())


def test_response_logps_against_a_loop():
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 11)
    labels = torch.randint(0, 11, (3, 6))
    labels[0, :3] = IGNORED
    labels[1, 4:] = IGNORED
    labels[2, :] = IGNORED
    logps, counts = response_logps_of(logits, labels)
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
    narrow = response_logps_of(logits.bfloat16(), labels)[0]
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, response_logps_of(logits.bfloat16().float(), labels)[0])


def test_sft_loss_is_the_sum_unless_averaged():
    logps, counts = torch.tensor([-6.0, -4.0, 0.0]), torch.tensor([3.0, 1.0, 0.0])
    assert sft_loss(logps, counts).tolist() == [6.0, 4.0, 0.0]
    assert sft_loss(logps, counts, average_log_prob=True).tolist() == [2.0, 4.0, 0.0]


# On preferences


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def written_out(
    i: int, b: float, *, r=0.0, weighed=False, ipo=False, ipo_sum=False, e=0.0, free=False
) -> float:
    """The i-th pair's loss in plain Python, from the formulas of the design."""
    w, lost = POLICY.chosen[i].item(), POLICY.rejected[i].item()
    ref_w, ref_l = (0.0, 0.0) if free else (REFERENCE.chosen[i].item(), REFERENCE.rejected[i].item())
    n_w, n_l = (1, 1) if ipo_sum else (LENGTHS.chosen[i].item(), LENGTHS.rejected[i].item())
    difference = (w - lost) - (ref_w - ref_l)
    if ipo:
        loss = ((w - ref_w) / n_w - (lost - ref_l) / n_l - 1 / (2 * b)) ** 2
    else:
        loss = -(1 - e) * math.log(sigmoid(b * difference)) - e * math.log(sigmoid(-b * difference))
    if weighed:
        loss *= math.exp(lost - ref_l)
    return loss - r * w


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({}, {}),
        ({"robust_eps": 0.2}, {"e": 0.2}),
        ({"sft_reg": 0.5}, {"r": 0.5}),
        ({"importance_correction": True}, {"weighed": True}),
        ({"ipo": True}, {"ipo": True}),
        ({"ipo": True, "ipo_sum": True}, {"ipo": True, "ipo_sum": True}),
        (
            {"importance_correction": True, "sft_reg": 2.0, "robust_eps": 0.1},
            {"weighed": True, "r": 2.0, "e": 0.1},
        ),
        ({"ipo": True, "importance_correction": True}, {"ipo": True, "weighed": True}),
    ],
)
def test_closed_forms(beta, settings, formula):
    found = preference_loss(POLICY, REFERENCE, LENGTHS, beta=beta, **settings)
    expected = [written_out(i, beta, **formula) for i in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ipo", [False, True])
def test_without_a_reference(ipo):
    found = preference_loss(POLICY, None, LENGTHS, beta=0.3, ipo=ipo, sft_reg=0.1)
    assert found.tolist() == pytest.approx([written_out(i, 0.3, free=True, ipo=ipo, r=0.1) for i in range(3)])


def test_conservative_dpo_has_its_minimum_where_the_labels_are_right_that_often():
    """The gradient of the margin is 0 at sigmoid(b D) = 1 - e, and of plain DPO nowhere."""
    margin = torch.tensor([math.log(0.8 / 0.2) / 0.5], requires_grad=True)
    zero = torch.zeros(1)
    dpo_loss(ChosenRejected(margin, zero), beta=0.5, robust_eps=0.2).sum().backward()
    assert margin.grad.abs().item() < 1e-6
    margin.grad = None
    dpo_loss(ChosenRejected(margin, zero), beta=0.5).sum().backward()
    assert margin.grad.item() < -0.05


def test_the_importance_weight_has_no_gradient():
    ratios = log_ratios(POLICY, REFERENCE)
    assert importance_weight(ratios).tolist() == pytest.approx([math.exp(-0.5), math.exp(1.0), math.exp(1.5)])
    policy = ChosenRejected(*(value.clone().requires_grad_() for value in POLICY))
    found = preference_loss(policy, REFERENCE, LENGTHS, beta=0.3, importance_correction=True)
    got = torch.autograd.grad(found.sum(), policy)
    policy = ChosenRejected(*(value.clone().requires_grad_() for value in POLICY))
    plain = torch.autograd.grad(preference_loss(policy, REFERENCE, LENGTHS, beta=0.3).sum(), policy)
    for weighed, grad in zip(got, plain, strict=True):
        torch.testing.assert_close(weighed, grad * importance_weight(ratios))


def test_ipo_of_an_empty_response_is_finite():
    zero = torch.zeros(1)
    assert ipo_loss(ChosenRejected(zero, zero), beta=0.5, n_tokens=ChosenRejected(zero, zero)).tolist() == [
        1.0
    ]


def test_reward_sums():
    sums = reward_sums(log_ratios(POLICY, REFERENCE), beta=0.5)
    assert sums["chosen"].item() == pytest.approx(0.5 * (1.0 - 0.5 + 2.0))
    assert sums["rejected"].item() == pytest.approx(0.5 * (-0.5 + 1.0 + 1.5))
    assert sums["margins"].item() == pytest.approx(0.5 * (1.5 - 1.5 + 0.5))
    assert sums["accuracies"].item() == 2.0


@pytest.fixture(scope="module")
def trl_batch(tmp_path_factory):
    """(batch as TRL collates it, function: loss type, beta -> its loss, its metrics, its gradients)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL and what it imports
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        tokenizer, reference = char_tokenizer(), char_model(1)
        tokenizer.pad_token = "</s>"
        out = str(tmp_path_factory.mktemp("trl"))

        def trainer(policy, kind: str, beta: float):
            args = DPOConfig(
                output_dir=out, per_device_train_batch_size=len(ROWS), loss_type=[kind], beta=beta,
                report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            )  # fmt: skip
            data = Dataset.from_list(ROWS)
            return DPOTrainer(policy, reference, args=args, train_dataset=data, processing_class=tokenizer)

        def computed(kind: str, beta: float):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                policy = char_model(0).train()
                made = trainer(policy, kind, beta)
                loss = made.compute_loss(policy, batch)
                loss.backward()
            metrics = {
                name: sum(values) / len(values) for name, values in made._metrics["train"].items() if values
            }
            return loss.item(), metrics, [p.grad for p in policy.parameters()]

        batch = next(iter(trainer(char_model(0), "sigmoid", 0.1).get_train_dataloader()))
    return batch, computed


@pytest.mark.parametrize(("kind", "beta"), [("sigmoid", 0.1), ("sigmoid", 0.7), ("ipo", 0.1), ("ipo", 0.7)])
def test_losses_rewards_and_gradients_are_those_of_trl(trl_batch, kind, beta):
    batch, computed = trl_batch
    theirs, metrics, gradients = computed(kind, beta)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    rows = Batch(batch["input_ids"], batch["attention_mask"], labels, int(batch["attention_mask"].sum()))
    policy, reference = char_model(0).train(), char_model(1)
    logps, counted = response_logps(policy, rows, contextlib.nullcontext())
    with torch.no_grad():
        of_reference = ChosenRejected.split(response_logps(reference, rows, contextlib.nullcontext())[0])
    of_policy = ChosenRejected.split(logps)
    found = preference_loss(
        of_policy, of_reference, ChosenRejected.split(counted), beta=beta, ipo=kind == "ipo"
    )
    found.mean().backward()
    terms = chain(policy, tokens=batch["input_ids"].numel())
    rel = rounding(torch.float32, terms)
    assert found.mean().item() == pytest.approx(theirs, rel=rel)
    rewards = reward_sums(log_ratios(of_policy, of_reference), beta)
    for name, value in rewards.items():
        assert value.item() / len(ROWS) == pytest.approx(metrics[f"rewards/{name}"], rel=rel), name
    for which, value in of_policy._asdict().items():
        assert value.mean().item() == pytest.approx(metrics[f"logps/{which}"], rel=rel)
    for p, gradient in zip(policy.parameters(), gradients, strict=True):
        assert_same(p.grad, gradient, terms=terms)


def test_defaults_and_ties():
    ratios = ChosenRejected(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 1.0, 2.0]))
    torch.testing.assert_close(dpo_loss(ratios, 0.3), -F.logsigmoid(0.3 * torch.tensor([0.0, 1.0, -1.5])))
    assert reward_sums(ratios, 0.3)["accuracies"] == 1.0  # a tie is not right
    ones = ChosenRejected(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1.0, 2.0, 1.0]))
    expected = [(c / m - r / n - 1 / 0.6) ** 2 for c, r, m, n in zip(*ratios, *ones, strict=True)]
    torch.testing.assert_close(ipo_loss(ratios, 0.3, ones), torch.stack(expected))


def test_a_forward_pass_of_training_fills_no_cache():
    ids = torch.tensor([[1, 2, 3]])
    model = Fixed(torch.zeros(1, 3, 5))
    logps, n = response_logps(
        model, Batch(ids, torch.ones_like(ids), ids, n_tokens=3), contextlib.nullcontext()
    )
    assert model.asked["use_cache"] is False and model.asked["input_ids"] is ids
    assert n.tolist() == [2.0] and logps.item() == pytest.approx(-2 * math.log(5))
