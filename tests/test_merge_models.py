"""merge_models.py on tiny models: deltas give what folders give, exact sums, statistics, refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from delta_models import bits
from hf_models import new_model, save_policy, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import merge_models
from lota.data.prompts import Limits
from lota.delta import Delta, extract
from lota.evaluate.cli import recorded_prompting
from lota.models.weights import open_weights
from lota.share.merge import folder as merge_folder
from lota.share.merge.rules import METHODS

NAMES = ("a", "b", "c")


def make(folder: Path, kind: str = "llama", dtype=torch.bfloat16, disjoint: bool = True) -> Path:
    """base/, and a, b, c/ that changed disjoint or overlapping parts of its blocks, with their deltas."""
    model = new_model(kind).to(dtype)
    model.save_pretrained(folder / "base")
    word_tokenizer(64, eos_token="</s>").save_pretrained(folder / "base")
    start = {n: p.clone() for n, p in model.named_parameters() if "layers" in n and p.ndim > 1}
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(NAMES):
        for n, before in start.items():
            tenths = torch.arange(before.numel()) % 10 == i  # of its own, or any fifth
            kept = tenths if disjoint else torch.rand(before.numel(), generator=generator) < 0.2
            noise = 0.5 * torch.randn(before.shape, generator=generator) * kept.view(before.shape)
            model.get_parameter(n).data = torch.where(noise != 0, before + noise.to(dtype), before)
        model.save_pretrained(folder / name)
        extract(folder / "base", folder / name, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def disjoint(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("disjoint"))


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("overlapping"), disjoint=False)


def files(folder: Path, kind: str) -> list[Path]:
    return [folder / (f"{name}.safetensors" if kind == "delta" else name) for name in NAMES]


def merge(folder: Path, inputs: list[Path], out: Path, method: str, more: str = "") -> Path:
    """`more` may name another --base."""
    line = f"--base {folder / 'base'} --method {method} --out {out} {more} --deltas"
    merge_models.main([*line.split(), *map(str, inputs)])
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


@pytest.mark.parametrize("method", METHODS)
def test_deltas_give_what_folders_give(overlapping, tmp_path, method):
    more = "--density 0.05" if METHODS[method].thin else ""
    inputs = {kind: files(overlapping, kind) for kind in ("delta", "model")}
    outs = [merge(overlapping, paths, tmp_path / kind, method, more) for kind, paths in inputs.items()]
    merged, other = (weights(out) for out in outs)
    assert same_bits(merged, other)
    assert not same_bits(merged, weights(overlapping / "base"))
    records = [json.loads((out / "merge.json").read_text()) for out in outs]
    assert records[0]["pairs"] == records[1]["pairs"] and records[0]["rule"] == records[1]["rule"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_against_whole_tensors_in_memory(overlapping, tmp_path, method):
    """The command against stacked dense tensors; the rules themselves are checked in test_merge.py."""
    inputs = files(overlapping, "model")
    merged = weights(merge(overlapping, inputs, tmp_path / "out", method, "--weights 1 0.5 2"))
    base, tuned = weights(overlapping / "base"), [weights(overlapping / name) for name in NAMES]
    factors = torch.tensor([1, 0.5, 2])[:, None]
    for name, before in base.items():
        delta = torch.stack([t[name].float() - before.float() for t in tuned]).reshape(3, -1) * factors
        change = delta.sum(0)
        if method == "ties":
            agree = (delta.sign() == torch.where(change >= 0, 1.0, -1.0)) & (delta != 0)
            mass = (agree * factors).sum(0)
            change = (delta * agree).sum(0) / torch.where(mass == 0, 1, mass)
        assert torch.equal(merged[name].flatten(), (before.float().flatten() + change).to(before.dtype)), name


def apply_all(folder: Path) -> dict[str, torch.Tensor]:
    """XOR every delta into the base, one after the other, by the delta reader alone."""
    base, result = open_weights(folder / "base"), {}
    for name in base.names():
        result[name] = base.read(name)
        for file in files(folder, "delta"):
            Delta.open(file).flip_(name, result[name])
    return result


@pytest.mark.parametrize("kind", ["delta", "model"])
def test_sum_of_disjoint_deltas_is_exact_and_says_so(disjoint, tmp_path, capsys, kind):
    out = merge(disjoint, files(disjoint, kind), tmp_path / "out", "sum")
    assert same_bits(weights(out), apply_all(disjoint))
    shown = capsys.readouterr().out
    assert "exact: no entry is changed by two" in shown
    record = json.loads((out / "merge.json").read_text())
    assert record["exact"] and record["shared"] == 0 and all(pair["overlap"] == 0 for pair in record["pairs"])


def test_differences_alone_would_not_be_exact(tmp_path):
    """1 -> 1e-20 in float32: 1 + (1e-20 - 1) is 0. The tuned value itself is taken instead."""
    model, name = new_model("llama"), "model.layers.0.mlp.up_proj.weight"
    for folder, values in (("base", [1.0, -0.0]), ("a", [1e-20, 0.0])):
        model.get_parameter(name).data[0, :2] = torch.tensor(values)
        model.save_pretrained(tmp_path / folder)
    out = weights(merge(tmp_path, [tmp_path / "a"], tmp_path / "sum", "sum"))
    assert same_bits(out, weights(tmp_path / "a"))
    added = weights(merge(tmp_path, [tmp_path / "a"], tmp_path / "added", "task_arithmetic"))
    assert added[name][0, 0] == 0 and str(added[name][0, 1].item()) == "-0.0"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_fp8_among_others(overlapping, tmp_path, dtype):
    for name in ("base", *NAMES):
        shutil.copytree(overlapping / name, tmp_path / name)
        state = weights(overlapping / name)
        state = {n: v.to(dtype) if "up_proj" in n else v for n, v in state.items()}
        save_file(state, tmp_path / name / "model.safetensors")
        extract(tmp_path / "base", tmp_path / name, tmp_path / f"{name}.safetensors")
    for method in ("sum", "ties"):
        outs = [
            merge(tmp_path, files(tmp_path, k), tmp_path / f"{k}_{method}", method)
            for k in ("delta", "model")
        ]
        assert same_bits(*map(weights, outs)) and not same_bits(weights(outs[0]), weights(tmp_path / "base"))


def test_sum_of_overlapping_deltas_is_exact_where_one_alone_changes(overlapping, tmp_path, capsys):
    merged = weights(merge(overlapping, files(overlapping, "delta"), tmp_path / "out", "sum"))
    base, tuned = weights(overlapping / "base"), [weights(overlapping / name) for name in NAMES]
    n_shared = 0
    for name, before in base.items():
        count = sum((t[name] != before).int() for t in tuned)
        alone = torch.stack([torch.where(t[name] != before, t[name], 0) for t in tuned]).sum(0)
        total = (before.float() + sum(t[name].float() - before.float() for t in tuned)).to(before.dtype)
        n_shared += int((count > 1).sum())
        expected = torch.where(count == 0, before, torch.where(count == 1, alone, total))
        assert torch.equal(merged[name], expected), name
    assert f"not exact: {n_shared:,} entries are changed by several" in capsys.readouterr().out


def test_statistics(overlapping, tmp_path, capsys):
    out = merge(overlapping, files(overlapping, "delta"), tmp_path / "out", "ties")
    record = json.loads((out / "merge.json").read_text())
    base = weights(overlapping / "base")
    deltas = [
        torch.cat([(weights(overlapping / n)[name].float() - base[name].float()).flatten() for name in base])
        for n in NAMES
    ]
    assert record["entries"] == len(deltas[0])
    assert [v["changed"] for v in record["vectors"]] == [int(d.count_nonzero()) for d in deltas]
    assert [v["norm"] for v in record["vectors"]] == pytest.approx(
        [d.norm().item() for d in deltas], rel=1e-5
    )
    for pair in record["pairs"]:
        a, b = (deltas[i] for i in pair["vectors"])
        both = (a != 0) & (b != 0)
        assert pair["overlap"] == int(both.sum()) > 0
        assert pair["overlap_share"] == pair["overlap"] / min(int(a.count_nonzero()), int(b.count_nonzero()))
        assert pair["sign_conflicts"] == int((a * b < 0).sum()) > 0
        assert pair["sign_conflict_share"] == pair["sign_conflicts"] / pair["overlap"]
        assert pair["cosine"] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5)
        assert pair["by_chance"] == pytest.approx(pair["overlap"], rel=0.2)  # independent draws
    shown = capsys.readouterr().out
    assert f"{record['pairs'][0]['overlap']:,}" in shown and "cosine" in shown


@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox", "qwen2"])
def test_architectures(tmp_path, kind):
    """Experts that are stacked in memory, renamed heads, tied embeddings: transformers loads the result."""
    make(tmp_path, kind, torch.float32)
    folders = ["base", *NAMES, merge(tmp_path, files(tmp_path, "delta"), tmp_path / "out", "sum").name]
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in folders]
    expected, *tuned, merged = states
    for name, before in expected.items():
        for state in tuned:  # disjoint: no two differ from the base at one entry
            expected[name] = torch.where(state[name] != before, state[name], expected[name])
    assert same_bits(merged, expected)


def test_folder_is_whole(overlapping, tmp_path):
    out = merge(overlapping, files(overlapping, "delta"), tmp_path / "out", "ties", "--density 0.5")
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (overlapping / "base" / file).read_bytes()
    assert {value.dtype for value in weights(out).values()} == {torch.bfloat16}
    assert not list(tmp_path.glob(".*"))
    record = json.loads((out / "merge.json").read_text())
    assert record["rule"]["densities"] == [0.5] * 3 and record["base_hash"] and record["versions"]


def test_policy_and_mixed_inputs(disjoint, tmp_path):
    """A run's fp32 policy.pt beside a delta and a folder: rounded to the base's dtype as in conversion."""
    (tmp_path / "epoch-1").mkdir()
    state = AutoModelForCausalLM.from_pretrained(disjoint / "b", dtype=torch.float32).state_dict()
    save_policy(tmp_path / "epoch-1" / "policy.pt", state)
    inputs = [disjoint / "a.safetensors", tmp_path / "epoch-1", disjoint / "c"]
    assert same_bits(weights(merge(disjoint, inputs, tmp_path / "out", "sum")), apply_all(disjoint))


def test_evaluation_writes_prompts_as_the_runs_did(disjoint, tmp_path, capsys):
    """One input is a converted folder, one a delta of another such folder, one unknown."""
    for name, choice in (("a", "auto"), ("b", "auto"), ("c", "never")):
        shutil.copytree(disjoint / name, tmp_path / name)
        record = {"files": [], "chat_template": choice, "max_length": 64, "max_prompt_length": 32}
        (tmp_path / name / "conversion.json").write_text(json.dumps(record))
    extract(disjoint / "base", tmp_path / "b", tmp_path / "b.safetensors")
    inputs = [tmp_path / "a", tmp_path / "b.safetensors", disjoint / "c"]
    alike = str(merge(disjoint, inputs, tmp_path / "alike", "ties"))
    assert recorded_prompting(alike) == ("auto", Limits(64, 32))
    assert "--chat_template" not in capsys.readouterr().out
    (tmp_path / "b.safetensors").rename(tmp_path / "renamed")  # the name does not matter
    assert recorded_prompting(str(tmp_path / "renamed"))[0] == "auto"
    inputs[1] = tmp_path / "renamed"
    differing = str(merge(disjoint, [*inputs, tmp_path / "c"], tmp_path / "differing", "ties"))
    assert recorded_prompting(differing) == ("never", Limits(64, 32))
    assert "trained with chat_template auto and never" in capsys.readouterr().out


def refused(folder: Path, inputs: list[Path], out: Path, method: str = "ties", more: str = "") -> str:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(SystemExit) as error:
        merge(folder, inputs, out, method, more)
    assert sorted(out.parent.rglob("*")) == before, "something was written"
    return str(error.value)


def test_deltas_of_different_bases(disjoint, tmp_path):
    new_model("llama", seed=9).bfloat16().save_pretrained(tmp_path / "other")
    new_model("llama", seed=8).bfloat16().save_pretrained(tmp_path / "tuned")
    strange = tmp_path / "x.safetensors"
    extract(tmp_path / "other", tmp_path / "tuned", strange)
    assert "different bases" in refused(disjoint, [disjoint / "a.safetensors", strange], tmp_path / "out")
    assert "is not what the deltas were taken from" in refused(disjoint, [strange], tmp_path / "out")


def test_another_model_and_another_vocabulary(disjoint, tmp_path):
    model = new_model("llama").bfloat16()
    model.resize_token_embeddings(65)
    model.save_pretrained(tmp_path / "grown")
    new_model("gpt_neox").save_pretrained(tmp_path / "neox")
    extract(tmp_path / "neox", tmp_path / "neox", tmp_path / "neox.safetensors")
    state = AutoModelForCausalLM.from_pretrained(disjoint / "a").state_dict()
    state["model.layers.2.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"]
    save_policy(tmp_path / "deeper.pt", state)
    for name, words in (
        ("grown", "vocabulary"),
        ("neox", "does not belong to"),
        ("neox.safetensors", "was not taken from the base"),
        ("deeper.pt", "model.layers.2"),
    ):
        assert words in refused(disjoint, [disjoint / "a", tmp_path / name], tmp_path / "out")


def test_everything_is_refused_at_once_and_nothing_is_written(disjoint, tmp_path):
    out, new, policy = tmp_path / "out", tmp_path / "new", tmp_path / "policy.pt"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    save_policy(policy, {"x": torch.ones(1)})
    text = refused(disjoint, [disjoint / "a", tmp_path / "absent", tmp_path / "gone"], out)
    assert all(word in text for word in ("--out", "not empty", "absent", "gone"))
    for method, more, words in (
        ("ties", "--density 0", "--density 0: "),
        ("ties", "--weights 1 2 --lambda inf", "--weights 1 2 --lambda inf: every one"),
        ("tiez", "", "--method tiez: not one of"),
        ("ties", f"--base {policy}", "config.json"),
        ("ties", "--max_shard_size big", "--max_shard_size big: give"),
    ):
        assert words in refused(disjoint, [disjoint / "a"], new, method, more)


def test_a_write_that_fails_leaves_nothing(disjoint, tmp_path, full_disk):
    with pytest.raises(SystemExit, match="File too large"):
        merge(disjoint, [disjoint / "a"], tmp_path / "out", "sum")
    assert not list(tmp_path.iterdir())


def test_help_names_every_method(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["merge_models.py", "--help"])
    with pytest.raises(SystemExit):
        merge_models.main()
    shown = capsys.readouterr().out
    assert all(method in shown for method in METHODS)


def test_what_adds_nothing_or_counts_double_is_refused(disjoint, tmp_path):
    a, b, _ = files(disjoint, "delta")
    copy = shutil.copy(a, tmp_path / "copy.safetensors")
    empty = tmp_path / "empty.safetensors"
    extract(disjoint / "base", disjoint / "base", empty)
    for inputs, more, message in (
        ([a, b], "--weights 0 0", "weights 0 0: nothing would be added"),
        ([a, b], "--lambda 0", "lambda 0: nothing would be added"),
        ([a, a], "", "is named twice"),
        ([a, copy], "", "are copies of one delta"),
        ([a, empty], "", "empty.safetensors changes nothing: leave it out"),
        ([a, disjoint / "base"], "", "is the base itself"),
    ):
        assert message in refused(disjoint, inputs, tmp_path / "out", more=more)


@pytest.mark.parametrize("side", ["base", "a"])
def test_nan_is_not_merged(side, disjoint, tmp_path):
    for name in ("base", "a"):
        shutil.copytree(disjoint / name, tmp_path / name)
    state = weights(tmp_path / side)
    state["model.norm.weight"][2] = float("inf")
    save_file(state, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
    shown = refused(tmp_path, [tmp_path / "a"], tmp_path / "out")
    assert f"{tmp_path / side}" in shown and "model.norm.weight holds NaN or infinity" in shown


def test_a_model_with_a_layer_missing_is_not_merged(disjoint, tmp_path):
    shutil.copytree(disjoint / "a", tmp_path / "a")
    state = {name: value for name, value in weights(tmp_path / "a").items() if "layers.1." not in name}
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    assert "missing there: model.layers.1" in refused(disjoint, [tmp_path / "a"], tmp_path / "out")


def test_what_was_put_there_meanwhile_is_not_replaced(disjoint, tmp_path, monkeypatch, capsys):
    real = merge_folder.write_json

    def write(path, content):
        real(path, content)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "results.json").write_text("mine")

    monkeypatch.setattr(merge_folder, "write_json", write)
    with pytest.raises(SystemExit, match=r"--out .* exists and is not empty"):
        merge(disjoint, files(disjoint, "delta"), tmp_path / "out", "sum")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]
