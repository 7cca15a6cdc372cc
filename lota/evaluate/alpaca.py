"""Samples for AlpacaEval: a JSON list of {instruction, output, generator} that grows and can be continued."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lota.data.batches import Prompt
from lota.data.prompts import Prompter
from lota.data.task import Task
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import Engine
from lota.evaluate.generation import prompt_bound
from lota.evaluate.journal import Journal
from lota.places import holding
from lota.storage import content_key, write_json

logger = logging.getLogger(__name__)


class Sampler:
    """A model that answers the prompts of a task."""

    def __init__(
        self,
        engine: Engine,
        prompter: Prompter,
        task: Task,
        *,
        generator: str,
        max_prompt_length: int | None = None,
        chunk_size: int = 32,
    ) -> None:
        self.engine, self.prompter, self.task = engine, prompter, task
        self.generator, self.max_prompt_length, self.chunk_size = generator, max_prompt_length, chunk_size

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
        """Answer the prompts, or those numbered `chosen`, and write the list to `path` after each chunk_size.

        instructions: what the file shows of each prompt. sample: which of several answers to a prompt. The
        list on disk is whole at any time, in the order of the prompts. What an earlier run has answered is
        kept if model, prompts, seed, sample, settings and template are the same. A draw depends on the sample
        and the prompt's number in the whole list. on_done is called with the number of answers that are new
        in the journal beside the list.
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
            if journal.records:
                save()  # the file never comes before the journal
            new = itertools.count(1)

            def keep(at: int, completion: str) -> None:
                journal.add(missing[at], completion.strip())
                if next(new) % self.chunk_size == 0:
                    save()
                on_done(1)

            if missing:
                ids = self._fit([prompts[i] for i in missing], decoding)
                self.engine.complete(ids, decoding, indices=missing, sample=sample, on_done=keep)
            return save()

    def _key(self, prompts: Sequence[Prompt], decoding: Decoding, sample: int) -> dict[str, Any]:
        settings = {**asdict(decoding), "max_prompt_length": self.max_prompt_length}
        seed = settings.pop("seed")
        return {
            "task": self.task.name,
            "version": self.task.version,
            "data": content_key([prompt.text for prompt in prompts]),
            **self.engine.key,
            "template": self.prompter.key,
            "settings": {**settings, **self.engine.settings},
            "seed": seed if decoding.temperature else None,  # greedy decoding draws nothing
            **({"sample": sample} if sample else {}),
        }

    def _fit(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[list[int]]:
        """Token ids of the prompts, cut where they are too long."""
        tokenizer = self.prompter.tokenizer
        bound = prompt_bound(self.engine.context, decoding.max_new_tokens, self.max_prompt_length)
        ids = [prompt.ids(tokenizer, bound) for prompt in prompts]
        n_cut = sum(prompt.ids(tokenizer) != own for prompt, own in zip(prompts, ids, strict=True))
        if n_cut:
            logger.warning("%d of %d prompts cut to fit", n_cut, len(ids))
        return ids
