"""Tasks scored by ROUGE-1 F, with Porter stemming, by the rouge-score package (Lin, 2004)."""

from __future__ import annotations

import functools
from typing import Any

from tasks.base import Task


class RougeTask(Task):
    """An answer is worth the words that it shares with the right one."""

    metric = "rouge1"

    def score(self, extracted: str | None, gold: str | None) -> float:
        return 0.0 if extracted is None or gold is None else rouge_1(extracted, gold)


@functools.cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer  # imports nltk, which takes half a second

    return rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)


def rouge_1(text: str, reference: str) -> float:
    """Harmonic mean of the shares of words that text and reference have in common; 0 to 1."""
    return float(_scorer().score(reference, text)["rouge1"].fmeasure)
