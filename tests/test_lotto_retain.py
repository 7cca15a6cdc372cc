"""What keeps the behaviour of earlier tasks in a sequence: importance, masks that avoid it, pulls, replay."""

from __future__ import annotations

import pytest
import torch
from lotto_runs import Trainings, ledger, mask, settings, with_tasks
from runs import MODEL, policy, same, stopped_after
from test_lotto_check import refused
from transformers import AutoModelForCausalLM

from lota.data.batches import seeded_sample
from lota.lotto.driver import Lotto
from lota.masks import Mask
from lota.masks.extract.importance import load_importance
from lota.models.loading import load_model, load_tokenizer
from tasks import get_task

ALL = ("retain.replay_fraction=0.1", "retain.l2_sp=0.5", "retain.ewc=0.2", "retain.avoid=3",
       "retain.n_examples=5")  # fmt: skip


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(with_tasks(tmp_path))
    return tmp_path


class StopsInTheSecond(Trainings):
    """The adaptation of the second task gets a signal after two steps."""

    def __call__(self, config):
        if config.exp_name.endswith("2_two/adapt"):
            with stopped_after(2):
                super().__call__(config)
            raise KeyboardInterrupt
        return super().__call__(config)


def learnt(*overrides: str, trainings: Trainings | None = None) -> tuple[Lotto, Trainings]:
    """A sequence to its end, without results."""
    trainings = trainings or Trainings()
    lotto = Lotto(settings(*overrides), trainings, get_task)
    with lotto.opened():
        list(lotto.learnt())
    return lotto, trainings


def after(lotto: Lotto, at: int) -> dict[str, torch.Tensor]:
    return policy(lotto.weights(lotto.stages[at]).parent)


