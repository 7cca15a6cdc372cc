"""What keeps the behaviour of earlier tasks in a sequence: importance, masks that avoid it, pulls, replay."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from lotto_runs import Trainings, ledger, mask, settings, with_tasks
from runs import MODEL, policy, same, stopped_after, write_mask
from test_lotto_check import refused
from transformers import AutoModelForCausalLM

from lota.data.batches import seeded_sample
from lota.lotto.driver import Lotto
from lota.lotto.retain import Importance
from lota.masks import Mask
from lota.masks.extract.importance import load_importance
from lota.models.loading import load_model, load_tokenizer
from lota.models.scope import find_scope, meta_model
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


def by_hand(archive: Path | None, names: list[str], tasks: list[str], count: int = 5) -> dict:
    """Importance of weights to tasks, from plain transformers: a row, a backward pass. archive: a policy.pt,
    None: the embedded model.
    """
    model = load_model(str(MODEL), archive=archive, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(str(MODEL))
    weights = {name: model.get_parameter(name) for name in names}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in weights.items()}
    for name in tasks:
        task = get_task(name)
        sums = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in weights.items()}
        for row in seeded_sample(task.load("train", None), count, 0):
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


def importance(*overrides: str, task: str = "three") -> Importance:
    """Before that task, at the weights of the embedded model, of two of its matrices; computed alone."""
    config = settings("tasks=[one,two,three]", "retain.ewc=1", "retain.n_examples=2", *overrides)
    model = meta_model(MODEL)
    return Importance(config, get_task, task, MODEL, model, [*find_scope(model)][:2], torch.device("cpu"))


def test_importance_is_to_the_tasks_before():
    """Two rows of each, one in a batch; against autograd row by row."""
    found = importance()
    expected = by_hand(None, found.names, ["one", "two"], 2)
    assert found.whole.values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.whole.values[name].double(), value, rtol=1e-3, atol=1e-5)
    assert [meta["datasets"] for meta in found.whole.meta["tasks"]] == [["one"], ["two"]]
    assert [len(batch) for data in found.data for batch in data.batches] == [1] * 4
    assert found.whole is found.whole


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ((), "float32"),
        (("model.fsdp_policy_mp=bfloat16",), "bfloat16"),
        (("model.policy_dtype=bfloat16",), "bfloat16"),
    ],
)
def test_importance_is_computed_in_the_dtype_that_trains(overrides, dtype):
    assert {data.dtype for data in importance(*overrides).data} == {dtype}


def test_what_decides_importance_is_in_its_key():
    key = importance().key
    assert importance().key == key
    others = [importance(task="two"), importance("retain.n_examples=3"), importance("seed=3")]
    others += [importance("model.policy_dtype=bfloat16"), importance()]
    others[-1].names = others[-1].names[:1]
    assert len({key, *(other.key for other in others)}) == 6


def test_importance_is_stored_once(tmp_path, caplog):
    """What is there is used again; what is of other rows, or damaged, is set aside and made anew."""
    caplog.set_level(logging.WARNING)  # an earlier test may have asked for more
    found = importance(task="two")
    kept = write_mask(tmp_path / "m.pt").only(found.names)
    kept.save(tmp_path / "m.pt")
    run = found.config.adaptation("two", mask_path=str(tmp_path / "m.pt"))
    path = Path(run.importance_path)
    found.store(run, kept)
    stored = load_importance(path, kept)
    for name in found.names:
        assert torch.equal(stored.values[name], found.whole.values[name][kept.dense(name)])
    assert stored.key == found.key and stored.values.keys() == set(found.names)
    digest = stored.digest  # before the file that is mapped changes

    before = path.stat()
    again = importance(task="two")
    again.store(run, kept)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "whole" not in vars(again) and not caplog.messages  # no gradient was computed

    content = torch.load(path, weights_only=True)
    for bad, said in (({**content, "key": "other"}, "is of other weights or rows"), ([1], "cannot be used")):
        torch.save(bad, path)
        caplog.clear()
        found.store(run, kept)
        (line,) = caplog.messages
        assert said in line
        assert torch.load(path.with_name(line.rpartition(" ")[2]), weights_only=True).__class__ is type(bad)
        assert load_importance(path, kept).digest == digest


@pytest.mark.slow
def test_importance_decides_the_mask_and_the_pull():
    """Of the second stage, to the first task, at the weights in between; against autograd row by row."""
    lotto, trainings = learnt(*ALL)
    second = mask(lotto, 1)
    whole = by_hand(lotto.weights(lotto.stages[0]), [*mask(lotto, 0).names], ["one"])
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


OUT_OF_BOUNDS = ("replay_fraction=2", "replay_fraction=nan", "l2_sp=-1", "ewc=-1", "ewc=inf", "avoid=-1",
                 "n_examples=0")  # fmt: skip


@pytest.mark.parametrize("given", OUT_OF_BOUNDS)
def test_a_value_out_of_its_bounds_is_told_once(given):
    """Under the key that was given, and not as a setting of each training run too."""
    told = refused("tasks=[one,two,three]", f"retain.{given}").splitlines()
    assert len(told) == 2 and told[1].startswith(f"  retain.{given.partition('=')[0]}=")


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
