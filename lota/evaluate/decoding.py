"""How the next token is chosen: greedily, or by a draw that belongs to its prompt and not to the batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

FEW = 1024  # tokens that hold top_p of the probability nearly always
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no character


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and where a completion ends."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # draw from the smallest set of tokens with at least that probability; 1: all
    top_k: int = 0  # draw from that many tokens; 0: all
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end a completion and are not part of it

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature={self.temperature}: must be a number >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: must be above 0 and at most 1 (1 is off)")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: must be >= 0 (0 is off)")
        if "" in self.stop:
            problems.append("stop: an empty text would end every completion at once")
        if problems:
            raise ValueError("; ".join(problems))


def uniforms(decoding: Decoding, index: int, sample: int) -> Tensor:
    """One number in [0, 1) per token that may be drawn; nothing for greedy decoding."""
    if decoding.temperature == 0:
        return torch.empty(0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw_seed(decoding.seed, index, sample))
    return torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64)


def draw_seed(seed: int, index: int, sample: int) -> int:
    """The seed of one completion's draws, in [0, 2^63): of one prompt and sample, whoever draws."""
    digest = hashlib.sha256(f"{seed}/{index}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def choose(logits: Tensor, uniform: Tensor, decoding: Decoding) -> Tensor:
    """The next token of each row. logits: (rows, vocabulary); uniform: (rows,) in [0, 1), unused if greedy.

    The draw inverts the cumulative probability in the order of the vocabulary, which rounding of the logits
    barely moves; an order by probability would let two equally likely tokens trade places.
    """
    if decoding.temperature == 0:
        return logits.argmax(-1)
    # all of (rows, vocabulary), in fp64, so that sums over a large vocabulary barely round
    probabilities = torch.softmax(logits.double() / decoding.temperature, -1)
    if decoding.top_k or decoding.top_p < 1:
        probabilities = _likeliest(probabilities, decoding.top_k, decoding.top_p)
    total = probabilities.cumsum(-1)
    # what is left after top_k and top_p sums to less than 1: the draw is scaled instead of the probabilities
    goal = uniform.to(total.device)[:, None] * total[:, -1:]
    return torch.searchsorted(total, goal, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _likeliest(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the smallest set of tokens with top_p of the probability, of the top_k likeliest.

    Of tokens that are equally likely the first in the vocabulary come first. Sorts no whole vocabulary
    unless it has to, which would take longer than a small model's step.
    """
    size = probabilities.shape[-1]
    # the likeliest tokens, falling: (rows, top_k), or the first FEW in the hope that they hold top_p
    ranked = probabilities.topk(min(top_k or FEW, size)).values
    mass = ranked.sum(-1, keepdim=True) if top_k else probabilities.sum(-1, keepdim=True)
    if not top_k and (ranked.sum(-1, keepdim=True) <= top_p * mass).any():
        ranked = probabilities.sort(dim=-1, descending=True).values
    # a token is kept if those before it hold less than top_p
    before = ranked.cumsum(-1) - ranked
    n_kept = (before < top_p * mass).sum(-1, keepdim=True)
    least = ranked.gather(-1, n_kept - 1)
    # (rows, 1): the smallest probability kept; of the tokens that have just that, the first few are kept
    above, tied = probabilities > least, probabilities == least
    kept = above | (tied & (tied.cumsum(-1) <= n_kept - above.sum(-1, keepdim=True)))
    return probabilities.masked_fill(~kept, 0)


def decode(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], skip_special_tokens: bool = False
) -> str:
    """The text of a completion, blanks and all."""
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)  # a list of texts is what lists of lists give
    return text


class StopCheck:
    """Knows whether the last token of a completion has completed a stop text.

    A completion is decoded only after a token that can be the end of a stop text, which few tokens can.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        # a broken character (one byte of several) may turn into any other
        self.last = {word[-1] for word in stop} | {BROKEN}
        self.tail = max((len(word.encode()) for word in stop), default=0) + 4  # a token adds at least a byte
        self.may_end: dict[int, bool] = {}  # by token

    def reached(self, tokens: Sequence[int]) -> bool:
        if not self.stop or not self._may_end(tokens[-1]):
            return False
        text = decode(self.tokenizer, tokens[-self.tail :])
        return any(word in text for word in self.stop)

    def _may_end(self, token: int) -> bool:
        if token not in self.may_end:
            # three times, because decoding may strip or join the ends of a text
            self.may_end[token] = not self.last.isdisjoint(decode(self.tokenizer, [token] * 3))
        return self.may_end[token]
