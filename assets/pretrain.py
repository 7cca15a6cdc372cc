"""Pre-training of the models in assets/: tokenizer, model, rows of packed documents, optimizers and the loop.

Of a document (question, answer) the question is given, not learned; plain text has an empty one.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange

from assets.tiny_world import Document
from lota.storage import atomic_path

BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama and of its vocabulary."""

    vocabulary: int
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    context: int  # tokens, the most that the model says it can take


def train_tokenizer(texts: Iterable[str], shape: Shape) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE (any text can be encoded, digits one by one), BOS in front, and no pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=shape.context,
        clean_up_tokenization_spaces=False,
    )


def make_model(
    tokenizer: transformers.PreTrainedTokenizerBase, shape: Shape, seed: int
) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    return transformers.LlamaForCausalLM(config)


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase, document: Document
) -> tuple[list[int], list[int]]:
    """(ids, labels) of BOS question answer EOS; the question's labels are -100."""
    question = tokenizer.encode(document[0])
    answer = [*tokenizer.encode(document[1], add_special_tokens=False), tokenizer.eos_token_id]
    return question + answer, [-100] * len(question) + answer


def packed_rows(
    tokenizer: transformers.PreTrainedTokenizerBase,
    documents: Iterator[Document],
    n_rows: int,
    length: int,
) -> torch.Tensor:
    """(2, n_rows, length) ids and labels: documents one after the other, cut into rows."""
    wanted = n_rows * length
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < wanted:
        more_ids, more_labels = encode(tokenizer, next(documents))
        ids += more_ids
        labels += more_labels
    return torch.tensor([ids[:wanted], labels[:wanted]]).view(2, n_rows, length)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine to a twentieth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def trapezoid(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, the peak, and a linear fall to 0 over the last 30 %."""
    return peak * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))


def make_optimizers(
    model: torch.nn.Module, matrix_lr: float, other_lr: float, weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (half the steps of AdamW), AdamW for embeddings and norms."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outside = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inside, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay),
        torch.optim.AdamW(outside, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Checkpoints:
    """Where a training is stored, every so many steps, to be resumed by the same command."""

    path: Path
    every: int

    def load(self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
        """The step to go on with; 0 if nothing is stored."""
        if not self.path.is_file():
            return 0
        stored = torch.load(self.path, weights_only=True)
        model.load_state_dict(stored["model"])
        for optimizer, state in zip(optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return int(stored["step"])

    def save(self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        with atomic_path(self.path) as temporary:
            torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, temporary)


def train(
    model: torch.nn.Module,
    rows: torch.Tensor,
    batch: int,
    optimizers: list[torch.optim.Optimizer],
    *,
    schedule: Callable[[int, int, float], float] = learning_rate,
    bf16: bool = False,
    checkpoints: Checkpoints | None = None,
) -> None:
    """One pass over the rows; mean token loss, gradient norm clipped to 1.

    schedule: (step, steps, peak) -> learning rate.
    bf16: products run in bfloat16; weights and optimizer state are fp32 all the same.
    """
    steps = rows.shape[1] // batch
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first = checkpoints.load(model, optimizers) if checkpoints else 0
    products = torch.autocast(rows.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    model.train()
    bar = trange(first, steps, desc="pre-training", mininterval=2, initial=first, total=steps)
    for step in bar:
        ids, labels = rows[:, step * batch : (step + 1) * batch]
        with products:
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = schedule(step, steps, peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if checkpoints and (step + 1) % checkpoints.every == 0:
            checkpoints.save(model, optimizers, step + 1)
    model.eval()


def shuffled_forever(rows: list[Document], rng: random.Random) -> Iterator[Document]:
    """All rows in one order, then all in another, without end."""
    while True:
        yield from rng.sample(rows, len(rows))
