"""apply and revert give the tuned model and the base again, bit for bit, or leave nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import hf_models
import pytest
import torch
from delta_models import change, delta_pair, disjoint_deltas, same_files, save_model, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lota.delta import Delta, apply, extract, revert, verify
from lota.models.hashing import content_hash
from lota.models.weights import open_weights
from lota.share.delta.cli import entropy_bytes, main


@pytest.mark.parametrize("kind", list(hf_models.CONFIGS))
def test_there_and_back_for_every_architecture(tmp_path, kind):
    base, tuned, delta = delta_pair(tmp_path, kind)
    apply(base, delta, tmp_path / "there")
    assert same_files(tmp_path / "there", tuned) and not same_files(tmp_path / "there", base)
    revert(tmp_path / "there", delta, tmp_path / "back")
    assert same_files(tmp_path / "back", base)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (tmp_path / "there", tuned)
    ]
    assert torch.equal(*map(hf_models.logits, models))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_in_shards(tmp_path, dtype):
    base, tuned, delta = delta_pair(tmp_path, dtype=dtype, max_shard_size="15KB")
    apply(base, delta, there := tmp_path / "there", max_shard_size="13KB")
    assert all(len(list(folder.glob("*.safetensors"))) > 2 for folder in (base, there))
    revert(there, delta, tmp_path / "back")
    assert same_files(there, tuned) and same_files(tmp_path / "back", base)


KINDS = {
    "norm": torch.float32, "down_proj": torch.float16, "up_proj": torch.float8_e4m3fn,
    "gate_proj": torch.float8_e5m2, "q_proj": torch.int8, "k_proj": torch.int16, "v_proj": torch.bool,
}  # fmt: skip


def test_dtypes_may_be_mixed(tmp_path):
    """Whatever a file may have: parameters are XORed, other tensors copied."""
    model = hf_models.new_model("llama")
    for name in ("base", "tuned"):
        state = {}
        for n, p in model.named_parameters():
            dtype = next((KINDS[kind] for kind in KINDS if kind in n), torch.bfloat16)
            state[n] = p > 0 if dtype == torch.bool else (100 * p.detach()).to(dtype)
        others = {f"other.{dtype}": torch.arange(5).to(dtype) for dtype in KINDS.values()}
        model.config.save_pretrained(tmp_path / name)
        save_file({**state, **others}, tmp_path / name / "model.safetensors")
        change(model, density=0.5)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.safetensors")
    assert all(any(kind in name for name in Delta.open(tmp_path / "d.safetensors").names) for kind in KINDS)
    apply(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "there")
    assert same_files(tmp_path / "there", tmp_path / "tuned")
    revert(tmp_path / "tuned", tmp_path / "d.safetensors", tmp_path / "back")
    assert same_files(tmp_path / "back", tmp_path / "base")


def test_apply_writes_what_the_converter_writes(tmp_path):
    from lota.share.convert import convert_policy

    """From a policy in float32, too: the tuned model is taken in the dtype of the base's files."""
    base, there = tmp_path / "base", tmp_path / "there"
    state = change(save_model(base).float()).state_dict()
    hf_models.word_tokenizer(hf_models.ROWS).save_pretrained(base)
    policy = hf_models.save_policy(tmp_path / "policy.pt", state)
    convert_policy(base, policy, tmp_path / "converted")
    extract(base, policy, tmp_path / "d.safetensors")
    apply(base, tmp_path / "d.safetensors", there)
    assert same_files(there, tmp_path / "converted")
    assert (there / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_only_the_right_model_is_changed(tmp_path):
    base, tuned, delta = delta_pair(tmp_path)
    other, almost = tmp_path / "other", tmp_path / "almost"
    hf_models.new_model("llama", seed=3).bfloat16().save_pretrained(other)
    shutil.copytree(base, almost)
    weights = tensors(base)
    weights["model.norm.weight"][3] = 7.0  # a weight that the delta would not overwrite
    save_file(weights, almost / "model.safetensors")
    before = listing(tmp_path)
    for write, wrong, message in (
        *(
            (apply, model, r"is not the base model of .*d\.safetensors: its weights")
            for model in (other, almost)
        ),
        *((revert, model, "is not the tuned model") for model in (other, almost)),
        (apply, tuned, "is not the base but the tuned model"),
        (revert, base, "is not the tuned but the base model"),
    ):
        with pytest.raises(ValueError, match=message):
            write(wrong, delta, tmp_path / "out")
    for wrong in (other, almost):
        with pytest.raises(ValueError, match="is not the base model"):
            verify(wrong, delta)
    assert listing(tmp_path) == before
    assert verify(base, delta)["tuned_hash"] == content_hash(open_weights(tuned))


def test_damage_is_found_before_anything_is_written(tmp_path):
    base, tuned, delta = delta_pair(tmp_path)
    whole = delta.read_bytes()
    before = listing(tmp_path)
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:5000] + b"\0" + whole[5001:], b""):
        assert damaged != whole
        delta.write_bytes(damaged)
        for write, model in ((apply, base), (revert, tuned)):
            with pytest.raises(ValueError, match=r"d\.safetensors"):
                write(model, delta, tmp_path / "out")
    assert listing(tmp_path) == before


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    base, _, delta = delta_pair(tmp_path)
    before = listing(tmp_path)
    flips = iter([None] * 7)

    def fail(self, name, value):
        if next(flips, "last") == "last":
            raise OSError("disk full")

    monkeypatch.setattr(Delta, "flip_", fail)
    with pytest.raises(OSError, match="disk full"):
        apply(base, delta, tmp_path / "out")
    monkeypatch.setattr(Delta, "flip_", lambda self, name, value: None)
    with pytest.raises(ValueError, match="was not written"):  # what came out is checked
        apply(base, delta, tmp_path / "out")
    assert listing(tmp_path) == before


