"""What the studies share, and what they make of results: rates, runs, tables, frontiers."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lota.data.batches import encode
from lota.data.examples import in_validation
from lota.data.prompts import Prompter
from lota.evaluate.text_loss import nats_per_byte
from lota.masks import Mask
from lota.models.hashing import content_hash
from lota.models.loading import load_model, load_tokenizer
from lota.models.scope import find_scope
from lota.models.weights import open_weights
from lota.report.page import markdown
from scripts import budget_study, forgetting_study, sparsity_study
from scripts.cells import Cells, read_cells, shown
from scripts.forgetting_study import Point, budget_table, frontier, frontier_table, points
from scripts.methods import DENSE, RATES, Method
from scripts.study import VALIDATION, Study
from scripts.workloads import BASES, SMOKE, sizes_key
from tasks import get_task
from tests.evaluations import write_rows

STORY = "Once upon a time there was a happy cat called Anna."
LOTA = Method("LoTA", 0.9, "task_vector", start=1e-2)


@pytest.fixture(scope="module")
def tiny():
    folder = BASES["tiny-llama"].source
    return load_model(folder).eval(), load_tokenizer(folder)


def nats_of(model, before: list[int], after: list[int]) -> float:
    """Loss of some tokens after others, in nats, from the logits of one pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double()
    return F.cross_entropy(logits, torch.tensor(after), reduction="sum").item()


def test_nats_per_byte(tiny):
    """Texts after a question or from the start; a long one in stretches that begin with the token before."""
    model, tokenizer = tiny
    texts = [("Human:\nWhat?\n\nAssistant:\n", "The sky is blü."), ("", STORY)]
    nats, size = 0.0, 0
    for question, text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        nats += nats_of(model, tokenizer(question).input_ids, ids)
        size += len(text.encode())
    found = nats_per_byte(model, tokenizer, texts)
    assert found.value == pytest.approx(nats / size, rel=1e-5) and found.n == 2
    ids = tokenizer(texts[1][1], add_special_tokens=False).input_ids
    assert 8 < len(ids) < 16
    last = nats_of(model, ids[len(ids) - 9 : 8], ids[8:])  # preceded by as many tokens as fit
    pieces = nats_of(model, [tokenizer.bos_token_id], ids[:8]) + last
    short = nats_per_byte(model, tokenizer, texts[1:], reach=8)
    assert short.value == pytest.approx(pieces / len(texts[1][1].encode()), rel=1e-5)


# Rates and rows


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path, "smoke", SMOKE)


def test_a_base_with_another_end_token(tmp_path, monkeypatch):
    """Runs learn and stop at it; the weights are the base's, whose own folder stays as it is."""
    plain, before = BASES["tiny-llama"], load_tokenizer(BASES["tiny-llama"].source)
    assert plain.folder(tmp_path) == plain.source and not any(tmp_path.iterdir())
    key = sizes_key(SMOKE, "hash")
    monkeypatch.setitem(BASES, "tiny-llama", replace(plain, end=before.bos_token))
    assert sizes_key(SMOKE, "hash") != key
    study = Study(tmp_path, "smoke", SMOKE)
    number = study.tokenizer.eos_token_id
    assert number == before.bos_token_id != before.eos_token_id
    assert {after[-1] for _, after in study.requests(study.tokenizer, study.rows("test"))} == {number}
    model = load_model(study.folder)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == number
    assert content_hash(open_weights(study.folder)) == content_hash(open_weights(plain.source))
    assert load_tokenizer(plain.source).eos_token_id == before.eos_token_id
    made = (study.folder / "config.json").stat().st_mtime_ns
    assert Study(tmp_path, "other", SMOKE).folder == study.folder
    assert (study.folder / "config.json").stat().st_mtime_ns == made  # once for all studies of a folder


@pytest.mark.parametrize("best", [1e-5, 2e-3, 5e-2, 5.0])
def test_the_best_rate_has_a_worse_one_on_either_side(best, study, monkeypatch):
    tried = []

    def measured(self, method, seed, lr, part, *, test):
        assert not test and part == "rate"  # what chooses sees no test row
        tried.append(lr)
        return {"validation": None if lr > 20 * best else abs(math.log(lr / best))}

    monkeypatch.setattr(Study, "measured", measured)
    assert study.rate(LOTA, 1e-3) == pytest.approx(best)
    at = min(range(len(RATES)), key=lambda i: abs(RATES[i] - best))
    assert {RATES[i] for i in (at - 1, at + 1) if 0 <= i < len(RATES)} <= set(tried)
    assert len(tried) == len(set(tried))


def test_the_grid_has_factors_of_two_to_three():
    assert all(2 <= b / a < 3 for a, b in pairwise(RATES))


