"""What assets/study-llama learns from: sources of real texts and the generated world, without any test row.

Of wikitext and the chats it sees all but a held-out part; of the tasks that the studies adapt to a quarter of
their training rows, so that their format is known and most of them is new. Left out: validation rows (hash
below VALIDATION, as `validation_fraction` cuts them), held-out rows, and whatever repeats a test row. Sources
are under licences that allow derived works of any use: samsum, alpaca_eval and the GPT-4 answers are not.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from assets import tiny_world
from assets.pretrain import shuffled_forever
from assets.tiny_world import Document
from lota.data.examples import hash_number, in_validation
from lota.data.task import Row, Task
from tasks import get_task

VALIDATION = 0.1  # at most this share of a task's training rows may be cut for validation
NGRAM = 13  # words in a row that no text may share with a test row
WORLD_HELD_OUT = 300  # documents of each held-out measure


@dataclass(frozen=True)
class Source:
    """Rows of some tasks as documents."""

    tasks: tuple[str, ...]
    weight: float  # share of the text, in bytes
    licence: str
    seen: float = 1.0  # share of the rows, by hash
    held_out: float = 0.08  # share of the seen rows that is not learnt, by hash
    split: str = "train"


SOURCES = {
    "wikitext": Source(("wikitext",), 0.36, "CC BY-SA 3.0", held_out=0.12, split="validation"),
    "gsm8k": Source(("gsm8k",), 0.15, "MIT", seen=0.25),
    "sql": Source(("sql",), 0.08, "CC BY 4.0", seen=0.25),
    "commonsense": Source(
        ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq"),
        0.17,
        "ARC: CC BY-SA 4.0; others: ODC-By, or the set's own",
        seen=0.25,
    ),
    "chats": Source(("sharegpt",), 0.04, "Apache-2.0"),
    "answers": Source(("se",), 0.01, "CC BY-SA"),
}
WORLD = "world"
_REQUEST = re.compile(r"\APlease (?:[^:]{10,90}: ?|answer the following question with true or false, )")
WORLD_WEIGHT = 0.19
TURNS = 4  # answers of a chat that are documents, each with all that was said before as its question
# Test rows of these are looked for in every source.
TESTED = (
    "gsm8k", "arc", "ARC-Easy", "ARC-Challenge", "openbookqa", "boolq", "piqa", "hellaswag", "sql", "samsum",
    "hh", "alpaca_eval",
)  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def question_of(row: Row) -> str:
    """What a row asks, without the words that all rows of its task share."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    asked = row.get("question") or row.get("instruction") or row.get("dialogue") or row.get("text") or ""
    text = asked if isinstance(asked, str) else str(asked)
    text = _REQUEST.sub("", text)
    return re.split(r"\n\n(?:Answer|Solution|Ending|Option)1:|\n\nAnswer format:", text)[0]


def _with_turns(name: str) -> Task:
    task = get_task(name)
    return task.with_options(num_turns=TURNS) if "num_turns" in task.options else task


def _document(task: Task, row: Row) -> Document:
    """Of a chat, the answer is learnt; of anything else the whole text."""
    question, answer = task.prompt(row), task.target(row)
    return (question, answer) if task.chat else ("", question + answer)


class RowsOfTests:
    """Texts of test rows, to be kept out of training."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.whole = {" ".join(words(text)) for text in texts} - {""}
        self.runs = {run for text in texts for run in _runs(words(text))}

    def repeated_in(self, text: str) -> bool:
        """Whether a text is one of them, or has NGRAM words in a row in common with one."""
        found = words(text)
        return " ".join(found) in self.whole or any(run in self.runs for run in _runs(found))


def _runs(found: list[str]) -> Iterator[int]:
    return (hash(tuple(found[i : i + NGRAM])) for i in range(len(found) - NGRAM + 1))


class Texts:
    """Documents of every source, learnt and held out, from the files of a data folder."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir

    @cached_property
    def tested(self) -> RowsOfTests:
        tasks = [get_task(name) for name in TESTED]
        rows = (row for task in tasks for row in self._rows(task, task.held_out or "eval"))
        return RowsOfTests([question_of(row) for row in rows])

    def _rows(self, task: Task, split: str) -> list[Row]:
        return task.load(split, self.data_dir)

    def of(self, source: Source) -> tuple[list[Document], list[Document]]:
        """Documents that are learnt and those held out; turns of one chat are on the same side."""
        learnt: dict[Document, None] = {}
        held_out: dict[Document, None] = {}
        for task in map(_with_turns, source.tasks):
            for row in self._rows(task, source.split):
                key = task.messages(row)[0]["content"] if task.chat else task.prompt(row) or task.target(row)
                if hash_number(f"seen {key}") >= source.seen or self._kept_apart(task, row, source):
                    continue
                side = held_out if hash_number(f"held out {key}") < source.held_out else learnt
                side[_document(task, row)] = None
        return list(learnt), [document for document in held_out if document not in learnt]

    def _kept_apart(self, task: Task, row: Row, source: Source) -> bool:
        cut = source.split == "train" and in_validation(task, row, VALIDATION)
        return cut or self.tested.repeated_in(question_of(row))

    @cached_property
    def found(self) -> dict[str, tuple[list[Document], list[Document]]]:
        """Source -> documents that are learnt and those held out."""
        return {name: self.of(source) for name, source in SOURCES.items()}

    def stream(self, seed: int) -> Iterator[Document]:
        """Documents without end: next comes the source that is furthest behind its share."""
        weights = {**{name: source.weight for name, source in SOURCES.items()}, WORLD: WORLD_WEIGHT}
        streams = {
            name: shuffled_forever(learnt, random.Random(f"{seed} {name}"))
            for name, (learnt, _) in self.found.items()
        }
        streams[WORLD] = (document for _, document in tiny_world.documents(seed, held_out=False))
        given = dict.fromkeys(weights, 0.0)
        while True:
            name = min(weights, key=lambda one: given[one] / weights[one])
            document = next(streams[name])
            given[name] += len("".join(document).encode())
            yield document

    def held_out(self) -> dict[str, list[Document]]:
        """Source -> documents that the base never saw."""
        world = itertools.islice(tiny_world.documents(0, held_out=True), WORLD_HELD_OUT)
        apart = {name: documents for name, (_, documents) in self.found.items() if documents}
        return {**apart, WORLD: [document for _, document in world]}

    def digest(self) -> str:
        """SHA-256 of all documents of files, learnt and held out."""
        hashed = hashlib.sha256()
        for name, sides in self.found.items():
            for side in sides:
                for question, answer in side:
                    hashed.update(f"{name}\0{question}\0{answer}\0".encode())
        return hashed.hexdigest()
