"""Replicas: N processes give what one gives, stay bitwise equal, and send compact gradients alone."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from launched import launch
from runs import assert_frozen, base, policy, same, train, with_mini_task, write_mask

from lota.masks import Mask
from lota.masks.extract.gradients import Collected
from lota.masks.extract.importance import save_importance

# in one process: its runs are made once
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("replicated")]
DRIVER = str(Path(__file__).with_name("process_runs.py"))
# 10 steps; the last batch has 5 of 8 examples. eps: small gradients move little, so that rounding stays small
MASKED = ("mask_path=0.9_mask.pt", "n_epochs=null", "n_examples=77", "eps=1.0", "lr=1e-2", "eval_every=40",
          "sample_during_eval=true", "n_eval_model_samples=3")  # fmt: skip
SHORT = ("n_examples=37", "eps=1.0", "lr=1e-2", "eval_every=37")
PAIRS = ("datasets=[pairs]", "loss=dpo", *SHORT)
RUNS = {
    "even": MASKED,
    # parts of 4: the last batch has one example, so that most processes have none
    "global": (*MASKED, "n_examples=73", "grad_norm_strategy=global", "max_grad_norm=1",
               "gradient_accumulation_steps=2"),
    "packed": (*SHORT, "mask_path=0.9_mask.pt", "grad_norm_strategy=proportional", "max_grad_norm=1",
               "packing=true", "group_by_length=true", "activation_checkpointing=true"),
    "bf16": (*SHORT, "mask_path=0.9_mask.pt", "model.fsdp_policy_mp=bfloat16"),
    "pull": (*SHORT, "mask_path=0.9_mask.pt", "l2_sp=5", "ewc=5", "importance_path=importance.pt"),
    "lora": (*SHORT, "adapter=lora", "lora_rank=4", "optimizer=SGD"),
    "swap": (*PAIRS, "mask_path=0.9_mask.pt"),
    "precomputed": (*PAIRS, "mask_path=0.9_mask.pt", "model.reference=precomputed"),
    "snip": (*SHORT, "snip=true", "snip_batches=5", "snip_sparsity=0.99"),
}  # fmt: skip
ONCE = {  # with two processes only
    "astray": ("!astray", *SHORT, "mask_path=0.9_mask.pt", "compare_every=1"),
    "stopped": ("!stopped", *SHORT, "mask_path=0.9_mask.pt", "save_every=1000"),
    "continued": (*SHORT, "mask_path=0.9_mask.pt", "save_every=1000", "exp_name=stopped"),
    "dropout": (*SHORT, "adapter=lora", "lora_dropout=0.3", "save_every=1000"),
    "dropout_stopped": ("!stopped", *SHORT, "adapter=lora", "lora_dropout=0.3", "save_every=1000"),
    "dropout_continued": (*SHORT, "adapter=lora", "lora_dropout=0.3", "save_every=1000",
                          "exp_name=dropout_stopped"),
    "other_mask": ("!mask", *SHORT, "mask_path=0.9_mask.pt"),
}  # fmt: skip


def named(runs: dict[str, tuple[str, ...]]) -> list[list[str]]:
    return [[f"exp_name={name}", *overrides] for name, overrides in runs.items()]


def random_importance(model: torch.nn.Module) -> Collected:
    """Of all entries of a model."""
    generator = torch.Generator().manual_seed(5)
    values = {n: torch.rand(p.shape, generator=generator) * 2 for n, p in model.named_parameters()}
    return Collected(values, "importance")


def workplace(folder: Path) -> Path:
    folder.mkdir()
    save_importance(
        folder / "importance.pt",
        random_importance(base()),
        write_mask(with_mini_task(folder) / "0.9_mask.pt"),
    )
    return folder


def started(folder: Path, count: int, runs: dict[str, tuple[str, ...]]) -> dict[str, list[dict]]:
    """What each process found, by run."""
    (folder / "runs.json").write_text(json.dumps(named(runs)))
    ended = launch([DRIVER, "runs.json"], count, folder)
    assert ended.codes == [0] * count, ended.output
    answers = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(count)]
    return {name: [answer[at] for answer in answers] for at, name in enumerate(runs)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs in one process."""
    folder = workplace(tmp_path_factory.mktemp("runs") / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PROJECT_CACHE", str(folder))
        for overrides in named(RUNS):
            train(*overrides)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(folder, number of processes, what each process found by run)."""
    count = request.param
    folder = workplace(tmp_path_factory.mktemp("runs") / f"of{count}")
    runs = RUNS | ONCE if count == 2 else {name: RUNS[name] for name in ("even", "global", "swap")}
    return folder, count, started(folder, count, runs)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path, name: str) -> Path:
    found = {int(path.name.partition("-")[2]): path for path in (folder / name).glob("*-*")}
    return found[max(found)]


@pytest.mark.parametrize("name", RUNS)
def test_processes_together_give_what_one_gives(name, alone, together):
    folder, _, found = together
    if name not in found:
        pytest.skip("with two processes only")
    # rounding: sums of gradients in another order, amplified by the steps; bf16 weights round to 3 digits
    tolerance = 2e-2 if name == "bf16" else 1e-5
    ours, theirs = lines(folder, name), lines(alone, name)
    assert len(ours) == len(theirs)
    for line, reference in zip(ours, theirs, strict=True):
        assert line.keys() == reference.keys()
        for key, value in reference.items():
            if key.endswith("_per_second") or key == "peak_memory_bytes":
                continue
            if key.endswith("accuracies") and line["step"] == 1:
                continue  # of margins that are 0 but for rounding
            # rewards: 0.1 x differences of sums of some 100 nats, each to 7 digits
            least = 0.1 if name == "bf16" or key.startswith("rewards") else 1e-4
            assert math.isclose(line[key], value, rel_tol=tolerance, abs_tol=tolerance * least), (key, line)
    mine, one, start = policy(last(folder, name)), policy(last(alone, name)), base().state_dict()
    moved = sum((one[key] - start[key]).double().square().sum() for key in one) ** 0.5
    apart = sum((mine[key] - one[key]).double().square().sum() for key in one) ** 0.5
    assert apart <= (0.1 if name == "bf16" else 1e-4) * moved and moved > 0


def test_samples_are_those_of_one_process_in_their_order(alone, together):
    folder, _, _ = together
    for name in ("even", "global"):
        ours = (folder / name / "samples.jsonl").read_text()
        assert ours and ours == (alone / name / "samples.jsonl").read_text()


def test_replicas_are_bitwise_equal_and_frozen_entries_untouched(together):
    folder, _, found = together
    for name in RUNS.keys() & found.keys():
        for key in ("weights", "state"):
            assert len({answer[key] for answer in found[name]}) == 1, name
    mask, start = Mask.load(folder / "0.9_mask.pt"), base().state_dict()
    for name in {"even", "global", "packed", "swap", "precomputed"} & found.keys():
        assert assert_frozen(mask, policy(last(folder, name)), start) > 0.9


def test_a_process_sends_the_gradients_of_kept_entries_and_nothing_else(together):
    _, count, found = together
    for name in ("even", "global"):
        for answer in found[name]:
            least = 4 * answer["kept"] * 2 * (count - 1) / count * answer["steps"]
            assert least <= answer["counted"] <= 1.05 * least
            # what TCP has brought to the other side: the ring's bytes, and a vote per step
            assert 0.95 * least <= answer["sent"] <= 1.05 * least, answer["sent"] / least


def test_only_the_first_process_writes(together):
    folder, _, _ = together
    items = {re.sub(r"\d+", "N", item.name) for item in (folder / "even").iterdir()}
    logs = {"config.yaml", "versions.json", "metrics.jsonl", "samples.jsonl"}
    assert {item for item in items if not item.startswith(".")} == {*logs, "epoch-N"}
    assert json.loads((folder / "even" / "versions.json").read_text())["processes"] == together[1]


def once(together) -> tuple[Path, dict[str, list[dict]]]:
    folder, count, found = together
    if count != 2:
        pytest.skip("with two processes only")
    return folder, found


def test_a_replica_that_goes_astray_is_found_and_named(together):
    folder, found = once(together)
    for answer in found["astray"]:
        assert "after step 3 process 1 holds other values of model.norm.weight" in answer["error"]
    assert not list((folder / "astray").glob("*-*"))


def test_a_stop_of_one_process_saves_at_the_same_step_and_the_run_continues_bitwise(together, alone):
    folder, found = once(together)
    assert found["stopped"] == [{"stopped": True}] * 2
    assert {path.name for path in (folder / "stopped").glob("*-*")} == {"step-16", "step-37"}
    assert {answer["steps"] for answer in found["continued"]} == {5}
    assert same(policy(last(folder, "dropout")), policy(last(folder, "dropout_stopped")))
    assert found["dropout"][0]["state"] == found["dropout_continued"][0]["state"]


def test_a_run_continues_in_one_process(together, alone, monkeypatch, tmp_path):
    """The checkpoint of two processes after two steps, and all of the run in one process."""
    folder, _ = once(together)
    whole = workplace(tmp_path / "whole")
    shutil.copytree(folder / "stopped", whole / "stopped")
    shutil.rmtree(whole / "stopped" / "step-37")
    monkeypatch.chdir(whole)
    monkeypatch.setenv("PROJECT_CACHE", str(whole))
    options = ("mask_path=0.9_mask.pt", *SHORT, "save_every=1000")
    trainer, continued = train("exp_name=stopped", *options)
    assert trainer.progress.step == 5
    _, new = train("exp_name=new", *options)
    for key, value in policy(new).items():
        assert torch.allclose(policy(continued)[key], value, rtol=1e-5, atol=1e-6)


def test_another_mask_on_one_process_is_refused(together):
    _, found = once(together)
    for answer in found["other_mask"]:
        assert "the mask of process 1 differs from the first one's" in answer["error"]