def test_folders_that_must_not_be_replaced(tmp_path):
    base, tuned, delta = delta_pair(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in (base, tuned, delta):
        with pytest.raises(ValueError, match=r"out=.*name"):
            apply(base, delta, out)
    with pytest.raises(ValueError, match="is no Hugging Face folder"):
        apply(hf_models.save_policy(tmp_path / "policy.pt", {"w": torch.zeros(1)}), delta, tmp_path / "out")
    with pytest.raises(ValueError, match="max_shard_size"):
        apply(base, delta, tmp_path / "out", max_shard_size="much")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (tmp_path / "out").exists()
    for _ in range(2):  # our own folders may be
        apply(base, delta, tmp_path / "out")
    assert same_files(tmp_path / "out", tuned)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["delta"] == str(delta)


def test_disjoint_deltas_commute(tmp_path):
    base, tuned, deltas = disjoint_deltas(tmp_path, n=2)
    for name, start in base.items():
        one, other = start.clone(), start.clone()
        for delta, last in zip(deltas, reversed(deltas), strict=True):
            delta.flip_(name, one)
            last.flip_(name, other)
        assert torch.equal(one, other)
        assert torch.equal(one, torch.where(tuned[0][name] != start, tuned[0][name], tuned[1][name]))
        deltas[0].flip_(name, one)
        assert torch.equal(one, tuned[1][name])


def test_the_command_line(tmp_path, capsys):
    base, tuned, _ = delta_pair(tmp_path)
    delta, there, back = (tmp_path / name for name in ("sql.safetensors", "there", "back"))

    def run(line: str) -> tuple[int, str]:
        code = main(line.split())
        shown = capsys.readouterr()
        return code, shown.out or shown.err

    described = run(f"extract --base {base} --tuned {tuned} --out {delta} --task sql")
    assert described[0] == 0 and described == run(f"show {delta}")
    found = Delta.open(delta)
    assert f"{found.n_changed:,} of {found.meta['entries']:,} entries changed" in described[1]
    assert found.meta["base_hash"] in described[1] and "task          sql" in described[1]
    assert f"{delta.stat().st_size:,} bytes" in described[1]
    assert run(f"verify --base {base} --delta {delta}")[1].startswith("ok: ")
    assert run(f"apply --model {base} --delta {delta} --out {there}") == (0, f"wrote {there}\n")
    assert run(f"revert --model {there} --delta {delta} --out {back}") == (0, f"wrote {back}\n")
    assert same_files(there, tuned) and same_files(back, base)
    code, shown = run(f"apply --model {tuned} --delta {delta} --out {tmp_path / 'out'}")
    assert code == 1 and shown.startswith("error: ")
    assert run(f"apply --model {base} --delta {delta} --out {base}")[1].startswith(f"error: --out {base} is")


@pytest.mark.slow
def test_the_module_runs_without_a_warning(tmp_path):
    delta = delta_pair(tmp_path)[2]
    command = [sys.executable, "-W", "error", "-m", "lota.delta", "show", str(delta)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "" and "entries changed" in done.stdout


def test_entropy_of_what_changed(tmp_path):
    base, tuned = torch.zeros(100_000).half(), torch.zeros(100_000).half()
    tuned[torch.randperm(100_000)[:1000]] = 1.0
    for name, value in (("b", base), ("t", tuned)):
        hf_models.save_policy(tmp_path / f"{name}.pt", {"w": value, "untouched": base.clone()})
    extract(tmp_path / "b.pt", tmp_path / "t.pt", tmp_path / "d.safetensors")
    found = entropy_bytes(Delta.open(tmp_path / "d.safetensors"))
    assert found == pytest.approx(1000 * (8.079 + 16) / 8, rel=1e-3)


PEAK = """
import re, sys
from lota.delta import apply, extract, verify
from lota.models.scope import meta_model

def memory(field):  # MiB
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def peak(work, *paths):
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = memory("VmRSS")
    work(*paths)
    return memory("VmHWM") - before

base, tuned, delta, out = sys.argv[1:]
meta_model(base)
print(peak(extract, base, tuned, delta), peak(apply, base, delta, out), peak(verify, base, delta))
"""


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
    model = hf_models.new_model("llama", num_key_value_heads=4, **sizes).bfloat16()
    model.save_pretrained(tmp_path / "base")
    for p in model.parameters():
        p.data.view(-1)[::10] += 1
    model.save_pretrained(tmp_path / "tuned")
    size = sum(2 * p.numel() for p in model.parameters()) / 2**20
    paths = [str(tmp_path / name) for name in ("base", "tuned", "d.safetensors", "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert size > 180  # MiB; the largest tensor has 2
    assert max(map(float, done.stdout.split())) < 70
