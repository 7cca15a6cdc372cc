"""What a plan predicts, against real models, optimizers and files, and against a trace of every block."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hf_models import new_config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import MODEL, ROOT
from tiny import line_mask, make, random_mask
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import plan as benchmark
from lota.config_checks import validated
from lota.masks import Mask
from lota.models.scope import find_scope, meta_model
from lota.optim import compact_experts, launches, masked, products
from lota.optim.fused import fuse_in_backward
from lota.optim.optimizers import MaskedAdamW, MaskedRMSprop
from lota.plan import shared, sizes
from lota.plan.config import PlanConfig, plan_problems
from lota.plan.predict import Memory, Prediction, Setup, predict
from lota.plan.stand_ins import without_data
from lota.plan.table import advice_lines, numbers, table
from lota.plan.tracker import Tracker
from lota.plan.ways import Way, advise, compared, smaller
from lota.train.cli import register

register("plan", PlanConfig)


def composed(*overrides: str) -> PlanConfig:
    """The checked settings of a plan of the embedded model, if nothing names another."""
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        config = OmegaConf.to_object(compose("plan", overrides=[f"model.name_or_path={MODEL}", *overrides]))
    return validated(config, plan_problems)


def llama(layers: int = 5) -> nn.Module:
    """A model on the meta device, with weights that are small beside its activations, and without."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, use_cache=False,
            )
        )  # fmt: skip


def planned(*overrides: str, model: nn.Module | None = None, **setup: object) -> Prediction:
    setup = {"device": "cpu", "length": 64, **setup}
    return predict(composed(*overrides), model or llama(), Setup(**setup))


# Against what is there


def test_the_tracker_counts_what_torchs_own_one_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 32))
    x = torch.randn(128, 64)
    theirs = MemTracker()
    theirs.track_external(model, x)
    with theirs:
        model(x).square().sum().backward()
    model.zero_grad()
    mine = Tracker()
    for tensor in (*model.parameters(), x):
        mine.count(tensor, "weights")
    with mine:
        loss = model(x).square().sum()
        mine.mark("backward")
        mine.in_backward = True
        loss.backward()
    expected = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert max(segment.peak for segment in mine.segments) == expected
    last = mine.segments[-1]
    assert last.parts["weights"] == sum(p.nbytes for p in model.parameters()) + x.nbytes
    assert last.peak == sum(last.parts.values())


def test_a_tensor_that_gets_a_name_later_has_it_at_the_peak_before():
    tracker = Tracker()
    with tracker:
        gradient = torch.zeros(100)
        more = torch.zeros(50)
        del more
        tracker.mark("later")
        tracker.count(gradient, "gradients")
        del gradient
    first, later = tracker.segments
    assert first.parts == {"activations": 200, "gradients": 400}
    assert (later.peak, later.parts["gradients"], tracker.total) == (400, 400, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["entries", "calibrate, AdamW", "dpo", "checkpointing, parts", "lora"])
