"""extract_masks.py as a user runs it: files, table, refusals, memory, and saliencies that look at data."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil

import pytest
import torch
from memory import needs_proc, printed
from transformers import AutoModelForCausalLM, AutoTokenizer

import benchmarks.extraction
import extract_masks
import lota
from lota.masks import Mask, kept_count
from lota.models.scope import find_scope
from tests.hf_models import save_model, save_policy
from tests.mask_pairs import make_pair, sorted_masks
from tests.mini_task import TASK
from tests.runs import MODEL, composed, with_mini_task


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
        assert (mask.meta["scope_share"], mask.meta["left_out"]) == (1, "")
    assert "the scope takes 100.0 % of the matrices" in shown
    assert f"train_single_gpu.py mask_path={out}/gsm8k/0.9_mask.pt" in shown
    assert f"model.name_or_path={base_path} 'datasets" in shown


def test_the_next_command_reads_the_data_of_the_tuned_run_and_quotes_paths(pair, tmp_path, capsys):
    base, tuned, *_ = pair
    run, out = tmp_path / "my run", tmp_path / "my masks"
    shutil.copytree(tuned, run / "epoch-1")
    (run / "config.yaml").write_text("model: {}\ndata_dir: /my data\n")
    sides = ["--base", str(base), "--tuned", str(run / "epoch-1")]
    extract_masks.main([*sides, "--name", "x", "--out", str(out), "--sparsities", "0.9"])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])[3:]
    config = composed(*(word.replace("[TASK]", "[toy_sort]") for word in words))
    assert (config.mask_path, config.data_dir) == (f"{out}/x/0.9_mask.pt", "/my data")


def test_the_next_command_starts_from_the_weights_that_the_mask_is_of(pair, tmp_path, capsys):
    folder, _, base, _ = pair
    policy = tmp_path / "policy.pt"
    save_policy(policy, base.state_dict())
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
        ("--sparsities -0.0", "'-0.0': write 0.0"),
        ("--name ../../up", "--name ../../up: must be a name inside the folder"),
        ("--name TMP/abs", "must be a name inside the folder"),
        ("--name .", "--name .: must name a folder"),
        (f"--name {'x' * 300}", "no part may be longer than 200 bytes"),
        ("--tuned TMP/nothing", "TMP/nothing does not exist"),
        ("--base TMP/nothing", "TMP/nothing does not exist"),
        ("--scope [", "regular expression"),
        ("--scope nothing_matches", "nothing_matches"),
        ("--protect TMP/none.pt", "none.pt does not exist"),
        ("--protect TMP/all.pt", "the protected masks leave no entry of the scope free"),
        ("--tuned TMP/base", "--tuned TMP/base is the base itself: give the fine-tuned model"),
        ("--sparsities 0.9999999", "--sparsities 0.9999999: no entry would be kept"),
        ("--tuned TMP/cut.pt", "cannot be read"),
        ("--model TMP/base/config.json/x", "base/config.json/x"),
    ],
)
def test_refusals_leave_nothing_behind(changed, message, pair, tmp_path):
    base_path, tuned_path, base, _ = pair
    content = save_policy(tmp_path / "cut.pt", base.state_dict()).read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) * 2 // 3])
    every = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in find_scope(base).items()}
    Mask.from_dense(every).save(tmp_path / "all.pt")
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
from lota.models.pair import open_pair
from lota.masks.extract.select import Quota, Rule, extract, select

extract(sys.argv[1], sys.argv[2], [0.5])  # imports, buffers
pair = open_pair(sys.argv[3], sys.argv[4])
before = memory("VmHWM")
masks = select(Quota(pair, [0.5, 0.9, 0.99], Rule()))
print(masks[0.9].n_total, memory("VmHWM") - before)
"""


@pytest.mark.slow
@needs_proc
def test_peak_memory_is_chunks_and_masks(pair, tmp_path):
    """1.3e7 entries in fp32 are 50 MB a side: neither may show in the peak, nor half of one."""
    large = benchmarks.extraction.make_pair(tmp_path / "large", 13_000_000, hidden=512)
    entries, grown = printed(MEMORY, *pair[:2], *large)
    assert entries > 12_000_000
    assert grown < 3 * entries / 8 + 40 * 2**20


# Saliencies that look at data, on the embedded model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(with_mini_task(tmp_path))
    return tmp_path


def run(arguments: str) -> None:
    extract_masks.main(f"--base {MODEL} --name m --sparsities 0.5 0.9 {arguments}".split())


