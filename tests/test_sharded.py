"""The sharded trainer: N processes that hold a model together give what one gives, whatever is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs import MODEL, with_mini_task
from transformers import AutoConfig, AutoModelForCausalLM

from lota.masks import Mask
from lota.models.scope import find_scope, meta_model

pytestmark = pytest.mark.slow
DRIVER = str(Path(__file__).with_name("process_runs.py"))
SHORT = ("n_examples=37", "eps=1.0", "lr=1e-2", "eval_every=37", "save_every=1000")
ODD, EXPERTS = "model.name_or_path=odd", "model.name_or_path=experts"
MASKED = ("mask_path=units_mask.pt", *SHORT)
PAIRS = ("datasets=[pairs]", "loss=dpo", "n_examples=24", "eps=1.0", "lr=1e-2", "eval_every=24")
RUNS = {
    # 20 steps; parts of 4: the last batch has one example, so that most processes have none
    "global": (ODD, "mask_path=odd_mask.pt", "n_epochs=null", "n_examples=153", "eps=1.0", "lr=1e-2",
               "gradient_accumulation_steps=2", "grad_norm_strategy=global", "max_grad_norm=1",
               "activation_checkpointing=true", "momentum=0.5", "weight_decay=0.1", "eval_every=80",
               "sample_during_eval=true", "n_eval_model_samples=2"),
    "first": (ODD, "mask_path=first_mask.pt", *SHORT, "optimizer=AdamW",
              "grad_norm_strategy=proportional", "max_grad_norm=1"),
    "dense": (ODD, *SHORT, 'model.pad_token="<PAD>"'),
    "bf16": (*MASKED, "model.fsdp_policy_mp=bfloat16"),
    "mixed": (*SHORT, "model.fsdp_policy_mp=bfloat16", "optimizer=SGD", "lr=1e-3"),
    "narrow": (*MASKED, "optimizer_state=bfloat16", "packing=true", "grad_norm_strategy=none"),
    "moe": (EXPERTS, "mask_path=experts_mask.pt", *SHORT),
    "swap": (*PAIRS, "mask_path=units_mask.pt"),
    "model": (*PAIRS, "eval_batch_size=3"),
    "precomputed": (*PAIRS, "mask_path=units_mask.pt", "model.reference=precomputed", "eval_batch_size=5"),
    "snip": (*SHORT, "snip=true", "snip_batches=5", "snip_sparsity=0.99"),
}  # fmt: skip


def unit_mask(folder: Path) -> Mask:
    """Single entries, whole rows, columns and blocks, in turn."""
    generator, kept = torch.Generator().manual_seed(3), {}
    for at, (name, tensor) in enumerate(find_scope(meta_model(folder)).items()):
        shape = tensor.shape
        keep = torch.rand(shape, generator=generator) < 0.1
        if at % 4 == 1:
            keep = (torch.rand(*shape[:-1], 1, generator=generator) < 0.2).expand(shape)
        elif at % 4 == 2:
            keep = (torch.rand(*shape[:-2], 1, shape[-1], generator=generator) < 0.2).expand(shape)
        elif at % 4 == 3:
            keep = torch.zeros(shape, dtype=torch.bool)
            keep[..., :32, 16:32] = True
        kept[name] = keep.clone()
    return Mask.from_dense(kept)


def workplace(folder: Path) -> Path:
    """Models of sizes that no number of processes divides, and of experts; masks of them."""
    folder.mkdir()
    with_mini_task(folder)
    sizes = {"vocab_size": 643, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}  # fmt: skip
    for name, kind, more in (
        ("odd", "qwen2", {"tie_word_embeddings": False}),
        ("experts", "mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 52}),
    ):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **more}))
        model.save_pretrained(folder / name)
        for file in MODEL.glob("tokenizer*"):
            shutil.copy(file, folder / name)
        unit_mask(folder / name).save(folder / f"{name}_mask.pt")
    unit_mask(MODEL).save(folder / "units_mask.pt")
    first = {
        n: torch.zeros(t.shape, dtype=torch.bool) for n, t in find_scope(meta_model(folder / "odd")).items()
    }
    first["model.layers.0.mlp.up_proj.weight"][:3, ::2] = True  # of one process
    Mask.from_dense(first).save(folder / "first_mask.pt")
    return folder
