r"""Preferences: hh, shp, se, ultrafeedback and ultrafeedbacknarrow.

hh, Anthropic's helpful and harmless chats (arXiv 2204.05862, MIT licence), which differ in the last turn:
    {"chosen": "\n\nHuman: Explain the steps involved in making scrambled eggs.\n\nAssistant: 1. Crack the
               eggs into a mixing bowl. ...", "rejected": "\n\nHuman: Explain ...\n\nAssistant: ..."}
shp, answers on Reddit (arXiv 2110.08420); pairs whose better answer has less than twice the other's score are
left out, as its authors advise:
    {"history": "...", "human_ref_A": "...", "human_ref_B": "...", "labels": 1, "score_A": 20, "score_B": 4}
se, StackExchange answers by votes (CC BY-SA), response_j being the better:
    {"question": "I'm writing a code using Java Swing to press the right button ...", "response_j": "...",
     "response_k": "..."}
ultrafeedback, model answers ranked by a reward model, and ultrafeedbacknarrow, of which all pairs are close:
    {"prompt": "...", "chosen": "Human: ...\n\nAssistant: ...", "rejected": "Human: ...\n\nAssistant: ..."}
or with chosen and rejected as lists of {role, content}, as in HuggingFaceH4/ultrafeedback_binarized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tasks.base import HubSet, Message, Row, text_of
from tasks.chat import PreferenceTask, has_special_tokens, preference_row, turns_of

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \n]?")
_MIN_RATIO = 2.0  # of the votes of an SHP pair


def split_transcript(text: str, field: str) -> tuple[list[Message], str]:
    """A chat written as "Human: ... Assistant: ..." -> the turns before the last answer, and that answer."""
    parts = _TURN.split(text)
    speakers, contents = parts[1::2], [part.strip() for part in parts[2::2]]
    if parts[0].strip() or not speakers or speakers[0] != "Human" or speakers[-1] != "Assistant":
        raise ValueError(f"field {field!r} should run from 'Human:' to a last 'Assistant:', is {text!r:.60}")
    said = [{"from": who.lower(), "value": what} for who, what in zip(speakers, contents, strict=True)]
    turns = turns_of({field: said}, field)
    return turns[:-1], turns[-1]["content"]


class HH(PreferenceTask):
    name = "hh"
    splits = ("train", "test")
    held_out = "test"
    hub = HubSet(
        path="Anthropic/hh-rlhf",
        revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        splits={"train": "train", "test": "test"},
    )

    def unpack(self, entry: Row) -> Iterator[Row]:
        before, chosen = split_transcript(text_of(entry, "chosen"), "chosen")
        other, rejected = split_transcript(text_of(entry, "rejected"), "rejected")
        if before != other:  # in some published rows the chats part earlier
            return
        yield {"messages": before, "chosen": chosen, "rejected": rejected}


class SHP(PreferenceTask):
    name = "shp"
    splits = ("train", "validation", "test")
    held_out = "test"
    hub = HubSet(
        path="stanfordnlp/SHP",
        revision="e94b5f32602712d78ed494fe79105b1959396686",
        splits={"train": "train", "validation": "validation", "test": "test"},
    )

    def unpack(self, entry: Row) -> Iterator[Row]:
        history, a, b = (text_of(entry, field) for field in ("history", "human_ref_A", "human_ref_B"))
        scores = [_score(entry, field) for field in ("score_A", "score_B")]
        if entry.get("labels") not in (0, 1, "0", "1"):
            raise ValueError(f"field 'labels' should be 1 (A is better) or 0, is {entry.get('labels')!r:.60}")
        if max(scores) < _MIN_RATIO * min(scores):
            return
        yield preference_row(history, a, b) if int(entry["labels"]) else preference_row(history, b, a)


def _score(entry: Row, field: str) -> float:
    try:
        return float(entry[field])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"field {field!r} should be a number, is {entry.get(field)!r:.60}") from None


class StackExchange(PreferenceTask):
    name = "se"
    hub = HubSet(
        path="lvwerra/stack-exchange-paired",
        revision="0c0a1bc27a253683bdcdd061007b82bfc7bbddb1",
        data_dir="data/rl",
        splits={"train": "train"},
    )

    def unpack(self, entry: Row) -> Iterator[Row]:
        fields = ("question", "response_j", "response_k")
        yield preference_row(*(text_of(entry, field, empty=False) for field in fields))


class UltraFeedback(PreferenceTask):
    name = "ultrafeedback"
    splits = ("train", "test")
    held_out = "test"
    hub = HubSet(
        path="Asap7772/ultrafeedback_binarized_relabelled_ultrarm",
        revision="382c65cb95f62a7bd6be949898189f1a8d39069d",
        splits={"train": "train_prefs", "test": "test_prefs"},
    )

    def unpack(self, entry: Row) -> Iterator[Row]:
        prompt = text_of(entry, "prompt", empty=False).strip()
        chosen, rejected = (_answer(entry, field, prompt) for field in ("chosen", "rejected"))
        if not has_special_tokens(prompt, chosen, rejected):
            yield preference_row(prompt, chosen, rejected)


class UltraFeedbackNarrow(UltraFeedback):
    """Its held-out preferences are those of ultrafeedback, so that the two can be compared."""

    name = "ultrafeedbacknarrow"
    hub = HubSet(
        path="Asap7772/ultrafeedback_binarized_narrow",
        revision="fbd327c00b2dabafaaa41902e2941866bef89eca",
        splits={"train": "train_prefs"},
    )

    def hub_of(self, split: str) -> HubSet:
        return UltraFeedback.hub if split == "test" else self.hub


def _answer(entry: Row, field: str, prompt: str) -> str:
    """The answer in a chat that consists of the prompt and it."""
    if isinstance(entry.get(field), list):
        turns = turns_of(entry, field)
        if not turns or turns[-1]["role"] != "assistant":
            raise ValueError(f"field {field!r} should end with the assistant's message")
        return turns[-1]["content"]
    # the prompt may itself hold "Assistant:", so that it is taken off as it stands
    start = re.match(rf"\s*Human:\s*{re.escape(prompt)}\s*Assistant:", text_of(entry, field))
    if start is None:
        raise ValueError(f"field {field!r} should be 'Human: <prompt> Assistant: <answer>'")
    return entry[field][start.end() :].strip()


TASKS = {t.name: t for t in (HH(), SHP(), StackExchange(), UltraFeedback(), UltraFeedbackNarrow())}