def test_no_row_that_chooses_is_trained_on_or_reported(tmp_path):
    task, tokenizer = get_task("gsm8k"), load_tokenizer(BASES["tiny-llama"].source)
    rows = {}
    for split, n in (("train", 120), ("test", 30)):
        rows[split] = [
            {"question": f"{split} {i}" + " and" * (i % 3), "answer": f"#### {i}"} for i in range(n)
        ]
        write_rows(tmp_path, "gsm8k", split, rows[split])
    text = task.prompt(rows["train"][111]) + task.target(rows["train"][111])
    most = len(tokenizer(text).input_ids) + 1  # with the end-of-sequence token
    short = {
        split: [row for row in found if len(tokenizer(task.prompt(row) + task.target(row)).input_ids) < most]
        for split, found in rows.items()
    }
    assert 0 < len(short["train"]) < 120
    sizes = {"n_validation": 10**6, "n_test": 10**6, "max_length": most, "data_dir": str(tmp_path)}
    study = Study(tmp_path / "out", "smoke", replace(SMOKE, task="gsm8k", **sizes))
    assert study.task.load("train", "") == short["train"]
    cut = [row for row in short["train"] if in_validation(task, row, VALIDATION)]
    assert cut and sorted(map(str, study.rows("validation"))) == sorted(map(str, cut))
    assert sorted(map(str, study.rows("test"))) == sorted(map(str, short["test"]))
    assert study.config(DENSE, 0, 1e-3).validation_fraction == VALIDATION


def test_lora_has_about_as_many_entries_as_the_mask(study, tiny):
    scope = find_scope(tiny[0])
    per_rank = sum(sum(tensor.shape) for tensor in scope.values())
    total = sum(tensor.numel for tensor in scope.values())
    for sparsity in (0.5, 0.9, 0.99):
        wanted = (1 - sparsity) * total
        assert abs(study.rank_for(sparsity) * per_rank - wanted) <= per_rank / 2
    assert study.rank_for(0.9999) == 1
    config = study.config(Method("LoRA", 0.9, lora=True, settings={"optimizer": "AdamW"}), 0, 1e-3)
    assert (config.adapter.name, config.optimizer) == ("lora", "AdamW")
    assert config.lora_alpha == 2 * config.lora_rank


