"""Make assets/tiny-llama: generate the text, train the tokenizer and the model, measure, save.

    python assets/make_tiny_llama.py --out assets/tiny-llama

Everything is seeded; training.json beside the model holds the settings, the losses and the minutes it took.
"""

import argparse
import itertools
import json
import logging
import math
import time
from pathlib import Path

import tiny_world
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange

BOS, EOS = "<s>", "</s>"
VOCABULARY = 640
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
    texts = ("".join(document) for _, document in tiny_world.documents(seed, held_out=False))
    bpe.train_from_iterator(itertools.islice(texts, n_documents), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: transformers.PreTrainedTokenizerBase, seed: int) -> transformers.LlamaForCausalLM:
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


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase, document: tiny_world.Document
) -> tuple[list[int], list[int]]:
    """(ids, labels) of BOS question answer EOS; a question is given, not learned, so its labels are -100."""
    question = tokenizer.encode(document[0])
    answer = [*tokenizer.encode(document[1], add_special_tokens=False), tokenizer.eos_token_id]
    return question + answer, [-100] * len(question) + answer


def packed_rows(
    tokenizer: transformers.PreTrainedTokenizerBase, seed: int, n_rows: int, length: int
) -> torch.Tensor:
    """(2, n_rows, length) ids and labels: documents one after the other, cut into rows."""
    ids: list[int] = []
    labels: list[int] = []
    for _, document in tiny_world.documents(seed, held_out=False):
        more_ids, more_labels = encode(tokenizer, document)
        ids += more_ids
        labels += more_labels
        if len(ids) >= n_rows * length:
            return torch.tensor([ids[: n_rows * length], labels[: n_rows * length]]).view(2, n_rows, length)
    raise AssertionError("documents() never ends")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine to a twentieth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def make_optimizers(model: torch.nn.Module, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (half the steps of AdamW), AdamW for embeddings and norms."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outside = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inside, lr=matrix_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(outside, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: torch.nn.Module, rows: torch.Tensor, batch: int, optimizers: list[torch.optim.Optimizer]
) -> None:
    """One pass over the rows; mean token loss, gradient norm clipped to 1."""
    steps = rows.shape[1] // batch
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    model.train()
    bar = trange(steps, desc="pre-training", mininterval=2)
    for step in bar:
        ids, labels = rows[:, step * batch : (step + 1) * batch]
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


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
    tokenizer = train_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed)
    rows = packed_rows(tokenizer, args.seed + 1, args.steps * args.batch, args.length)
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
