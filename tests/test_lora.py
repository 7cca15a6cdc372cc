"""LoRA in the training loop, against peft and torch.optim written out; its files; what it refuses."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import MODEL, base, policy, same, settings, train
from safetensors.torch import load_file
from tolerance import assert_same, assert_same_training, chain
from transformers import AutoModelForCausalLM
from written_out import logp, train_plainly

from lota.config_checks import unused_settings
from lota.models.scope import find_scope
from lota.share.convert import convert_policy
from lota.train import lora
from tasks import get_task

# peft asks transformers by an old name when it wraps or loads
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("workplace"),
]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = ("adapter=lora", "lora_rank=4", "lora_alpha=8", "lr=1e-2", "warmup_steps=0")


def plain_adapter() -> PeftModel:
    """The base with the adapter that a run of seed 0 starts from."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM")
    return get_peft_model(base(), config)


def trained_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Those of A and B, under their names in the adapter's file."""
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    return {name: p.detach().clone() for name, p in named.items()}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loop_equals_peft_and_torch_written_out(accumulation):
    trainer, folder = train(*LORA, "eps=1.0", f"gradient_accumulation_steps={accumulation}")
    model, start, task = plain_adapter(), trained_weights(plain_adapter()), get_task("mini")
    train_plainly(
        {name: p for name, p in model.named_parameters() if p.requires_grad},
        lambda row: -logp(model, trainer.data.tokenizer, task.prompt(row), task.target(row)),
        task.load("train", None),
        [1e-2] * 5,
    )
    got = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert_same_training(got, trained_weights(model), start, terms=chain(base(), tokens=200), steps=5)
    assert not any(torch.equal(got[name], start[name]) for name in start)


def test_policy_is_the_merged_model_and_the_rest_is_the_base():
    trainer, folder = train(*LORA)
    loaded = PeftModel.from_pretrained(base(), folder / "adapter")
    merged, start, got = loaded.merge_and_unload().state_dict(), base().state_dict(), policy(folder)
    scope = find_scope(base())
    assert list(got) == list(start)
    for name, value in got.items():
        if name in scope:
            assert_same(value, merged[name], terms=4)  # W + (alpha / r) B A: sums over rank 4
            assert not torch.equal(value, start[name])
        else:
            assert torch.equal(value, start[name]), name
    # saving left no trace in the training weights
    layers = lora.lora_layers(trainer.model)
    assert len(layers) == len(scope)
    for path, layer in layers.items():
        assert torch.equal(layer.base_layer.weight, start[f"{path}.weight"])
    assert trainer.optimizer.n_trained == sum(4 * (s.shape[0] + s.shape[1]) for s in scope.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [("lora_dropout=0.3",), ("model.fsdp_policy_mp=bfloat16", "optimizer=AdamW")]
)
def test_resume_is_exact(tmp_path, extra):
    args = (*LORA, *extra, "save_every=16", "activation_checkpointing=true")
    _, whole = train(*args, "exp_name=whole")
    trainer, part = train(*args, "exp_name=part")
    for later in ("step-24", "step-32", "step-40"):
        shutil.rmtree(trainer.config.run_dir / later, ignore_errors=True)
    again, end = train(*args, "exp_name=part")
    assert again.progress.step == trainer.progress.step
    assert end.name == part.name
    assert same(policy(end), policy(whole))
    assert same(*(load_file(f / "adapter" / "adapter_model.safetensors") for f in (end, whole)))


def test_dropout_acts_in_training_and_not_in_evaluation():
    trainer, with_dropout = train(*LORA, "lora_dropout=0.5", "exp_name=dropout")
    _, without = train(*LORA, "exp_name=none")
    assert not same(policy(with_dropout), policy(without))
    batch = trainer.objective.batch(trainer.data.train[:4])
    with torch.no_grad():
        trainer.model.eval()
        calm = [trainer.objective.losses(batch)[0] for _ in range(2)]
        trainer.model.train()
        noisy = [trainer.objective.losses(batch)[0] for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.equal(*noisy)


def test_bf16_keeps_the_adapter_and_what_is_saved_in_fp32():
    trainer, folder = train(*LORA, "model.fsdp_policy_mp=bfloat16")
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    merged = PeftModel.from_pretrained(base(), folder / "adapter").merge_and_unload().state_dict()
    for name, value in policy(folder).items():  # the base's own fp32 values, not their bf16 rounding
        assert value.dtype == torch.float32
        assert_same(value, merged[name], terms=4)


def test_the_converter_makes_a_folder_that_loads(tmp_path):
    _, folder = train(*LORA, "model.policy_dtype=bfloat16")
    convert_policy(MODEL, folder / "policy.pt", tmp_path / "hf")
    model, saved = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto"), policy(folder)
    assert all(torch.equal(value, saved[name].to(value.dtype)) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gpt_neox", "mixtral"])
def test_architectures(architecture, tmp_path):
    model, plain = tiny.make(architecture).eval(), tiny.make(architecture).eval()
    targets, frozen = lora.lora_targets(model)
    assert bool(frozen) == (architecture == "mixtral")  # stacks of experts
    wrapped = lora.add_lora(model, targets, rank=3, alpha=6, dropout=0.0)
    ids = tiny.batches(1)[0]
    assert set(lora.lora_layers(model)) == set(targets)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
        adapted = model(ids).logits
        assert not torch.allclose(adapted, plain(ids).logits, atol=1e-3)
        with lora.disabled(model):
            assert torch.equal(model(ids).logits, plain(ids).logits)
        assert torch.equal(model(ids).logits, adapted)
        assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
        lora.saved_model(model, torch.float32).write_policy(tmp_path / "policy.pt", 0, {})
        state = policy(tmp_path)
        assert list(state) == list(plain.state_dict())
        plain.load_state_dict(state)
        assert_same(plain(ids).logits, adapted, terms=chain(plain))
        merged = wrapped.merge_and_unload().state_dict()
    for name, value in state.items():
        assert_same(value, merged[name], terms=3)
    if architecture == "qwen2":
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"{key}={value}", f"{key}=.* with adapter=lora: .*drop")
        for key, value in {
            "mask_path": "m.pt", "snip": "true", "protect_masks": "[m.pt]", "freeze_odd_layers": "true"
        }.items()
    ]
    + [(s, s.split("=")[0]) for s in ("lora_rank=0", "lora_alpha=0", "lora_alpha=inf", "lora_dropout=1")]
    + [("adapter.name=x", "adapter.name")],
)  # fmt: skip
def test_refused_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        settings(*LORA, setting)


def test_unused_settings():
    unused = unused_settings(settings("lora_rank=4", "lora_dropout=0.1"))
    assert [key for key in unused if "lora" in key] == ["lora_rank", "lora_dropout"]
    assert "model.scope" not in unused_settings(settings(*LORA, "model.scope=mlp"))


def test_another_adapter_is_not_restored():
    _, folder = train(*LORA)
    model = base()
    wrapped = lora.add_lora(model, lora.lora_targets(model)[0], rank=5, alpha=8, dropout=0.0)
    with pytest.raises(ValueError, match="another adapter"):
        lora.restore(wrapped, folder)