def test_half_a_line_is_cut(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl")
    cells.add({"nats": 1.5}, part="main", seed=0)
    with cells.path.open("a") as file:
        file.write('{"cell": {"part"')
    again = Cells(cells.path)
    assert again.get(seed=0, part="main") == {"cell": {"part": "main", "seed": 0}, "nats": 1.5}
    again.add({"nats": None}, part="main", seed=1)
    assert len(Cells(cells.path).found) == 2


def test_a_base_that_is_not_there_is_said_with_the_remedy(tmp_path, monkeypatch):
    missing = replace(BASES["tiny-llama"], source=tmp_path / "x", remedy="make it")
    monkeypatch.setitem(BASES, "tiny-llama", missing)
    with pytest.raises(SystemExit, match=f"{tmp_path}/x is not there: make it"):
        sparsity_study.main(["--smoke", "--out", str(tmp_path / "out")])


def test_results_of_other_sizes_are_not_mixed(tmp_path):
    cells = Cells(tmp_path / "a.jsonl")
    for sizes in ("old", "new"):
        cells.add({"nats": 1.0}, part="main", sizes=sizes)
    assert [record["cell"]["sizes"] for record in read_cells(tmp_path)["a"]] == ["new"]
    (tmp_path / "b.jsonl").touch()
    assert read_cells(tmp_path)["b"] == []


def test_shown():
    assert shown([0.5, 0.7], 100, 1) == "60.0 ± 10.0"
    assert (shown([0.5]), shown([0.5, None]), shown([])) == ("0.500", "diverged", "-")


# The studies


@pytest.mark.slow
def test_sparsity_study(tmp_path, tiny, monkeypatch):
    few = ["--methods", "full fine-tuning", "LoTA", "SNIP mask", "LoRA, AdamW"]
    command = ["--smoke", "--seeds", "0", "--out", str(tmp_path), *few]
    sparsity_study.main(command)
    file = tmp_path / "smoke.jsonl"
    before = file.read_bytes()
    records = [json.loads(line) for line in before.splitlines()]
    main = {r["cell"]["method"]: r for r in records if r["cell"]["part"] == "main"}
    assert list(main) == few[1:]
    table = (tmp_path / "sparsity.md").read_text().splitlines()
    for name, record in main.items():
        tried = {
            r["cell"]["lr"]: r["validation"]
            for r in records
            if r["cell"]["part"] == "rate" and r["cell"]["method"] == name
        }
        assert record["cell"]["lr"] == min(tried, key=tried.get) and len(tried) == 2
        assert "nats" not in next(r for r in records if r["cell"]["part"] == "rate")  # no test row is seen
        (line,) = [line for line in table if f"| {name} |" in line]
        assert f"| {record['trained']:,} | {record['cell']['lr']:g} |" in line
        more = "-" if name == "LoTA" else f"{record['nats'] - main['LoTA']['nats']:.3f}"
        assert f"{record['nats']:.3f} | {record['own']:.4f} | {more} | 1 |" in line
    assert (tmp_path / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    masks = {path.parent.name: Mask.load(path) for path in (tmp_path / "masks").rglob("0.9_mask.pt")}
    assert set(masks) == {"LoTA", "SNIP_mask"}
    assert masks["SNIP_mask"].n_kept == main["SNIP mask"]["trained"] == main["LoTA"]["trained"]
    # the base's losses, from logits
    base = next(record for record in records if record["cell"]["part"] == "base")
    study, (model, tokenizer) = Study(tmp_path, "smoke", SMOKE), tiny
    prompter, nats, tokens = Prompter(tokenizer), 0.0, 0
    for row in study.rows("test"):
        coded = encode(tokenizer, prompter.example(study.task, row), max_length=128, max_prompt_length=127)
        before_, after = coded.input_ids[: coded.prompt_length], coded.input_ids[coded.prompt_length :]
        nats, tokens = nats + nats_of(model, before_, after), tokens + len(after)
    assert base["nats"] == pytest.approx(nats / tokens, rel=1e-5)
    # the same command finds everything done
    monkeypatch.setattr(Study, "_trained", None)
    sparsity_study.main(command)
    assert file.read_bytes() == before


def runs(method, sparsity, lr, validation, own, nats=1.0, part="curve"):
    cell = {"part": part, "method": method, "sparsity": sparsity, "lr": lr}
    return [
        {
            "cell": cell | {"seed": seed},
            "validation": validation,
            "own": own,
            "nats": nats + seed,
            "score": 0.5,
        }
        for seed in (0, 1)
    ]


@pytest.fixture
def records():
    """Two settings of LoTA that are on the frontier, two that are not, one that diverged; the base first."""
    base = {
        "cell": {"part": "base"},
        "base": "0" * 64,
        "trained": 8,
        "validation": 9.0,
        "own": 1.0,
        "nats": 9.0,
        "score": 0.0,
    }
    found = [
        base,
        *runs("LoTA", 0.9, 1e-3, 3.0, 1.02, nats=3.0),
        *runs("LoTA", 0.99, 1e-2, 2.0, 1.2, nats=2.0),
    ]
    found += [*runs("LoTA", 0.9, 1e-1, 3.5, 1.1), *runs("LoTA", 0.5, 1e-2, 2.0, 1.3)]
    diverged = runs("LoTA", 0.5, 1.0, None, None)
    diverged[0] |= {"validation": 1.0, "own": 1.0}
    return [*found, *diverged, *runs("LoTA", 0.9, 1.0, 0.0, 0.0, part="main")]


def test_frontier(records):
    settings = points(records)["LoTA"]
    assert [(p.sparsity, p.lr) for p in frontier(settings)] == [(0.9, 1e-3), (0.99, 1e-2)]
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 12, (60, 2), generator=generator).tolist()
    many = [Point("m", None, i, runs("m", None, i, float(a), float(b))) for i, (a, b) in enumerate(values)]
    best = {point.losses for point in frontier(many)}
    assert best == {
        (a, b)
        for a, b in map(tuple, values)
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in values)
    }


def test_forgetting_tables(records, tmp_path):
    lines = markdown(frontier_table(records).lines).splitlines()
    assert lines[2].startswith("| base | - | - | 0.0 | 9.000 | 1.0000 |")
    assert lines[3] == "| LoTA | 0.9 | 0.001 | 50.0 ± 0.0 | 3.500 ± 0.500 | 1.0200 ± 0.0000 | 2 |"
    assert len(lines) == 5
    (line,) = markdown(budget_table(records).lines).splitlines()[2:]
    assert line == "| LoTA | 3.500 ± 0.500 | 2.500 ± 0.500 | 2.500 ± 0.500 | 2.500 ± 0.500 | 2.500 ± 0.500 |"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert line in forgetting_study.REPORT.write(tmp_path)
    assert (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "forgetting.md").read_text().startswith("### a\n")
    unscored = [{key: value for key, value in record.items() if key != "score"} for record in records]
    assert len(forgetting_study.REPORT.draw({"a": records}, ["nats", "score"]).axes) == 2
    assert len(forgetting_study.REPORT.draw({"a": unscored}, ["nats", "score"]).axes) == 1


