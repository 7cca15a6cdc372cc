"""Samples for AlpacaEval: a JSON list of {instruction, output, generator} that grows and can be continued."""

from __future__ import annotations

import functools
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lota.data.prompts import Prompt, Prompter
from lota.evaluate.decoding import Decoding
from lota.evaluate.evaluator import Task
from lota.evaluate.generation import generate, prompt_bound
from lota.evaluate.journal import Journal
from lota.models.hashing import model_key
from lota.utils import content_key, write_json

logger = logging.getLogger(__name__)


def decodings(args: Namespace, stop: Sequence[str]) -> list[Decoding]:
    """One per temperature of generate_samples.py's arguments; ValueError with all that is wrong with them."""
    problems, found = [], []
    if not 0 < args.max_prompt_length < args.max_length:
        problems.append(f"--max_prompt_length {args.max_prompt_length}: must lie between 0 and --max_length")
    if args.chunk_size < 1 or args.ff < 0 or args.n_examples < 0:
        problems.append("--chunk_size must be >= 1, --ff and --n_examples >= 0")
    if args.num_samples_per_prefix < 1:
        problems.append(f"--num_samples_per_prefix {args.num_samples_per_prefix}: must be at least 1")
    most = max(1, args.max_length - args.max_prompt_length)
    for text in args.temperatures.split(","):
        try:
            found.append(Decoding(most, float(text), args.top_p, args.top_k, args.seed, tuple(stop)))
        except ValueError as error:
            problems.append(f"--temperatures {text}: {error}")
    if args.num_samples_per_prefix > 1 and any(decoding.temperature == 0 for decoding in found):
        problems.append("--temperatures 0: greedy samples of a prompt are all the same; ask for one")
    if problems:
        raise ValueError("; ".join(problems))
    return found


class Sampler:
    """A loaded model that answers instructions, each in the prompt that `template` puts around it."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: Task,
        *,
        generator: str,
        max_prompt_length: int | None = None,
        chunk_size: int = 32,
        prompter: Prompter | None = None,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.prompter = prompter or Prompter(tokenizer)
        self.generator, self.max_prompt_length, self.chunk_size = generator, max_prompt_length, chunk_size

    @functools.cached_property
    def model_key(self) -> dict[str, str]:
        return model_key(self.model, self.tokenizer)

    def write(
        self,
        path: str | os.PathLike[str],
        instructions: Sequence[str],
        decoding: Decoding,
        *,
        prompts: Sequence[Prompt] | None = None,
        sample: int = 0,
        chosen: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[dict[str, str]]:
        """Answer the instructions, or those numbered `chosen`, and write them to `path` after every chunk.

        prompts: what the model reads of each instruction; None: the template around it. sample: which of
        several answers to the same instruction. The list on disk is whole at any time, in the order of the
        instructions. What an earlier run has written is kept where model, prompts, seed, sample, settings
        and template are the same. A draw depends on the sample and the instruction's number in the whole
        list. on_done is called with the number of answers that are new on disk.
        """
        path, report = Path(path), on_done or (lambda count: None)
        chosen = range(len(instructions)) if chosen is None else chosen
        texts = list(instructions) if prompts is None else [prompt.text for prompt in prompts]
        key = self._key(texts, decoding, sample)
        if prompts is None:
            rows = [{"instruction": instruction} for instruction in instructions]
            prompts = [self.prompter.prompt(self.template, row) for row in rows]
        with Journal(path.with_suffix(".journal"), key, [path]) as journal:
            missing = [i for i in chosen if i not in journal.records]
            report(len(chosen) - len(missing))
            samples = self._save(path, instructions, chosen, journal)
            for start in range(0, len(missing), self.chunk_size):
                chunk = missing[start : start + self.chunk_size]
                self._answer(prompts, chunk, decoding, sample, journal)
                samples = self._save(path, instructions, chosen, journal)
                report(len(chunk))
        return samples

    def _key(self, texts: Sequence[str], decoding: Decoding, sample: int) -> dict[str, Any]:
        settings = {**asdict(decoding), "max_prompt_length": self.max_prompt_length}
        seed = settings.pop("seed")
        return {
            "task": self.template.name,
            "version": self.template.version,
            "data": content_key(list(texts)),
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
        bound = prompt_bound(self.model.config, decoding.max_new_tokens, self.max_prompt_length)
        whole = [prompts[i].ids(self.tokenizer) for i in chunk]
        ids = [prompts[i].ids(self.tokenizer, bound) for i in chunk]
        n_cut = sum(a != b for a, b in zip(whole, ids, strict=True))
        if n_cut:
            logger.warning("%d of %d prompts cut to fit", n_cut, len(ids))
        generate(
            self.model,
            self.tokenizer,
            ids,
            batch_size=len(chunk),
            indices=chunk,
            sample=sample,
            on_done=lambda at, completion: journal.add(chunk[at], completion.strip()),
            **asdict(decoding),
        )

    def _save(
        self, path: Path, instructions: Sequence[str], chosen: Sequence[int], journal: Journal
    ) -> list[dict[str, str]]:
        samples = [
            {"instruction": instructions[i], "output": journal.records[i], "generator": self.generator}
            for i in chosen
            if i in journal.records
        ]
        write_json(path, samples)
        return samples