def gradients(n_batches: int, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Per batch the gradient of the summed response loss, each example on its own without padding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    rows = TASK.load("train", None)
    order = list(range(len(rows)))
    random.Random(f"{seed}-0").shuffle(order)  # the order of the first epoch
    found = []
    for start in range(0, n_batches * batch_size, batch_size):
        model.zero_grad()
        for row in (rows[i] for i in order[start : start + batch_size]):
            prompt = tokenizer(TASK.prompt(row)).input_ids
            response = tokenizer(TASK.target(row), add_special_tokens=False).input_ids
            response = [*response, tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if n in find_scope(model)})
    return found


@pytest.mark.parametrize("score", ["gradient", "fisher", "snip"])
def test_masks_from_data(score, folder, capsys):
    run(f"--score {score} --datasets mini --score_batches 3 --batch_size 4 --seed 5 --out {folder}/masks")
    weights = dict(AutoModelForCausalLM.from_pretrained(MODEL).named_parameters())
    total: dict[str, torch.Tensor] = {}
    for grads in gradients(3, 4, seed=5):
        for name, grad in grads.items():
            part = grad.square() if score == "fisher" else grad
            total[name] = total[name] + part if name in total else part
    if score == "snip":
        total = {name: value * weights[name].detach() for name, value in total.items()}
    summary = json.loads((folder / "masks" / "m" / "summary.json").read_text())
    for typed in ("0.5", "0.9"):
        mask = Mask.load(folder / "masks" / "m" / f"{typed}_mask.pt")
        expected = sorted_masks(
            {n: v.abs() for n, v in total.items()}, kept_count(float(typed), mask.n_total)
        )
        differ = sum((mask.dense(n) != flags).sum().item() for n, flags in expected.items())
        assert differ <= 1e-4 * mask.n_kept  # the last digits of sums in another order
        data = mask.meta["data"]
        assert (data["datasets"], data["batches"], data["examples"]) == (["mini"], 3, 12)
        assert summary["masks"][typed]["data"] == data and mask.meta["score"] == score
    assert "0.9_mask.pt" in capsys.readouterr().out


def test_what_is_looked_at_is_recorded(folder):
    def data_of(options):
        run(f"--score snip --datasets mini --score_batches 2 {options} --out {folder}/masks")
        mask = Mask.load(folder / "masks" / "m" / "0.9_mask.pt")
        return mask.meta["data"], mask

    first, mask = data_of("--batch_size 2")
    assert data_of("--batch_size 2")[0] == first
    assert data_of("--batch_size 2 --seed 1")[0]["data_hash"] != first["data_hash"]
    longer, _ = data_of("--batch_size 100")
    assert (longer["batches"], longer["examples"]) == (1, 40)  # at most one pass
    coarse, other = data_of(
        "--batch_size 2 --score_dtype bfloat16 --dtype bfloat16 --activation_checkpointing"
    )
    assert (coarse["dtype"], coarse["score_dtype"]) == ("bfloat16", "bfloat16")
    assert 0.85 * mask.n_kept < mask.overlap(other) < mask.n_kept == other.n_kept


def test_base_of_a_run(folder):
    """A policy.pt and a folder that gives its structure: the same mask as from the folder."""
    state = AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
    save_policy(folder / "policy.pt", state)
    options = "--sparsities 0.9 --score snip --datasets mini --score_batches 2"
    run(f"{options} --out {folder}/a")
    extract_masks.main(
        f"--base {folder}/policy.pt --model {MODEL} --name m {options} --out {folder}/b".split()
    )
    first, second = (Mask.load(folder / out / "m" / "0.9_mask.pt") for out in "ab")
    assert all(torch.equal(first.bits[name], second.bits[name]) for name in first.names)


def test_rows_by_data(folder):
    run(f"--score snip --datasets mini --score_batches 2 --granularity row --per layer --out {folder}/masks")
    mask = Mask.load(folder / "masks" / "m" / "0.9_mask.pt")
    assert (mask.meta["per"], mask.meta["granularity"]) == ("layer", "row")
    for name in mask.names:
        by_row = mask.dense(name).float().mean(1)
        assert ((by_row == 0) | (by_row == 1)).all()
    assert 0 < mask.n_kept <= kept_count(0.9, mask.n_total)


@pytest.mark.parametrize("score", ["random", "magnitude", "gradient"])
@pytest.mark.parametrize("granularity, tall, wide", [("column", 10**6, 1), ("block --block 32", 32, 32)])
def test_columns_and_blocks_by_other_scores(score, granularity, tall, wide, folder):
    """Neither a row nor a block of the default side would do; of what is kept nothing is kept in part."""
    data = "--datasets mini --score_batches 2" if score == "gradient" else ""
    run(f"--score {score} {data} --granularity {granularity} --out {folder}/masks")
    mask = Mask.load(folder / "masks" / "m" / "0.9_mask.pt")
    assert mask.meta["score"] == score
    assert (mask.meta["granularity"], mask.meta["block"]) == (
        granularity.split()[0],
        32 if wide > 1 else None,
    )
    smaller = set()
    for name in mask.names:
        for lines in mask.dense(name).split(tall):
            for unit in lines.split(wide, dim=1):
                assert unit.all() or not unit.any()
                smaller.add(unit.numel())
    k = kept_count(0.9, mask.n_total)
    assert 0 <= k - mask.n_kept < min(smaller)
    assert len(smaller) > 1  # the last blocks, and the columns of short matrices


