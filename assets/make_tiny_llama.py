"""Make assets/tiny-llama: generate the text, train the tokenizer and the model, measure, save.

    python -m assets.make_tiny_llama --out assets/tiny-llama

Everything is seeded; training.json beside the model holds the settings, the losses and the minutes it took.
"""

import argparse
import itertools
import json
import logging
import time
from pathlib import Path

import torch
import transformers

from assets import tiny_world
from assets.pretrain import Shape, encode, make_model, make_optimizers, packed_rows, train, train_tokenizer

SHAPE = Shape(vocabulary=640, layers=4, hidden=128, mlp=336, heads=4, kv_heads=2, context=512)
TOKENIZER_DOCUMENTS = 20_000

log = logging.getLogger("make_tiny_llama")


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    seed: int,
    held_out: bool,
    n_documents: int,
    skills: tuple[str, ...] = tuple(tiny_world.SKILLS),
) -> dict[str, float]:
    """Mean loss (nats per answer token, EOS included) of each skill."""
    losses = {}
    for skill in skills:
        total, tokens = 0.0, 0
        source = tiny_world.documents(seed, held_out, skills=(skill,))
        for _, document in itertools.islice(source, n_documents):
            ids, labels = (torch.tensor([x]) for x in encode(tokenizer, document))
            n = int((labels[:, 1:] != -100).sum())
            total += model(input_ids=ids, labels=labels).loss.item() * n
            tokens += n
        losses[skill] = round(total / tokens, 4)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--length", type=int, default=96, help="tokens per row")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="peak learning rate of embeddings and norms (AdamW)"
    )
    parser.add_argument(
        "--matrix_lr", type=float, default=0.02, help="peak learning rate of the matrices (Muon)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="other numbers add up in another order: other bits"
    )
    parser.add_argument(
        "--n_measured", type=int, default=200, help="documents per skill for the measured losses"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.set_num_threads(args.threads)
    start, cpu = time.time(), time.process_time()
    texts = ("".join(document) for _, document in tiny_world.documents(args.seed, held_out=False))
    tokenizer = train_tokenizer(itertools.islice(texts, TOKENIZER_DOCUMENTS), SHAPE)
    model = make_model(tokenizer, SHAPE, args.seed)
    documents = (document for _, document in tiny_world.documents(args.seed + 1, held_out=False))
    rows = packed_rows(tokenizer, documents, args.steps * args.batch, args.length)
    train(model, rows, args.batch, make_optimizers(model, args.matrix_lr, args.lr))
    report = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "training_tokens": rows[0].numel(),
        "loss_unit": f"nats per answer token, {args.n_measured} documents per skill",
        "loss_train": measure(model, tokenizer, args.seed + 2, False, args.n_measured),
        "loss_held_out": measure(model, tokenizer, args.seed + 3, True, args.n_measured),
        "wall_minutes": round((time.time() - start) / 60, 1),
        "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.out.iterdir())
    log.info("%s\n%s: %.2f MB", json.dumps(report, indent=2), args.out, size / 1e6)


if __name__ == "__main__":
    main()