def test_a_run_needs_what_was_predicted(name, tmp_path, monkeypatch):
    """Of a model in which no part of the memory is small beside the others."""
    small = LlamaConfig(
        vocab_size=4_000, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    monkeypatch.setitem(benchmark.MODELS, "41m", lambda: small)
    monkeypatch.setattr(benchmark, "LENGTH", 128)
    overrides = benchmark.make_files(tmp_path, name)
    plan = benchmark.predicted(overrides)
    real = benchmark.measure(overrides, profiled=True)
    for phase in ("steps", "save"):
        assert plan[phase] == pytest.approx(real[phase], rel=0.1), phase


def real_state_bytes(model: nn.Module, mask: Mask | None, rule: type = MaskedRMSprop) -> int:
    return rule(model, mask).state_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
def test_state_has_the_bytes_of_the_real_optimizer(granularity, dtype, tmp_path):
    model = make("llama", dtype=dtype)
    mask = random_mask(model) if granularity == "element" else line_mask(model, granularity)
    mask.save(tmp_path / "mask.pt")
    name = str(dtype).removeprefix("torch.")
    config = composed(f"mask_path={tmp_path / 'mask.pt'}", f"model.policy_dtype={name}")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    found = predict(config, skeleton, Setup("cpu", length=16, whole=True))
    close = 0.05 if granularity == "block" else 0  # blocks cut off at the edges are counted as whole ones
    assert found.trained == pytest.approx(mask.n_kept, rel=close)
    assert found.disk["resume.pt"] == pytest.approx(real_state_bytes(model, mask), rel=close)


@pytest.mark.parametrize(("settings", "bytes_more"), [(["l2_sp=1"], 4), (["ewc=1", "importance_path=a"], 8)])
def test_a_pull_to_the_start_is_counted(settings, bytes_more):
    plain, found = (planned(*more, sparsity=0.9) for more in ([], settings))
    assert found.disk["resume.pt"] - plain.disk["resume.pt"] == bytes_more * found.trained
    assert found.phases["forward"].peak - plain.phases["forward"].peak >= bytes_more * found.trained


def test_dense_state_has_the_bytes_of_the_real_optimizer():
    model = make("gpt2")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    found = predict(composed("optimizer=AdamW"), skeleton, Setup("cpu", length=16))
    assert found.disk["resume.pt"] == real_state_bytes(model, None, MaskedAdamW)
    assert found.trained == sum(p.numel() for p in model.parameters())


def test_files_have_the_predicted_sizes(tmp_path):
    model = make("llama")
    mask = random_mask(model)
    mask.save(tmp_path / "mask.pt")
    torch.save({"state": model.state_dict()}, tmp_path / "policy.pt")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    disk = predict(composed(f"mask_path={tmp_path / 'mask.pt'}"), skeleton, Setup("cpu", length=16)).disk
    for file, key in (("mask.pt", "mask"), ("policy.pt", "policy.pt")):
        overhead = (tmp_path / file).stat().st_size - disk[key]  # names, and torch's alignment of each tensor
        assert 0 < overhead < 400 * (len(model.state_dict()) + 10), key
    sharded = composed("save_format=folder", "trainer=FSDPTrainer", "freeze_odd_layers=true")
    disk = predict(sharded, skeleton, Setup("cpu", processes=2, length=16)).disk
    assert set(disk) == {"model.safetensors", "optimizer/", "delta"}  # and no mask file


# Blocks


@pytest.mark.parametrize(
    ("overrides", "setup"),
    [
        ((), {"sparsity": 0.9}),
        (("activation_checkpointing=true", "gradient_accumulation_steps=4"), {"sparsity": 0.99}),
        (("grad_norm_strategy=global", "optimizer=AdamW"), {"device": "cuda"}),
        (("snip=true", "snip_granularity=row", "model.fsdp_policy_mp=bfloat16"), {"device": "cuda"}),
        (("loss=dpo",), {}),
        (("adapter=lora", "lora_rank=4"), {"device": "cuda"}),
    ],
    ids=["entries", "parts", "dense", "rows", "second model", "lora"],
)
def test_two_and_three_blocks_stand_for_all(overrides, setup):
    few, whole = (planned(*overrides, **setup, whole=whole) for whole in (False, True))
    assert few.blocks == "2 and 3 of 5 blocks, multiplied" and whole.blocks == "all 5 blocks"
    assert few.trained == whole.trained and few.disk == whole.disk
    for phase, memory in whole.phases.items():
        assert few.phases[phase].peak == pytest.approx(memory.peak, rel=0.02), phase
        assert sum(memory.parts.values()) == memory.peak


def test_blocks_that_differ_are_all_traced():
    assert planned("freeze_odd_layers=true").blocks == "all 5 blocks"
    model = llama()
    model.model.layers[3].mlp = nn.Identity()
    assert planned(model=model, sparsity=0.9).blocks == "all 5 blocks"


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_families_can_be_traced(architecture, device):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(new_config(architecture, vocab_size=64))
    for setup in ({"sparsity": 0.9}, {}):
        found = planned(model=model, device=device, length=16, **setup)
        assert found.peak.peak > found.phases["load"].peak > 0


# What the parts are


def test_parts_of_a_masked_run():
    found = planned("model.fsdp_policy_mp=bfloat16", sparsity=0.9, device="cuda")
    model = llama()
    assert found.peak.parts["weights"] // (2 * sum(p.numel() for p in model.parameters())) == 1  # and buffers
    assert found.peak.parts["state"] == 12 * found.trained  # position, master, square average
    assert found.trained == sum(round(0.1 * tensor.numel) for tensor in find_scope(model).values())
    largest = max(p.numel() for p in model.parameters())
    assert found.host == (4 + 4) * largest  # what is written, tensor by tensor, and what is read of the base


def test_global_clipping_holds_all_gradients():
    each, all_ = (planned(f"grad_norm_strategy={s}", device="cuda") for s in ("even", "global"))
    entries = sum(p.numel() for p in llama().parameters())
    assert all_.phases["step"].peak - each.phases["step"].peak == pytest.approx(4 * entries, rel=0.01)


def test_a_swapped_reference_is_a_copy_of_the_kept_entries():
    swapped, second = planned("loss=dpo", sparsity=0.9), planned("loss=dpo")
    assert swapped.peak.parts["reference"] == 4 * swapped.trained
    assert second.peak.parts["reference"] == second.peak.parts["weights"]


def test_mixed_precision_holds_no_narrow_copy_of_all_weights():
    """Autocast's cache would, until the end of a forward pass."""
    found = planned("model.fsdp_policy_mp=bfloat16", "activation_checkpointing=true", "batch_size=1")
    beside = found.phases["forward"].peak - found.phases["load"].peak
    assert beside < sum(p.numel() for name, p in llama().named_parameters() if "layers" in name)


def test_nothing_is_left_swapped():
    places = (masked, "kept_entries"), (products, "Sampled"), (launches, "gather"), (launches, "usable")
    before = [getattr(owner, name) for owner, name in places]
    sizes_of = vars(compact_experts._Routing)["sizes"]
    with pytest.raises(ZeroDivisionError), without_data("cuda"):
        assert launches.usable(torch.device("cpu"))
        raise ZeroDivisionError
    assert [getattr(owner, name) for owner, name in places] == before
    assert vars(compact_experts._Routing)["sizes"] is sizes_of
    optimizer = MaskedRMSprop(make("llama"), random_mask(make("llama")))
    fuse_in_backward(optimizer)


# Several processes


def test_replicas_send_the_kept_gradients_and_nothing_else():
    one, four = (planned(sparsity=0.9, device="cuda", processes=n) for n in (1, 4))
    assert one.sent == {}
    assert sum(four.sent.values()) == round(4 * (four.trained + len(find_scope(llama()))) * 2 * 3 / 4)
    assert four.phases["load"].parts["weights"] == one.phases["load"].parts["weights"]
    held = four.phases["step"].parts["gradients"]
    assert held >= 4 * four.trained  # until all have been summed
    assert four.phases["forward"].parts["activations"] < 0.4 * one.phases["forward"].parts["activations"]


def test_dense_training_of_replicas_is_refused_as_the_run_refuses_it():
    with pytest.raises(ValueError, match="2 processes would send whole gradients"):
        planned(processes=2)


def units_of(model: nn.Module) -> shared.Units:
    return shared.Units.of(model, composed(), None)


def test_shards_hold_their_share_and_what_is_gathered():
    one = planned(device="cuda")
    four = planned("trainer=FSDPTrainer", device="cuda", processes=4)
    model = llama()
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 5 * block
    load, forward = four.phases["load"].parts, four.phases["forward"].parts
    assert load["weights"] == -(-one.phases["load"].parts["weights"] // 4)
    assert load["state"] == -(-one.phases["load"].parts["state"] // 4)
    embedding = model.model.embed_tokens.weight.numel()
    assert forward["gathered"] == 4 * (2 * block + outside - embedding)
    backward = units_of(model).gathered(("backward", 0))  # at the head, no block is whole
    assert backward == outside - embedding
    assert four.sent == {
        "weights gathered": round(4 * (10 * block + outside) * 3 / 4),
        "gradients scattered": round(4 * (5 * block + outside) * 3 / 4),
    }


@pytest.mark.parametrize("setting", ["grad_norm_strategy=even", "grad_norm_strategy=global"])
def test_a_shard_holds_its_parts_gradients_until_the_step(setting):
    four = planned("trainer=FSDPTrainer", setting, device="cuda", processes=4)
    share = 4 * sum(p.numel() for p in llama().parameters()) / 4  # bytes
    assert four.phases["step"].parts["gradients"] == pytest.approx(share, rel=1e-3)
    assert four.phases["backward"].parts["gradients"] >= share


def test_a_shard_scatters_whole_gradients_of_what_trains_only():
    model, config = llama(), composed("trainer=FSDPTrainer", "model.fsdp_policy_mp=bfloat16")
    kept = sizes.at_sparsity(model, config, 0.9)
    units = shared.Units.of(model, config, kept)
    scope = sum(tensor.numel for tensor in find_scope(model).values())
    assert (units.trained, units.trained_block) == (scope, scope // 5)
    sharing = shared.Sharing.of(config, 2)
    assert sharing.gathered == 2  # bytes; gradients are summed in fp32
    assert shared.sent_sharded(units, sharing, 1)["gradients scattered"] == round(4 * scope / 2)


def test_replicas_of_shards_sum_their_parts_gradients():
    config = composed("trainer=FSDPTrainer", "model.replicas=2", "processes=4")
    sharing = shared.Sharing.of(config, 4)
    units = shared.Units.of(llama(), config, None)
    entries = sum(p.numel() for p in llama().parameters())
    assert (sharing.holders, units.trained) == (2, entries)
    sent = shared.sent_sharded(units, sharing, 1)
    assert sent["gradients of replicas"] == round(4 * entries / 2)  # 2 (R-1)/R of a half
    assert sent["gradients scattered"] == round(4 * entries / 2)


# Ways to train, and what makes a run fit


def test_ways_side_by_side():
    ways = {way.name: way for way in compared(Way("this run", composed("loss=dpo"), Setup(sparsity=0.99)))}
    assert list(ways) == [
        "this run", "calibrate", "calibrate, low memory", "full fine-tuning, AdamW", "adapt", "LoRA, r=8"
    ]  # fmt: skip
    assert ways["this run"].config.loss.beta == 0.1 and ways["adapt"].config.loss.name == "sft"
    assert ways["calibrate"].setup.sparsity is None and ways["adapt"].setup.sparsity == 0.99
    assert ways["LoRA, r=8"].config.adapter.name == "lora" and not ways["LoRA, r=8"].masked
    assert ways["calibrate, low memory"].config.stochastic_rounding
    dense = compared(Way("this run", composed(), Setup()))
    assert [way.name for way in dense][:2] == ["this run", "calibrate, low memory"]
    assert next(way for way in dense if way.name == "DPO").setup.sparsity == 0.9
    for way in dense:
        validated(way.config)


def peaks_of(**factors: float):
    """In the stead of a plan: changes multiply a peak of 1000 bytes by their factors; and what was asked."""
    asked = []

    def plan(way: Way) -> Prediction:
        asked.append(" ".join(way.changes))
        peak = 1000.0
        for change in way.changes:
            peak *= factors.get(change.partition("=")[0].rpartition(".")[2], 1)
        return Prediction({"backward": Memory(round(peak), Counter())}, 0, 0, "")

    return plan, asked


def test_the_first_change_that_is_enough_is_advised():
    run = Way("this run", composed("eval_batch_size=1"), Setup("cuda", sparsity=0.9))
    plan, asked = peaks_of(fsdp_policy_mp=0.5, processes=0.4)
    advice = advise(run, plan(run), plan, 600)
    assert asked[1:] == [
        "activation_checkpointing=true", "gradient_accumulation_steps=2", "gradient_accumulation_steps=8",
        "model.fsdp_policy_mp=bfloat16", "sparsity=0.95", "sparsity=0.99", "trainer=FSDPTrainer processes=2",
        "trainer=FSDPTrainer processes=4", "trainer=FSDPTrainer processes=8",
    ]  # fmt: skip
    way, peak = advice.fitting
    assert (way.changes, peak) == (("model.fsdp_policy_mp=bfloat16",), 500)
    assert "it fits with 0.00 MiB: model.fsdp_policy_mp=bfloat16" in advice_lines(plan(run), advice, 600)[
        -1
    ].replace("<0.01", "0.00")


def test_changes_come_together_if_none_is_enough():
    run = Way("this run", composed("batch_size=1"), Setup("cuda"))
    plan, _ = peaks_of(activation_checkpointing=0.7, stochastic_rounding=0.6, eval_batch_size=1)
    way, peak = advise(run, plan(run), plan, 500).fitting
    assert peak == 420 and way.config.activation_checkpointing and way.config.stochastic_rounding
    assert way.config.eval_batch_size == 16  # which does not help
    nothing = advise(run, plan(run), plan, 10)
    assert nothing.fitting is None
    assert "take a smaller model" in advice_lines(plan(run), nothing, 10)[-1]


def test_changes_suit_the_run():
    def changes(*overrides: str, **setup: object) -> set[str]:
        return {" ".join(way.changes) for way in smaller(Way("", composed(*overrides), Setup(**setup)))}

    assert "model.reference=precomputed" in changes("loss=dpo")
    assert not {"sparsity=0.99", "model.fsdp_policy_mp=bfloat16"} & changes("model.fsdp_policy_mp=bfloat16")
    assert "snip_sparsity=0.95" in changes("snip=true") and "sparsity=0.95" in changes(sparsity=0.9)
    assert not any("processes" in change for change in changes("adapter=lora"))
    assert changes("activation_checkpointing=true", "adapter=lora", "batch_size=1", "eval_batch_size=1",
                   "model.fsdp_policy_mp=bfloat16") == set()  # fmt: skip


def test_the_table_and_the_numbers_agree():
    run = Way("this run", composed(), Setup("cuda", processes=2, sparsity=0.9, length=64))
    found = predict(run.config, llama(), run.setup)
    lines = table([(run, found)], run.setup)
    (peak,) = (line.split() for line in lines if line.startswith("peak"))
    assert peak[1] == f"{found.peak.peak / 2**20:.2f}" and lines[0].split()[0] == "MiB"
    assert any(line.startswith("sent: kept gradients") for line in lines)
    made = numbers([(run, found)], None)["ways"]["this run"]
    assert made["peak"] == found.peak.peak == made["phases"][made["phase"]]["peak"]
    assert made["disk"] == found.disk


# What is refused


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("gpu_memory=0", "gpu_memory=0.0: must be above 0"),
        ("processes=0", "processes=0: must be at least 1"),
        ("sparsity=1", "sparsity=1.0: must be at least 0 and below 1"),
        ("gpu_memory=24 device=cpu", "gpu_memory=24 with device=cpu"),
        ("tokens=600", "tokens=600: an example is cut to max_length=512"),
        ("sparsity=0.9 adapter=lora", "LoRA has no mask"),
        ("sparsity=0.9 snip=true", "snip_sparsity=0.9"),
        ("processes=2", "use trainer=FSDPTrainer, a mask or adapter=lora"),
        ("processes=16 sparsity=0.9", "16 processes share the 8 examples of a part"),
        ("device=tpu", "device=tpu"),
        ("json=/nowhere/at/all.json", "there is no folder"),
        ("snip=true mask_path=x", "snip computes the mask itself"),
    ],
)
def test_settings_that_cannot_be_planned(overrides, words):
    with pytest.raises(ValueError) as error:
        composed(*overrides.split())
    assert words in str(error.value)


def test_all_problems_at_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError) as error:
        composed("lr=-1", "tokens=600", "gpu_memory=-1", "processes=2")
    assert len(str(error.value).splitlines()) == 6 and "start it without torchrun" in str(error.value)


def test_masks_that_cannot_be_planned(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist: sparsity=0\.9 plans for a mask"):
        planned(f"mask_path={tmp_path / 'absent.pt'}")
    random_mask(make("llama")).save(tmp_path / "mask.pt")
    with pytest.raises(ValueError, match="the mask does not belong to this model"):
        planned(f"mask_path={tmp_path / 'mask.pt'}")
    with pytest.raises(ValueError, match="the file says what it keeps"):
        composed(f"mask_path={tmp_path / 'mask.pt'}", "sparsity=0.5")
    planned("mask_path=masks/0.0_mask.pt")  # dense


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "lota.plan", "model=tiny"]
    given = [
        "sparsity=0.9", "gpu_memory=0.008", "json=plan.json", "eval_batch_size=1", "max_length=64",
        "max_prompt_length=32",
    ]  # fmt: skip
    done = subprocess.run([*command, *given], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    made = json.loads((tmp_path / "plan.json").read_text())
    assert set(made["ways"]) > {"this run", "calibrate", "DPO"} and made["fits"] in done.stdout
    skeleton = meta_model(MODEL)
    assert made["ways"]["calibrate"]["trained_entries"] == sum(p.numel() for p in skeleton.parameters())
    done = subprocess.run(
        [*command, "sparsty=0.9"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and "did you mean sparsity" in done.stderr and "Traceback" not in done.stderr
    assert not list(Path(tmp_path).glob("multirun*"))