@pytest.mark.slow
def test_forgetting_study(tmp_path):
    forgetting_study.main(["--smoke", "--seeds", "0", "--out", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    curve = [record["cell"] for record in records if record["cell"]["part"] == "curve"]
    assert {(c["method"], c["sparsity"]) for c in curve} == {("full fine-tuning", None), ("LoTA", 0.9)}
    assert all(cell["lr"] in (1e-3, 1e-2) and cell["seed"] == 0 for cell in curve)


def test_the_error_of_overlaps_of_seeds_is_that_of_seeds():
    """If an overlap is the sum of what two seeds contribute, the mean's error is known."""
    parts = [0.1, 0.25, 0.15, 0.4]
    pairs = {frozenset([a, b]): parts[a] + parts[b] for a in range(4) for b in range(a)}
    exact = 2 * statistics.stdev(parts) / math.sqrt(4)
    assert budget_study.jackknife(pairs) == f"{2 * statistics.mean(parts):.3f} ± {exact:.3f}"
    early = {frozenset([0, 1]): 0.25, frozenset([0, 2]): 0.75}  # a pair is to come
    assert budget_study.jackknife(early) == "0.500"
    assert budget_study.jackknife({frozenset([0, 1]): 0.25}) == "0.250" and budget_study.jackknife({}) == "-"


def test_differences_are_of_equal_seeds():
    runs = [{"cell": {"seed": seed}, "nats": nats} for seed, nats in ((0, 1.5), (1, 2.75))]
    others = [{"cell": {"seed": seed}, "nats": nats} for seed, nats in ((1, 2.0), (0, 1.0))]
    assert sparsity_study.differences(runs, others) == "0.625 ± 0.125"
    assert sparsity_study.differences(runs, runs) == sparsity_study.differences(runs, others[:1]) == "-"


@pytest.mark.slow
def test_budget_study(tmp_path, monkeypatch):
    budget_study.main(["--smoke", "--seeds", "0", "1", "--out", str(tmp_path)])
    records = read_cells(tmp_path)["smoke"]
    study = Study(tmp_path, "smoke", SMOKE, rates=(1e-3, 1e-2))
    names = [  # a run has two steps
        *("LoTA, 1 steps", "LoTA, 4 steps", "LoTA"),
        *("gradient mask, 1 steps", "gradient mask, 4 steps", "gradient mask", "gradient mask, per tensor"),
        "LoTA, another seed's mask",
    ]
    trained = budget_study.trained(records)
    assert list(trained) == names
    gradient = Method("gradient mask", 0.9, "gradient", start=1e-2)
    for kind, method in (("LoTA", budget_study.WHOLE), ("gradient", gradient)):
        rates = {r["cell"]["lr"] for name in names[:6] for r in trained[name] if name.startswith(kind)}
        assert rates == {study.rate(method)}
    used: dict[int, str] = {}
    monkeypatch.setattr(
        Study, "measured", lambda self, m, seed, *_, test: used.update({seed: m.settings["mask_path"]})
    )
    monkeypatch.setattr(Study, "rate", lambda self, method: 0.1)
    budget_study.borrowed(study, [0, 1])
    assert used == {seed: str(study.mask(budget_study.WHOLE, 1 - seed)) for seed in (0, 1)}
    assert {r["cell"]["steps"] for r in records if r["cell"]["part"] == "calibration"} == {1, 2, 4}
    assert [m.budget for m in budget_study.methods(2, 3, (1, 4))] == [1, 4, None, 1, 3, None, None]
    for method in budget_study.methods(2, 9, (1, 4)):
        same, others = budget_study.overlaps(records, method.name)
        masks = [Mask.load(study.mask(method, seed)) for seed in (0, 1)]
        whole = [Mask.load(study.mask(budget_study.WHOLE, seed)) for seed in (0, 1)]
        kept = [torch.cat([m.dense(name).flatten() for name in m.names]) for m in (*masks, *whole)]
        pairs = ((0, 2), (1, 3), (0, 1))
        by_hand = [float((kept[a] & kept[b]).sum() / (kept[a] | kept[b]).sum()) for a, b in pairs]
        if method == budget_study.WHOLE:
            assert not same and others == {frozenset([0, 1]): pytest.approx(by_hand[2])}
        else:
            assert [*same, *others.values()] == pytest.approx(by_hand)
    text = (tmp_path / "budget.md").read_text()
    assert "| LoTA | - | " in text and "drawn by lot: an IoU of 0.053." in text
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")
    assert [steps for steps, *_ in budget_study.points(records, "gradient mask", "nats")] == [1, 2, 4]