@pytest.mark.parametrize(
    "options, messages",
    [
        ("--score gradient", ["--datasets null: name the tasks"]),
        (
            "--score fischer --datasets mini --per module",
            ["--score 'fischer'", "did you mean fisher", "--per 'module'"],
        ),
        ("--score snip --datasets minni", ["unknown task 'minni'"]),
        ("--score snip --datasets mini --score_batches 0", ["--score_batches 0: must be at least 1"]),
        ("--score snip --datasets mini --batch_size 0", ["--batch_size 0: must be at least 1"]),
        (
            "--score snip --datasets mini --score_dtype float16",
            ["--score_dtype float16: choose one of auto, float32"],
        ),
        ("--score snip --datasets mini --dtype half", ["--dtype half: choose one of float32"]),
        ("--score snip --datasets mini --max_prompt_length 600", ["--max_prompt_length 600 leaves no room"]),
        ("--score snip --datasets mini --device tpu", ["--device tpu"]),
        ("--score snip --datasets mini --tokenizer_path nowhere", ["no tokenizer at nowhere"]),
        (
            "--score snip --granularity rows --protect none.pt --score_dtype int8",
            [
                "did you mean row",
                "none.pt does not exist",
                "--datasets null: name the tasks",
                "--score_dtype int8",
            ],
        ),
        ("--per module", ["--per 'module'", "--tuned"]),
    ],
)
def test_refusals_tell_all_and_load_nothing(options, messages, folder, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lota.train.run_model.load_model", load)
    with pytest.raises(SystemExit) as stopped:
        run(f"{options} --out {folder}/masks")
    for message in messages:
        assert message in str(stopped.value.code)
    assert not (folder / "masks").exists()


def test_flags_that_nothing_reads_are_told(folder, capsys):
    run(f"--score magnitude --tuned nowhere --datasets mini --batch_size 4 --seed 3 --out {folder}/masks")
    shown = capsys.readouterr().err
    assert (
        "not used here: --datasets, --batch_size, --tuned, --seed (--score magnitude --granularity element)"
        in shown
    )
    run(f"--score random --seed 3 --out {folder}/masks")
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["path", "copy"])
def test_base_and_tuned_that_are_the_same_are_refused(how, pair, tmp_path):
    """Such a mask keeps nothing, and nothing would train with it."""
    base = pair[0]
    tuned = base if how == "path" else shutil.copytree(base, tmp_path / "copy")
    message = "is the base itself" if how == "path" else "has the weights of .* in every entry of the scope"
    with pytest.raises(SystemExit, match=rf"--tuned {tuned} {message}.*: give the fine-tuned model"):
        extract_masks.main(
            f"--base {base} --tuned {tuned} --name x --out {tmp_path} --sparsities 0.9".split()
        )
    assert not (tmp_path / "x").exists()


def test_base_and_tuned_in_each_others_place_are_told(pair, tmp_path, caplog):
    base, tuned, *_ = pair
    run = tmp_path / "run" / "epoch-1"
    run.mkdir(parents=True)
    (run.parent / "config.yaml").write_text(f"model:\n  name_or_path: {base}\n")
    save_policy(run / "policy.pt", AutoModelForCausalLM.from_pretrained(tuned).state_dict())
    lota.extract(base, run, [0.9])
    assert "swapped" not in caplog.text
    lota.extract(run, base, [0.9])
    assert f"{run} was trained from {base} by its own record: are base and tuned swapped?" in caplog.text


def test_a_base_that_cannot_be_written_again_is_refused(tmp_path, monkeypatch):
    """Experts are stored apart and merged on loading; here that cannot be undone."""
    save_model("mixtral", tmp_path / "base")
    line = (
        f"--base {tmp_path / 'base'} --score magnitude --sparsities 0.9 --name m --out {tmp_path / 'masks'}"
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("lota.models.key_mapping.Conversion.undo", lambda self, values: dict(values))
        extract_masks.main(line.split())
    assert "cannot be written as it was read: MixtralForCausalLM converts it" in str(stopped.value)
    assert not list(tmp_path.rglob("*_mask.pt"))
    extract_masks.main(line.split())
    assert list(tmp_path.rglob("*_mask.pt"))
