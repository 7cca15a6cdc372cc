"""Chats of `<data_dir>/sharegpt_data/`: sharegpt, sharegpt4 and shareclaude.

sharegpt, conversations.json, of each chat the first `num_turns` answers:
    {"id": "identity_0", "conversations": [{"from": "human", "value": "Who are you?"},
     {"from": "gpt", "value": "I am Vicuna, a language model trained by researchers from ..."}, ...]}
sharegpt4, every *gpt4_completions.json, and shareclaude, every *claude_completions.json:
    {"Describe a process of making crepes.": ["Making crepes is an easy and delicious process! ..."], ...}
With `prefs_path`, sharegpt is the preferences of that file instead; an output that is no text (a "true" that
lost its quotes) is taken as Python writes it:
    {"instruction": "The sentence you are given might be too wordy, ...", "output_1": "If you have any
     questions about my rate, please let me know.", "output_2": "If you ...", "preference": 2}

Chats in which a model's special tokens are spelled out, or the assistant speaks first, are left out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.base import Preference, Row, text_of
from tasks.chat import (
    ChatTask,
    PreferenceTask,
    examples_of,
    has_special_tokens,
    preference_row,
    turns_of,
    user,
)
from tasks.hub import unreachable, without_retries
from tasks.rows import read_completions, read_rows

logger = logging.getLogger(__name__)

HUB_SET = "TRI-ML/dpo-rlaif-data"
HUB_REVISION = "8d6ea743349dbbff448abee17f68820f5e15d2f8"
HUB_FILE = "sharegpt1turn_df1.0_ff0_gpt4_completions.json"


class ShareGPT(PreferenceTask):
    """Chats, or preferences if `prefs_path` is set."""

    name = "sharegpt"
    options: Mapping[str, Any] = {"num_turns": 1, "prefs_path": None}

    @property
    def has_preferences(self) -> bool:
        return self.options["prefs_path"] is not None

    def load(self, split: str, data_dir: str | os.PathLike[str]) -> list[Row]:
        """The chats of conversations.json, or the preferences of prefs_path; errors as `Task.load`."""
        self.check_split(split)
        if self.has_preferences:
            return read_rows(Path(self.options["prefs_path"]).expanduser(), self.check, _preference)
        path = Path(data_dir).expanduser() / "sharegpt_data" / "conversations.json"
        if not path.is_file():
            raise ValueError(
                f"task {self.name}: no data for split {split!r} at {path}; it has no hub set. It takes a "
                'JSON list of {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}'
            )
        return read_rows(path, self.check, self.unpack)

    def unpack(self, entry: Row) -> Iterator[Row]:
        turns = turns_of(entry, "conversations")
        if not has_special_tokens(*(turn["content"] for turn in turns)):
            yield from examples_of(turns, self.options["num_turns"])

    def target(self, row: Row) -> str:
        return row["chosen"] if self.has_preferences else row["response"]

    def preference(self, row: Row) -> Preference:
        if not self.has_preferences:
            raise ValueError(f"task {self.name} has preferences only with prefs_path=FILE")
        return super().preference(row)


def _preference(entry: Row) -> Iterator[Row]:
    instruction = text_of(entry, "instruction", empty=False).strip()
    first, second = (_output(entry, field) for field in ("output_1", "output_2"))
    if entry.get("preference") not in (1, 2):
        raise ValueError(f"field 'preference' should be 1 or 2, is {entry.get('preference')!r:.60}")
    if not has_special_tokens(instruction, first, second):
        chosen, rejected = (first, second) if entry["preference"] == 1 else (second, first)
        yield preference_row(instruction, chosen, rejected)


def _output(entry: Row, field: str) -> str:
    value = entry.get(field)
    return str(value) if isinstance(value, bool | int | float) else text_of(entry, field).strip()


class Completions(ChatTask):
    """One-turn chats of all files with that ending; a prompt with several completions is several rows."""

    options: Mapping[str, Any] = {"num_turns": 1}  # any number: there is one turn

    def __init__(self, name: str, ending: str, hub_file: str | None = None) -> None:
        self.name, self.ending, self.hub_file = name, ending, hub_file

    def load(self, split: str, data_dir: str | os.PathLike[str]) -> list[Row]:
        """The rows of all files, in the order of their names; errors as `Task.load`."""
        self.check_split(split)
        folder = Path(data_dir).expanduser() / "sharegpt_data"
        paths = sorted(folder.glob(f"*{self.ending}")) or [self._from_hub(folder)]
        rows = []
        for path in paths:
            logger.info("%s %s: rows from %s", self.name, split, path)
            rows += read_rows(path, self.check, self.unpack, read_completions)
        return rows

    def unpack(self, entry: Row) -> Iterator[Row]:
        prompt, completions = text_of(entry, "prompt").strip(), entry["completions"]
        if not isinstance(completions, list) or not all(isinstance(text, str) for text in completions):
            raise ValueError(f"prompt {prompt!r:.60}: expected a list of texts, found {completions!r:.60}")
        for text in completions:
            if prompt and text.strip() and not has_special_tokens(prompt, text):
                yield {"messages": user(prompt), "response": text.strip()}

    def _from_hub(self, folder: Path) -> Path:
        wanted = f"{folder}/*{self.ending}"
        if self.hub_file is None:
            raise ValueError(f"task {self.name}: no data at {wanted}; it has no hub set")
        import huggingface_hub

        # not through datasets, for which every prompt would be a column
        try:
            with without_retries():
                path = huggingface_hub.hf_hub_download(
                    repo_id=HUB_SET, filename=self.hub_file, repo_type="dataset", revision=HUB_REVISION
                )
        except Exception as error:  # network and hub libraries share no base class
            url = f"https://huggingface.co/datasets/{HUB_SET}/resolve/{HUB_REVISION}/{self.hub_file}"
            places = f"{wanted} and at hub set {HUB_SET}"
            missing = f"task {self.name}: no data"
            raise unreachable(missing, places, error, f"wget {url}", "the file", folder) from error
        return Path(path)


TASKS = {
    task.name: task
    for task in (
        ShareGPT(),
        Completions("sharegpt4", "gpt4_completions.json", HUB_FILE),
        Completions("shareclaude", "claude_completions.json"),
    )
}
