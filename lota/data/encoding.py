"""Examples as token ids: prompt, response, labels, truncation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = -100  # label of tokens that the loss does not count


@dataclass(frozen=True)
class Example:
    """A training example as text. closing: the prompt's last words, kept whenever the prompt is cut.

    keep_end: a prompt that is too long keeps its last tokens (a chat) instead of its first ones. templated: a
    chat template wrote the prompt, special tokens and all. rejected: of a preference pair the answer that
    people like less than `response`.
    """

    prompt: str
    response: str
    closing: str = ""
    keep_end: bool = False
    templated: bool = False
    rejected: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + response; the first `prompt_length` of them are the prompt."""

    input_ids: list[int]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_prompt(
    tokenizer: Any,
    prompt: str,
    *,
    max_prompt_length: int | None = None,
    closing: str = "",
    keep_end: bool = False,
    special_tokens: bool = True,
) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts in front of a text.

    special_tokens: False where a chat template has written them already. A prompt of more than
    max_prompt_length tokens loses the end of what stands before `closing` (with keep_end: the start); special
    tokens in front and the closing words stay.
    """
    split = _with_special_tokens if special_tokens else _as_written
    prefix, ids = split(tokenizer, prompt)
    if max_prompt_length is None or len(prefix) + len(ids) <= max_prompt_length:
        return prefix + ids
    n_tail = _closing_tokens(tokenizer, ids, closing) if closing and prompt.endswith(closing) else 0
    body, tail = ids[: len(ids) - n_tail], ids[len(ids) - n_tail :]
    room = max_prompt_length - len(prefix) - len(tail)
    if room <= 0:
        return (prefix + tail)[-max_prompt_length:]
    return prefix + (body[-room:] if keep_end else body[:room]) + tail


def _closing_tokens(tokenizer: Any, ids: list[int], closing: str) -> int:
    """How many of the last ids it takes to hold the closing words (their first token may hold more)."""
    wanted = closing.strip(" ")
    for n in range(1, min(len(ids), len(closing) + 8) + 1):
        if wanted in tokenizer.decode(ids[-n:]):
            return n
    return min(len(ids), len(tokenizer(closing, add_special_tokens=False).input_ids))


def encode(tokenizer: Any, example: Example, *, max_length: int, max_prompt_length: int) -> Encoded:
    """Token ids of prompt, response and end-of-sequence token, at most max_length of them.

    When the whole is too long the prompt is cut first, to max_prompt_length tokens, then the response; a cut
    response has no end-of-sequence token. Raises ValueError for a tokenizer without one.
    """
    (encoded,) = _encode(tokenizer, example, [example.response], max_length, max_prompt_length)
    return encoded


def encode_pair(
    tokenizer: Any, example: Example, *, max_length: int, max_prompt_length: int
) -> tuple[Encoded, Encoded]:
    """A preference pair, (preferred, rejected), cut as by `encode`; both have the same prompt tokens."""
    responses = [example.response, example.rejected]
    chosen, rejected = _encode(tokenizer, example, responses, max_length, max_prompt_length)
    return chosen, rejected


def _encode(
    tokenizer: Any, example: Example, responses: Sequence[str], max_length: int, max_prompt_length: int
) -> list[Encoded]:
    """The example's prompt, cut when the longest response asks for it, before each of the responses."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, which ends every training response")
    special = not example.templated
    prompt = encode_prompt(tokenizer, example.prompt, special_tokens=special)
    endings = [
        [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in responses
    ]
    if len(prompt) + max(map(len, endings)) > max_length:
        prompt = encode_prompt(
            tokenizer,
            example.prompt,
            max_prompt_length=max_prompt_length,
            closing=example.closing,
            keep_end=example.keep_end,
            special_tokens=special,
        )
    return [Encoded((prompt + ending)[:max_length], len(prompt)) for ending in endings]


def _with_special_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(special tokens in front, tokens of the text); what a tokenizer appends is dropped: a response
    follows.
    """
    plain = tokenizer(text, add_special_tokens=False).input_ids
    full = tokenizer(text).input_ids
    for n in range(len(full) - len(plain) + 1):
        if full[n : n + len(plain)] == plain:
            return full[:n], plain
    return [], full


def _as_written(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(the token for the beginning of text where the text starts with it, the other tokens)."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    n = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    return ids[:n], ids[n:]


def hash_and_lengths(pairs: Iterable[Sequence[Encoded]]) -> tuple[str, list[int]]:
    """SHA-256 over all token ids (so over text, tokenizer, template, cuts); each pair's longest row."""
    digest, lengths = hashlib.sha256(), []
    for pair in pairs:
        digest.update(json.dumps([[row.prompt_length, row.input_ids] for row in pair]).encode())
        lengths.append(max(map(len, pair)))
    return digest.hexdigest(), lengths