def by_hand(lotto: Lotto, tasks: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Importance of every weight to tasks after stage 1, from plain transformers: a row, a backward pass."""
    model = load_model(str(MODEL), archive=lotto.weights(lotto.stages[0]), dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(str(MODEL))
    names = [name for name in mask(lotto, 0).names]
    weights = {name: model.get_parameter(name) for name in names}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in weights.items()}
    for name in tasks:
        task = get_task(name)
        sums = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in weights.items()}
        for row in seeded_sample(task.load("train", None), 5, seed):
            prompt = tokenizer(task.prompt(row)).input_ids
            target = tokenizer(task.target(row), add_special_tokens=False).input_ids
            ids = torch.tensor([[*prompt, *target, tokenizer.eos_token_id]])
            logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            loss = -logps[len(prompt) - 1 :].sum()
            for n, grad in zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True):
                sums[n] += grad.double() ** 2
        mean = torch.cat([value.flatten() for value in sums.values()]).mean()
        total = {n: total[n] + sums[n] / mean for n in total}
    return total


@pytest.mark.slow
def test_importance_decides_the_mask_and_the_pull():
    """Of the second stage, to the first task, at the weights in between; against autograd row by row."""
    lotto, trainings = learnt(*ALL)
    whole, second = by_hand(lotto, ["one"]), mask(lotto, 1)
    stored = load_importance(lotto.folder / "2_two" / "importance.pt", second)
    for name in second.names:
        expected = whole[name][second.dense(name)]
        torch.testing.assert_close(stored.values[name].double(), expected, rtol=1e-3, atol=1e-5)
    assert not (lotto.folder / "1_one" / "importance.pt").exists()

    before, tuned = after(lotto, 0), policy(next((lotto.folder / "2_two" / "calibrate").glob("step-*")))
    names = sorted(second.names)
    rate = torch.cat(
        [((tuned[n] - before[n]).double() ** 2 / (1 + 3 * whole[n])).sqrt().flatten() for n in names]
    )
    free = torch.cat([~mask(lotto, 0).dense(n).flatten() for n in names])
    chosen = torch.cat([second.dense(n).flatten() for n in names])
    assert rate[chosen].min() >= rate[free & ~chosen].max() * (1 - 1e-3)
    assert second.meta["avoid"]["strength"] == 3 and "avoid" not in mask(lotto, 0).meta
    assert second.meta["avoid"]["tasks"][0]["datasets"] == ["one"]
    assert second.meta["avoid"]["tasks"][0]["examples"] == 5

    first, calibration, adaptation = trainings.configs[1], *trainings.configs[2:]
    assert (first.l2_sp, first.ewc, first.replay) == (0, 0, [])
    assert (calibration.l2_sp, calibration.ewc, calibration.replay) == (0, 0, ["one"])
    assert (adaptation.l2_sp, adaptation.ewc, adaptation.replay) == (0.5, 0.2, ["one"])
    state = torch.load(lotto.weights(lotto.stages[1]).parent / "resume.pt", weights_only=True)["optimizer"]
    pulls = torch.cat([entry["pull"] for entry in state["state"].values()])
    listed = torch.cat([stored.values[n] for n in before if n in stored.values])
    torch.testing.assert_close(pulls, 0.5 + 0.2 * listed, rtol=0, atol=0)
    anchors = torch.cat([entry["anchor"] for entry in state["state"].values()])
    starts = torch.cat([before[n][second.dense(n)] for n in before if n in stored.values])
    assert torch.equal(anchors, starts)


@pytest.mark.slow
def test_a_stopped_sequence_goes_on_to_the_same_bits():
    """In the adaptation of the second of three stages; the importance there is used again, or made again."""
    tasks = "tasks=[one,two,three]"
    with pytest.raises(KeyboardInterrupt):
        learnt(*ALL, tasks, trainings=StopsInTheSecond())
    folder = settings(*ALL, tasks).run_dir
    kept = (folder / "2_two" / "importance.pt").stat()
    stopped, trainings = learnt(*ALL, tasks)
    assert trainings.names == ["2_two/adapt", "3_three/calibrate", "3_three/adapt"]
    again = (folder / "2_two" / "importance.pt").stat()
    assert (again.st_ino, again.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    whole, _ = learnt(*ALL, tasks, "exp_name=whole")
    for at in range(3):
        assert same(after(stopped, at), after(whole, at))
    hashes = [[row["hash_after"] for row in ledger(lotto)] for lotto in (stopped, whole)]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_an_importance_of_something_else_is_set_aside(caplog):
    lotto, _ = learnt(*ALL, "retain.avoid=0")
    path = lotto.folder / "2_two" / "importance.pt"
    digest = load_importance(path, mask(lotto, 1)).digest
    content = torch.load(path, weights_only=True)
    torch.save({**content, "key": "other"}, path)
    lotto.ledger.entries.pop()
    (lotto.folder / "ledger.json").unlink()
    caplog.clear()
    again, _ = learnt(*ALL, "retain.avoid=0")
    assert any("is of other weights or rows and is now" in message for message in caplog.messages)
    assert load_importance(path, mask(again, 1)).digest == digest
    assert same(after(again, 1), after(lotto, 1))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fft", "random"])
def test_other_methods_are_pulled_too(method):
    lotto, trainings = learnt(f"method={method}", "retain.ewc=0.5", "retain.n_examples=3")
    assert trainings.configs[-1].ewc == 0.5
    kept = None if method == "fft" else Mask.load(lotto.folder / ledger(lotto)[1]["mask"])
    stored = load_importance(lotto.folder / "2_two" / "importance.pt", kept)
    weights = dict(AutoModelForCausalLM.from_pretrained(MODEL).named_parameters())
    if kept is None:
        assert {n: len(v) for n, v in stored.values.items()} == {n: p.numel() for n, p in weights.items()}
    state = torch.load(lotto.weights(lotto.stages[1]).parent / "resume.pt", weights_only=True)["optimizer"]
    assert all("pull" in entry for entry in state["state"].values())


@pytest.mark.slow
def test_nothing_of_it_is_the_sequence_that_was():
    """With all strengths 0, whatever n_examples: the same bits, no file more."""
    plain, _ = learnt()
    off, _ = learnt("exp_name=off", "retain.n_examples=3", "retain.ewc=0", "retain.avoid=0")
    for at in range(2):
        assert same(after(plain, at), after(off, at))
    files = [sorted(p.name for p in lotto.folder.glob("2_two/*")) for lotto in (plain, off)]
    assert files[0] == files[1]


BAD = [
    (["method=lora", "retain.ewc=1"], "retain.ewc=1.0 with method=lora: it pulls weights of the model"),
    (["method=lora", "retain.l2_sp=1"], "retain.l2_sp=1.0 with method=lora"),
    (["method=fft", "retain.avoid=1"], "retain.avoid=1.0 with method=fft: it trains without masks"),
    (["retain.avoid=-1"], "retain.avoid=-1.0: must be at least 0"),
    (["retain.replay_fraction=2"], "retain.replay_fraction=2.0: must be at least 0 and at most 1"),
    (["l2_sp=1"], "l2_sp=1.0: not with a sequence of tasks; retain.l2_sp pulls from the second task on"),
    (["ewc=1"], "ewc=1.0: not with a sequence of tasks"),
    (["+task_overrides.two.ewc=1"], "task_overrides.two.ewc: one for all tasks"),
]


@pytest.mark.parametrize(("overrides", "words"), BAD)
def test_settings_that_cannot_be_had(overrides, words):
    assert words in refused(*overrides)


ALONE, OWN = "(one task: none comes before it)", "(the later tasks have masks of yours)"
UNREAD = [
    (["retain.n_examples=3"], ["retain.n_examples=3 (retain.ewc=0, retain.avoid=0)"]),
    (["retain.n_examples=3", "retain.avoid=1"], []),
    (
        ["tasks=[one]", "retain.ewc=1", "retain.l2_sp=0.5"],
        [f"retain.l2_sp=0.5 {ALONE}", f"retain.ewc=1.0 {ALONE}"],
    ),
    (
        ["tasks=[one,two]", "retain.avoid=2", "+task_overrides.two.mask_path=m.pt"],
        [f"retain.avoid=2.0 {OWN}"],
    ),
    (["tasks=[one,two]", "retain.avoid=2", "+task_overrides.one.mask_path=m.pt"], []),
]


@pytest.mark.parametrize(("overrides", "lines"), UNREAD)
def test_what_nothing_reads_is_named(overrides, lines):
    assert settings(*overrides).unused() == lines
