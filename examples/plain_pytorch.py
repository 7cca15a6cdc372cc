"""LoTA in a loop of your own: python -m examples.plain_pytorch [--fused] [--steps N] [--resume]"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from examples.common import arguments, load, rows

BATCH = 4


def batch_loss(model, tokenizer, batch):
    """Mean loss per token of prompt and completion."""
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in batch]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(model.device)
    labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
    return model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, labels=labels).loss


def main(argv: Sequence[str] | None = None):
    args = arguments(__doc__, argv)
    model, tokenizer, optimizer = load(args)
    file, start = Path(args.out) / "checkpoint.pt", 0
    if args.resume:
        saved = torch.load(file, weights_only=True, map_location="cpu")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    data = rows(args.steps * args.accumulation * BATCH)
    for step in range(start, args.steps):
        for part in range(args.accumulation):
            first = (step * args.accumulation + part) * BATCH
            loss = batch_loss(model, tokenizer, data[first : first + BATCH]) / args.accumulation
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, args.steps // 2) == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, file)
            print(f"step {step + 1}: loss {loss.item() * args.accumulation:.3f}")
    return model, optimizer


if __name__ == "__main__":
    main()
