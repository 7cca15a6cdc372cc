"""What the examples share: arguments, a model with its masked optimizer, and rows to learn from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lota
from tasks import get_task

ROOT = Path(__file__).resolve().parent.parent


def arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model", default=str(ROOT / "assets" / "tiny-llama"), help="Hugging Face folder or hub id")
    add("--mask", help="mask file; default: the 10 %% of attention and MLP weights that are largest")
    add("--fused", action="store_true", help="update during the backward pass")
    add("--out", default="example-run", help="folder for checkpoints")
    add("--lr", type=float, default=1e-3, help="learning rate (1e-3)")
    add("--steps", type=int, default=20, help="optimizer steps (20), with a checkpoint after each half")
    add("--accumulation", type=int, default=2, help="backward passes of 4 examples per step (2)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser.parse_args(argv)


def load(args: argparse.Namespace):
    """(model, tokenizer, optimizer); the model is where it will train before the optimizer sees it."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.mask:
        mask = lota.Mask.load(args.mask)
    else:
        mask = lota.extract(args.model, sparsities=[0.9], score="magnitude")[0.9]
    optimizer = lota.MaskedRMSprop(model, mask, lr=args.lr, grad_norm_strategy="even", max_grad_norm=1.0)
    if args.fused:
        lota.fuse_in_backward(optimizer, gradient_accumulation_steps=args.accumulation)
    return model, tokenizer, optimizer


def trainer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """TrainingArguments; the optimizer clips, so that the trainer must not."""
    return {
        "output_dir": args.out,
        "max_steps": args.steps,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": args.accumulation,
        "max_grad_norm": 0,
        "lr_scheduler_type": "linear",
        "save_steps": max(1, args.steps // 2),
        "logging_steps": 5,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def rows(n: int) -> list[dict[str, str]]:
    """Letters to sort: prompt, and completion with its end; `rejected` is the same letters unsorted."""
    task = get_task("toy_sort")
    return [
        {"prompt": task.prompt(row), "completion": task.target(row), "rejected": f" {row['question']}"}
        for row in task.load("train")[:n]
    ]
