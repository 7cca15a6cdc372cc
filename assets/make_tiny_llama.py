"""Make assets/tiny-llama: generate the text, train the tokenizer and the model, measure, save.

    python assets/make_tiny_llama.py --out assets/tiny-llama

Everything is seeded; training.json beside the model holds the settings, the losses and the minutes it took.
"""

import argparse
import itertools
import json
import logging
import math
import os
import time
from pathlib import Path

import numpy as np
import tiny_world
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange

BOS, EOS = "<s>", "</s>"
VOCABULARY = 512
LAYERS, HIDDEN, MLP, HEADS, KV_HEADS = 4, 128, 336, 4, 2
CONTEXT = 512  # tokens, the most that the model says it can take

log = logging.getLogger("make_tiny_llama")


def train_tokenizer(seed: int, n_documents: int = 20_000) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE (any text can be encoded, digits one by one), BOS in front, and no pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for _, text in tiny_world.documents(seed, held_out=False))
    bpe.train_from_iterator(itertools.islice(texts, n_documents), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def make_model(tokenizer, seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    return transformers.LlamaForCausalLM(config)


def packed_rows(tokenizer, seed: int, n_rows: int, length: int) -> torch.Tensor:
    """(n_rows, length) token ids: documents with BOS and EOS one after the other, cut into rows."""
    ids: list[int] = []
    for _, text in tiny_world.documents(seed, held_out=False):
        ids += [*tokenizer.encode(text), tokenizer.eos_token_id]
        if len(ids) >= n_rows * length:
            return torch.tensor(ids[: n_rows * length]).view(n_rows, length)
    raise AssertionError("documents() never ends")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine to a twentieth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def train(model, rows: torch.Tensor, batch: int, peak_lr: float) -> None:
    """One pass over the rows; AdamW, mean token loss, gradient norm clipped to 1."""
    steps = len(rows) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    bar = trange(steps, desc="pre-training", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        ids = rows[step * batch : (step + 1) * batch]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def measure(model, tokenizer, seed: int, held_out: bool, n_documents: int) -> dict[str, float]:
    """Mean next-token loss (nats) per skill over whole documents, the EOS included."""
    losses = {}
    for skill in tiny_world.SKILLS:
        total, tokens = 0.0, 0
        source = tiny_world.documents(seed, held_out, skills=(skill,))
        for _, text in itertools.islice(source, n_documents):
            ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        losses[skill] = round(total / tokens, 4)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--n_measured", type=int, default=200, help="documents per skill for the measured losses")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    start, cpu = time.time(), time.process_time()
    tokenizer = train_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed)
    rows = packed_rows(tokenizer, args.seed + 1, args.steps * args.batch, args.length)
    train(model, rows, args.batch, args.lr)
    report = {
        "seed": args.seed, "steps": args.steps, "rows_per_step": args.batch, "tokens_per_row": args.length,
        "peak_lr": args.lr, "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": rows.numel(), "vocabulary": len(tokenizer),
        "loss_unit": f"nats per token, {args.n_measured} documents per skill",
        "loss_train": measure(model, tokenizer, args.seed + 2, False, args.n_measured),
        "loss_held_out": measure(model, tokenizer, args.seed + 3, True, args.n_measured),
        "wall_minutes": round((time.time() - start) / 60, 1), "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
        "threads": torch.get_num_threads(), "versions": {"torch": torch.__version__, "numpy": np.__version__,
                                                        "transformers": transformers.__version__},
    }  # fmt: skip
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    size = sum(f.stat().st_size for f in os.scandir(args.out))
    log.info("%s\n%s: %.2f MB", json.dumps(report, indent=2), args.out, size / 1e6)


if __name__ == "__main__":
    main()
