"""extract_masks.py as a user runs it: files, table, refusals, memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import extract_masks
import lota
from lota.masks import Mask
from tests.test_selection import make_pair

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def pair(tmp_path):
    return make_pair(tmp_path, "qwen2", ties=False)


def test_files_summary_table_and_next_command(pair, tmp_path, capsys):
    base_path, tuned_path, base, _ = pair
    out = tmp_path / "masks"
    typed = ["0.5", "0.90", "0.9"]
    sides = f"--base {base_path} --tuned {tuned_path}"
    extract_masks.main(f"{sides} --name gsm8k --out {out} --sparsities {' '.join(typed)}".split())
    shown = capsys.readouterr().out
    files = sorted(path.name for path in (out / "gsm8k").iterdir())
    assert files == ["0.5_mask.pt", "0.90_mask.pt", "0.9_mask.pt", "summary.json"]
    expected = lota.extract(base_path, tuned_path, [0.5, 0.9])
    summary = json.loads((out / "gsm8k" / "summary.json").read_text())
    for name in typed:
        mask = Mask.load(out / "gsm8k" / f"{name}_mask.pt")
        mask.check(base)
        assert all(torch.equal(mask.bits[n], bits) for n, bits in expected[float(name)].bits.items())
        row = summary["masks"][name]
        assert row["kept"] == mask.n_kept and row["threshold"] == mask.meta["threshold"] > 0
        assert {n: v["kept"] for n, v in row["per_tensor"].items()} == {n: mask.kept(n) for n in mask.names}
        assert sum(layer["kept"] for layer in row["per_layer"].values()) == mask.n_kept
        assert list(row["per_layer"]) == ["0", "1"]
        assert re.search(rf"{re.escape(name)} +{mask.n_kept:,} +{mask.n_total:,}", shown)
    assert f"train_single_gpu.py mask_path={out}/gsm8k/0.9_mask.pt" in shown
    assert f"model.name_or_path={base_path} 'datasets" in shown


def test_the_next_command_starts_from_the_weights_that_the_mask_is_of(pair, tmp_path, capsys):
    folder, _, base, _ = pair
    policy = tmp_path / "policy.pt"
    torch.save({"step_idx": 1, "state": base.state_dict(), "metrics": {}}, policy)
    sides = f"--base {policy} --model {folder} --score magnitude"
    extract_masks.main(f"{sides} --name x --out {tmp_path} --sparsities 0.9".split())
    assert f"model.name_or_path={folder} model.archive={policy} 'datasets" in capsys.readouterr().out


def test_dense_format_lists_every_parameter(pair, tmp_path):
    base_path, tuned_path, base, _ = pair
    sides = f"--base {base_path} --tuned {tuned_path}"
    extract_masks.main(f"{sides} --name x --out {tmp_path} --sparsities 0.9 --format dense".split())
    content = torch.load(tmp_path / "x" / "0.9_mask.pt", weights_only=True)
    expected = lota.extract(base_path, tuned_path, [0.9])[0.9]
    assert list(content) == [name for name, _ in base.named_parameters()]
    for name, parameter in base.named_parameters():
        assert content[name].dtype == torch.bool and content[name].shape == parameter.shape
        kept = expected.dense(name) if name in expected else torch.zeros(parameter.shape, dtype=torch.bool)
        assert torch.equal(content[name], ~kept)


def test_random_per_tensor_protected_without_tuned(pair, tmp_path):
    base_path, _, _, _ = pair
    for name, more in [("a", ""), ("b", f"--protect {tmp_path}/a/0.5_mask.pt")]:
        extract_masks.main(
            f"--base {base_path} --name {name} --out {tmp_path} --sparsities 0.5 --score random --seed 3 "
            f"--per tensor {more}".split()
        )
    first, second = (Mask.load(tmp_path / name / "0.5_mask.pt") for name in "ab")
    assert first.overlap(second) == 0
    assert all(first.kept(name) == second.kept(name) == first.numel(name) // 2 for name in first.names)


@pytest.mark.parametrize(
    "changed, message",
    [
        ("--sparsities 1.0", "--sparsities 1.0"),
        ("--sparsities 0.5 ninety", "'ninety' is not a number"),
        ("--tuned TMP/nothing", "TMP/nothing does not exist"),
        ("--base TMP/nothing", "TMP/nothing does not exist"),
        ("--scope [", "regular expression"),
        ("--scope nothing_matches", "nothing_matches"),
        ("--protect TMP/none.pt", "none.pt does not exist"),
        ("--tuned TMP/cut.pt", "cannot be read"),
        ("--model TMP/base/config.json/x", "base/config.json/x"),
    ],
)
def test_refusals_leave_nothing_behind(changed, message, pair, tmp_path):
    base_path, tuned_path, base, _ = pair
    torch.save({"step_idx": 0, "state": base.state_dict(), "metrics": {}}, tmp_path / "cut.pt")
    content = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) * 2 // 3])
    arguments = {"--base": str(base_path), "--tuned": str(tuned_path), "--sparsities": "0.5", "--name": "x"}
    flag, _, value = changed.replace("TMP", str(tmp_path)).partition(" ")
    arguments = {**arguments, "--out": str(tmp_path / "masks"), flag: value}
    with pytest.raises(SystemExit) as stopped:
        extract_masks.main([word for key, text in arguments.items() for word in (key, *text.split())])
    assert message.replace("TMP", str(tmp_path)) in str(stopped.value.code)
    assert not (tmp_path / "masks").exists()


def test_task_vector_without_tuned(pair, tmp_path):
    with pytest.raises(SystemExit, match="--tuned"):
        extract_masks.main(f"--base {pair[0]} --sparsities 0.5 --name x --out {tmp_path}/masks".split())


MEMORY = """
import sys
import torch
from lota.models.pair import open_pair
from lota.masks.extract.select import Quota, Rule, extract, select

def peak():  # not getrusage: a program started by a large one begins with that one's peak
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

extract(sys.argv[1], sys.argv[2], [0.5])  # imports, buffers
pair = open_pair(sys.argv[3], sys.argv[4])
before = peak()
masks = select(Quota(pair, [0.5, 0.9, 0.99], Rule()))
print(masks[0.9].n_total, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_chunks_and_masks(pair, tmp_path):
    """1.3e7 entries in fp32 are 50 MB a side: neither may show in the peak, nor half of one."""
    from benchmarks.extraction import make_pair as make_large

    base, tuned = make_large(tmp_path / "large", 13_000_000, hidden=512)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, (*pair[:2], base, tuned))],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    entries, grown = map(int, result.stdout.split())
    assert entries > 12_000_000
    assert grown < 3 * entries / 8 + 40 * 2**20
