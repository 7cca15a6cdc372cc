"""Samples for AlpacaEval: a JSON list of {instruction, output, generator} that grows and can be continued."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lota.data.batches import Prompt
from lota.data.prompts import Prompter
from lota.data.task import Task
from lota.evaluate.decoding import Decoding
from lota.evaluate.generation import generate, prompt_bound
from lota.evaluate.journal import Journal
from lota.models.hashing import model_key
from lota.places import holding
from lota.storage import content_key, write_json

logger = logging.getLogger(__name__)


class Sampler:
    """A loaded model that answers the prompts of a task."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompter: Prompter,
        task: Task,
        *,
        generator: str,
        max_prompt_length: int | None = None,
        chunk_size: int = 32,
    ) -> None:
        self.model, self.prompter, self.task = model, prompter, task
        self.generator, self.max_prompt_length, self.chunk_size = generator, max_prompt_length, chunk_size

    @functools.cached_property
    def model_key(self) -> dict[str, str]:
        return model_key(self.model, self.prompter.tokenizer)

    def write(
        self,
        path: str | os.PathLike[str],
        instructions: Sequence[str],
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        sample: int = 0,
        chosen: Sequence[int] | None = None,
        on_done: Callable[[int], object] = lambda count: None,
    ) -> list[dict[str, str]]:
        """Answer the prompts, or those numbered `chosen`, and write the list to `path` after every chunk.

        instructions: what the file shows of each prompt. sample: which of several answers to a prompt. The
        list on disk is whole at any time, in the order of the prompts. What an earlier run has written is
        kept if model, prompts, seed, sample, settings and template are the same. A draw depends on the sample
        and the prompt's number in the whole list. on_done is called with the number of answers that are new
        on disk.
        """
        path = Path(path)
        chosen = range(len(prompts)) if chosen is None else chosen
        key = self._key(prompts, decoding, sample)
        with holding(path), Journal(path.with_suffix(".journal"), key, [path]) as journal:

            def save() -> list[dict[str, str]]:
                done = [i for i in chosen if i in journal.records]
                samples = [
                    {
                        "instruction": instructions[i],
                        "output": journal.records[i],
                        "generator": self.generator,
                    }
                    for i in done
                ]
                journal.sync()
                write_json(path, samples)
                return samples

            missing = [i for i in chosen if i not in journal.records]
            on_done(len(chosen) - len(missing))
            samples = save() if journal.records else []  # the file never comes before the journal
            for start in range(0, len(missing), self.chunk_size):
                chunk = missing[start : start + self.chunk_size]
                self._answer(prompts, chunk, decoding, sample, journal)
                samples = save()
                on_done(len(chunk))
        return samples

    def _key(self, prompts: Sequence[Prompt], decoding: Decoding, sample: int) -> dict[str, Any]:
        settings = {**asdict(decoding), "max_prompt_length": self.max_prompt_length}
        seed = settings.pop("seed")
        return {
            "task": self.task.name,
            "version": self.task.version,
            "data": content_key([prompt.text for prompt in prompts]),
            **self.model_key,
            "template": self.prompter.key,
            "settings": {**settings, "dtype": str(self.model.dtype).removeprefix("torch.")},
            "seed": seed if decoding.temperature else None,  # greedy decoding draws nothing
            **({"sample": sample} if sample else {}),
        }

    def _answer(
        self,
        prompts: Sequence[Prompt],
        chunk: Sequence[int],
        decoding: Decoding,
        sample: int,
        journal: Journal,
    ) -> None:
        tokenizer = self.prompter.tokenizer
        bound = prompt_bound(self.model.config, decoding.max_new_tokens, self.max_prompt_length)
        ids = [prompts[i].ids(tokenizer, bound) for i in chunk]
        n_cut = sum(prompts[i].ids(tokenizer) != own for i, own in zip(chunk, ids, strict=True))
        if n_cut:
            logger.warning("%d of %d prompts cut to fit", n_cut, len(ids))
        generate(
            self.model,
            tokenizer,
            ids,
            decoding,
            batch_size=len(chunk),
            indices=chunk,
            sample=sample,
            on_done=lambda at, completion: journal.add(chunk[at], completion.strip()),
        )
