"""Make assets/study-llama, the base of the studies: a Llama of 5M parameters with knowledge to lose.

    python -m assets.make_study_base --data_dir ../shared/data --out assets/study-llama

It learns real texts and the generated world (study_texts.py), with a tokenizer of its own. The same command
goes on after an interruption; --steps may change in between, because only the end of the schedule depends on
it. training.json beside the model holds settings, hashes of texts and weights, and held-out nats per byte of
every source. The same seed, threads and machine give the same bits.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from assets.pretrain import (
    Checkpoints,
    Shape,
    make_model,
    make_optimizers,
    packed_rows,
    train,
    train_tokenizer,
    trapezoid,
)
from assets.study_texts import SOURCES, VALIDATION, WORLD, WORLD_WEIGHT, Texts
from assets.tiny_world import Document
from lota.evaluate.text_loss import nats_per_byte
from lota.models.hashing import content_hash
from lota.models.weights import open_weights

SHAPE = Shape(vocabulary=3072, layers=6, hidden=256, mlp=688, heads=4, kv_heads=2, context=512)
TOKENIZER_BYTES = 6_000_000  # of the text that the tokenizer is trained on

log = logging.getLogger("make_study_base")


def beginning(documents: Iterator[Document], n_bytes: int) -> Iterator[str]:
    """The first documents, up to so many bytes."""
    while n_bytes > 0:
        text = "".join(next(documents))
        n_bytes -= len(text.encode())
        yield text


def measured(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    held_out: dict[str, list[Document]],
) -> dict[str, dict[str, float | int | None]]:
    """Source -> nats per byte of its held-out documents, their standard error, bytes."""
    found = {}
    for name, documents in held_out.items():
        loss = nats_per_byte(model, tokenizer, documents)
        size = sum(len(text.encode()) for _, text in documents)
        found[name] = {"nats_per_byte": loss.value, "stderr": loss.stderr, "bytes": size}
    return found


def make(args: argparse.Namespace) -> None:
    """Train, or go on, and write the model with its training.json."""
    start, cpu = time.time(), time.process_time()
    texts = Texts(args.data_dir)
    tokenizer = train_tokenizer(beginning(texts.stream(args.seed), TOKENIZER_BYTES), SHAPE)
    model = make_model(tokenizer, SHAPE, args.seed)
    rows = packed_rows(tokenizer, texts.stream(args.seed + 1), args.steps * args.batch, args.length)
    log.info("%.0f s until training; %d tokens", time.time() - start, rows[0].numel())
    optimizers = make_optimizers(model, args.matrix_lr, args.lr, args.weight_decay)
    stored = Checkpoints(args.checkpoint, args.save_every) if args.checkpoint else None
    train(model, rows, args.batch, optimizers, schedule=trapezoid, bf16=True, checkpoints=stored)
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    not_settings = ("out", "data_dir", "checkpoint", "save_every")
    weights = {name: source.weight for name, source in SOURCES.items()} | {WORLD: WORLD_WEIGHT}
    report = {
        "settings": {name: value for name, value in vars(args).items() if name not in not_settings},
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "training_tokens": rows[0].numel(),
        "share_of_bytes": weights,
        "licences": {name: source.licence for name, source in SOURCES.items()},
        "validation_share_left_out": VALIDATION,
        "texts_sha256": texts.digest(),
        "weights_hash": content_hash(open_weights(args.out)),
        "held_out": measured(model, tokenizer, texts.held_out()),
        "wall_minutes_of_last_run": round((time.time() - start) / 60, 1),
        "cpu_minutes_of_last_run": round((time.process_time() - cpu) / 60, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.out.iterdir())
    log.info("%s\n%s: %.2f MB", json.dumps(report, indent=2), args.out, size / 1e6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="has tasks/ and sharegpt_data/ (shared/data/README.md)")
    add("--out", type=Path, default=Path(__file__).parent / "study-llama")
    add("--checkpoint", type=Path, help="file to store the training in, and to go on from")
    add("--save_every", type=int, default=20, help="steps between checkpoints")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=1600, help="optimizer steps")
    add("--batch", type=int, default=6, help="rows per step")
    add("--length", type=int, default=512, help="tokens per row")
    add("--lr", type=float, default=3e-3, help="peak learning rate of embeddings and norms (AdamW)")
    add("--matrix_lr", type=float, default=0.02, help="peak learning rate of the matrices (Muon)")
    add("--weight_decay", type=float, default=0.0, help="of the matrices")
    add("--threads", type=int, default=1, help="other numbers add up in another order: other bits")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    make(args)


if __name__ == "__main__":
    main()
