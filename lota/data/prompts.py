"""How a row becomes what the model reads, in training and evaluation alike.

A prompt is the task's own text, or the tokenizer's chat template around the task's messages; solved examples
may stand in front of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from lota.config import CHAT_TEMPLATES
from lota.data.batches import Example, Prompt
from lota.data.task import Message, Row, Task
from lota.storage import content_key

NO_CHAT_TEMPLATE = "never"  # prompts are the task's own text, with no chat template around it


@dataclass(frozen=True)
class Limits:
    """How a training run cut its examples."""

    max_length: int  # tokens of prompt and response
    max_prompt_length: int  # tokens of the prompt that stay if there are more

    def of(self, n_tokens: int) -> int | None:
        """The most tokens of a prompt that has so many; None: as many as it has.

        Training cut a prompt where it and its response did not fit into max_length together. The response is
        not known here, and must not be; so a prompt is cut where none would have fitted after it.
        """
        return self.max_prompt_length if n_tokens >= self.max_length else None


@dataclass(frozen=True)
class Fitted:
    """A prompt within a bound."""

    prompt: Prompt
    ids: list[int]
    lost: int  # examples in front of it that it lost for that
    cut: bool
    limit: int | None = None  # the most tokens that the limits of training leave it; None: all of them

    @property
    def shortened(self) -> bool:
        return self.cut or self.lost > 0


@dataclass(frozen=True)
class FewShot:
    """Solved rows in front of each prompt, drawn for every prompt anew."""

    n: int  # of them, per prompt
    seed: int
    rows: Sequence[Row]  # of the task's training split

    def __post_init__(self) -> None:
        if not 1 <= self.n < len(self.rows):
            raise ValueError(f"num_fewshot={self.n}: there are {len(self.rows)} training rows to draw from")

    @property
    def key(self) -> dict[str, Any]:
        return {"n": self.n, "seed": self.seed, "data": content_key(list(self.rows))}

    def examples(self, task: Task, row: Row, index: int) -> list[Row]:
        """The examples of the prompt with that number: never the row itself."""
        draw = random.Random(f"{self.seed}-{index}").sample(self.rows, self.n + 1)
        own = task.prompt(row)
        return [example for example in draw if task.prompt(example) != own][: self.n]


class Prompter:
    """Prompts with or without the tokenizer's chat template.

    choice: never; always (ValueError for a tokenizer without a template); auto: if the tokenizer has one.
    limits: of the run that trained the model, for `fit`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        choice: str = NO_CHAT_TEMPLATE,
        limits: Limits | None = None,
    ) -> None:
        if choice not in CHAT_TEMPLATES:
            raise ValueError(f"chat_template={choice}: choose one of {', '.join(CHAT_TEMPLATES)}")
        template = tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if choice == "always" and template is None:
            raise ValueError("chat_template=always, but the tokenizer has none: choose auto or never")
        self.tokenizer, self.limits = tokenizer, limits
        self.template = None if choice == NO_CHAT_TEMPLATE else template

    @property
    def key(self) -> str:
        """Equal for equal templates; "never" without one."""
        return NO_CHAT_TEMPLATE if self.template is None else content_key(self.template)

    def prompt(self, task: Task, row: Row, examples: Sequence[Row] = ()) -> Prompt:
        """What the model reads for a row. Errors: ValueError for messages that the template refuses."""
        if self.template is None:
            text = "".join(task.demonstration(example) for example in examples) + task.prompt(row)
            return Prompt(text, task.closing, task.chat)
        messages = [message for example in examples for message in _solved(task, example)]
        messages += task.messages(row)
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"task {task.name}: the tokenizer's chat template refuses its messages ({error}); "
                "use chat_template=never"
            ) from error
        assert isinstance(rendered, str)  # as tokenize=False asks for
        before, _, closing = rendered.rpartition(messages[-1]["content"].strip())
        return Prompt(rendered, closing if before else "", task.chat, templated=True)

    def example(self, task: Task, row: Row, preference: bool = False) -> Example:
        """A row as training reads it; with `preference` its preferred and its rejected answer."""
        prompt = self.prompt(task, row)
        if not preference:
            return Example(prompt, task.target(row))
        answers = task.preference(row)
        return Example(prompt, answers.chosen, answers.rejected)

    def fit(self, task: Task, row: Row, examples: Sequence[Row], bound: int | None) -> Fitted:
        """The prompt in at most `bound` tokens: it loses whole examples, the first ones, before it is cut.

        A prompt without examples is also cut as in training; no run trains on prompts with examples.
        """
        for start in range(len(examples) + 1):
            prompt = self.prompt(task, row, examples[start:])
            ids = prompt.ids(self.tokenizer)
            limit = self.limits.of(len(ids)) if self.limits and not examples else None
            most = min((n for n in (bound, limit) if n is not None), default=len(ids))
            if len(ids) <= most:
                return Fitted(prompt, ids, start, False)
        return Fitted(prompt, prompt.ids(self.tokenizer, most), len(examples), True, limit)


def _solved(task: Task, row: Row) -> list[Message]:
    return [*task.messages(row), {"role": "assistant", "content": task.target(row)}]
