"""Bases of the studies with text of their own, and the tasks that they are adapted to, in sizes for a CPU."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from assets import tiny_world
from assets.study_texts import Texts
from lota.config import Config
from lota.data.batches import encode
from lota.data.prompts import Prompter
from lota.data.task import FindTask, Row, Task
from lota.evaluate.text_loss import Text
from lota.models.loading import load_tokenizer
from lota.storage import content_key, write_json
from lota.train.trainer import Trainer
from tasks import get_task

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DATA = SHARED / "data"


class Bf16Trainer(Trainer):
    """In mixed precision, with attention by plain products: on a CPU the backward pass of the fused one takes
    longer in bf16 than all else.
    """

    def __init__(self, config: Config, find_task: FindTask):
        config.model.fsdp_policy_mp = "bfloat16"
        super().__init__(config, find_task)

    def load_model(self, *given: Any, **named: Any) -> PreTrainedModel:
        model = super().load_model(*given, **named)
        model.set_attn_implementation("eager")
        return model


@dataclass(frozen=True)
class Base:
    """A model that is adapted, and text like that which it was trained on."""

    source: Path  # folder of the model
    own_text: Callable[[], Sequence[Text]]
    about: str  # for readers of a page
    remedy: str = "it belongs to the shared data"  # if the folder is not there
    trainer: type[Trainer] = Trainer
    products: str = "fp32"  # of matrices in training
    end: str | None = None  # the token that its texts end with, if its tokenizer names another

    def folder(self, out: Path) -> Path:
        """The model's folder; below `out`, as a copy, if its end token is another than there."""
        if self.end is None:
            return self.source
        folder = out / "bases" / self.source.name
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as place:
                made = Path(place) / "made"
                _copy_with_end(self.source, made, self.end)
                try:
                    made.rename(folder)
                except OSError:
                    if not folder.is_dir():  # else another process was first
                        raise
        return folder


def _copy_with_end(source: Path, folder: Path, end: str) -> None:
    """Copy a model, with another token of its vocabulary as end token."""
    folder.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    number = load_tokenizer(source).convert_tokens_to_ids(end)
    changed = [
        ("tokenizer_config.json", {"eos_token": end}),
        ("config.json", {"eos_token_id": number}),
        ("generation_config.json", {"eos_token_id": number}),
    ]
    for name, settings in changed:
        write_json(folder / name, json.loads((folder / name).read_text(encoding="utf-8")) | settings)


def _world_text() -> list[Text]:
    return [document for _, document in islice(tiny_world.documents(3, held_out=True), 300)]


def _held_out_text() -> list[Text]:
    """Documents of every source in turn, so that the first bytes of them are of all sources."""
    sources = list(Texts(DATA).held_out().values())
    longest = max(map(len, sources))
    return [documents[i] for i in range(longest) for documents in sources if i < len(documents)]


def _stories() -> list[Text]:
    text = (SHARED / "models" / "stories260K" / "tinystories_sample.txt").read_text(encoding="utf-8")
    return [("", story.strip()) for story in text.split("<|endoftext|>") if story.strip()]


BASES = {
    "tiny-llama": Base(
        ROOT / "assets" / "tiny-llama", _world_text, "a Llama that learnt a small made-up world"
    ),
    "study-llama": Base(
        ROOT / "assets" / "study-llama",
        _held_out_text,
        "a Llama that learnt encyclopaedia articles, questions with answers, and chats",
        remedy="python -m assets.make_study_base --data_dir ../shared/data makes it",
        trainer=Bf16Trainer,
        products="bf16",
    ),
    "stories260K": Base(
        SHARED / "models" / "stories260K",
        _stories,
        "a Llama of stories for children, which parts its texts by the token <s>",
        end="<s>",
    ),
}


@dataclass(frozen=True)
class Workload:
    """A task on a base, and how much of it a run sees."""

    task: str
    base: str  # a name of BASES
    n_examples: int  # of a run
    batch_size: int
    max_length: int  # tokens; longer rows are left out of every split
    n_validation: int = 100  # rows that choose
    n_test: int = 200  # rows for the loss, a seeded sample
    n_scored: int = 100  # the first of them, for the score; 0: none
    own_bytes: int = 30_000  # of the base's own text
    new_tokens: int | None = None  # of a completion; None: the task's own
    data_dir: str | None = str(DATA)

    @property
    def steps(self) -> int:
        return self.n_examples // self.batch_size


def sizes_key(workload: Workload, base_hash: str) -> str:
    """A key of the workload and the base: results of other sizes are other results."""
    sizes = {key: value for key, value in asdict(workload).items() if key != "data_dir"}
    sizes["end"] = BASES[workload.base].end
    return content_key([sizes, base_hash])[:12]


def _on_both(name: str, **sizes: Any) -> dict[str, Workload]:
    """A real task on the two bases with knowledge to lose."""
    return {f"{name} on {base}": Workload(name, base, **sizes) for base in ("study-llama", "stories260K")}


WORKLOADS: dict[str, Workload] = {
    # as scripts/sweep_sparsity.sh trains it
    **{
        task: Workload(task, "tiny-llama", 3200, 16, 128, 200, 400, 400, data_dir=None)
        for task in ("toy_sort", "toy_shift", "toy_reverse")
    },
    # study-llama has seen a quarter of the training rows of sql, gsm8k and boolq; stories260K stories alone
    **_on_both("sql", n_examples=480, batch_size=8, max_length=192, new_tokens=64),
    **_on_both("gsm8k", n_examples=480, batch_size=8, max_length=224, n_scored=0),
    **_on_both("samsum", n_examples=320, batch_size=8, max_length=224, new_tokens=64),
    **_on_both("boolq", n_examples=480, batch_size=8, max_length=128),
}
# Three tasks on one base that one model is to learn, in the order in which they come one after the other
GROUPS: dict[str, tuple[str, ...]] = {
    "real tasks": tuple(f"{task} on stories260K" for task in ("sql", "gsm8k", "boolq")),
    "toy tasks": ("toy_shift", "toy_sort", "toy_reverse"),
}
SMOKE = Workload("toy_sort", "tiny-llama", 16, 8, 128, 8, 8, 4, own_bytes=500, data_dir=None, new_tokens=4)


def short_rows(workload: Workload) -> Task:
    """The task without the rows that are too long for a run."""
    task = copy.copy(get_task(workload.task))
    load, tokenizer = task.load, load_tokenizer(BASES[workload.base].source)
    prompter, whole = Prompter(tokenizer), {"max_length": 10**6, "max_prompt_length": 10**6}
    known: dict[str, list[Row]] = {}

    def short(split: str, data_dir: str | os.PathLike[str] = "") -> list[Row]:
        if split not in known:
            rows = load(split, workload.data_dir or data_dir)
            lengths = (len(encode(tokenizer, prompter.example(task, row), **whole)) for row in rows)
            pairs = zip(rows, lengths, strict=True)
            known[split] = [row for row, length in pairs if length <= workload.max_length]
        return list(known[split])

    task.load = short  # type: ignore[method-assign]
    return task
