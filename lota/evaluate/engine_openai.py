"""A server that speaks OpenAI's protocol, such as `vllm serve`, as an engine."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from lota.evaluate.decoding import Decoding
from lota.evaluate.engine_outside import OutsideModel, scored
from lota.evaluate.loglik import Request

if TYPE_CHECKING:
    from openai import OpenAIError
    from openai.types import Completion, CompletionChoice, Model

RETRIES = 6  # of a request, after half a second, one, two, four and then eight
CONNECT = 10.0  # seconds
STOPS = 4  # stop texts that OpenAI's own protocol allows
KEEP_DONE = "what is done is kept: start the server and give the same command again"
T = TypeVar("T")
logger = logging.getLogger(__name__)


def server_address(base_url: str) -> str:
    """The address with the path of the protocol's first version. Raises ValueError for no http address."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--base_url {base_url}: give an address such as http://localhost:8000")
    return base_url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


class OpenAIEngine:
    """One model of a server; use it in a `with` block.

    Prompts are sent as token ids where the server takes them, and as text elsewhere. Answers are read from
    token ids where it returns them (vLLM does), so that they are decoded as this process decodes its own.
    Requests are tried again after errors of the connection and the server, and `concurrency` are in flight.
    Raises ValueError if the server cannot be reached or does not serve the model.
    """

    def __init__(
        self,
        model: OutsideModel,
        base_url: str,
        *,
        served_model: str | None = None,
        context: int | None = None,
        concurrency: int,
        timeout: float,
    ) -> None:
        """served_model: the server's name of the model, if it is another. context: if the server has none."""
        import openai  # slow to import, and not everybody has it

        self.model, self.address, self.batch_size = model, server_address(base_url), concurrency
        # requests run in a loop of its own thread, where they can be given up; a notebook has a loop already
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = openai.AsyncOpenAI(
            base_url=self.address,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # a server of one's own wants none
            timeout=openai.Timeout(timeout, connect=CONNECT),
            max_retries=RETRIES,
        )
        self._errors = openai.OpenAIError
        self._refusals = (openai.BadRequestError, openai.UnprocessableEntityError)
        try:
            card = self._find(served_model)
            self.served = card.id
            self.context = getattr(card, "max_model_len", None) or context
            # a request generates at least one token, after all that it reads
            self.readable = None if self.context is None else self.context - 2
            self._sends_ids, self._knows_more, self._says = self._try_forms()
        except BaseException:
            self.close()
            raise
        self._echoes: bool | None = None  # how log-probabilities are asked for; None: not yet known

    def __enter__(self) -> OpenAIEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is in flight, and leave the server."""
        self._start(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def key(self) -> dict[str, Any]:
        found = {"engine": "openai", "served": self.served, **self.model.key, "context": self.context}
        found |= {} if self._sends_ids else {"prompts": "text"}
        return found if self._knows_more else {**found, "fields": "openai"}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def check(self, decoding: Decoding | None) -> None:
        if decoding is None:
            self._echoes = self._find_logprobs()
        elif decoding.top_k and not self._knows_more:
            raise ValueError(
                f"--top_k {decoding.top_k}: the server at {self.address} does not know it; give --top_k 0"
            )

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        indices: Sequence[int],
        sample: int = 0,
        on_done: Callable[[int, str], object],
    ) -> None:
        self.check(decoding)
        prompts, differing = self.model.prompts(prompts), 0

        def ask(i: int) -> Coroutine[Any, Any, Completion]:
            fields = self.model.fields(len(prompts[i]), self.context, decoding, indices[i], sample)
            return self._asked(self._create(prompts[i], decoding, fields))

        def done(i: int, answer: Completion) -> None:
            nonlocal differing
            differing += answer.usage is not None and answer.usage.prompt_tokens != len(prompts[i])
            on_done(i, self._text(answer.choices[0], decoding.stop))

        self._in_flight(len(prompts), ask, done)
        if differing:
            logger.warning(
                "the server reads %d of %d prompts as other tokens than the tokenizer of %s",
                differing, len(prompts), self.model.name,
            )  # fmt: skip

    def logliks(self, requests: Sequence[Request], *, on_done: Callable[[int, float], object]) -> None:
        if self._echoes is None:
            self.check(None)
        echoes, texts = bool(self._echoes), [[*context, *after] for context, after in requests]

        def done(i: int, logps: list[float | None]) -> None:
            on_done(i, scored(logps, len(requests[i][0]), len(texts[i])))

        self._in_flight(len(texts), lambda i: self._logps(texts[i], echoes), done)

    async def _end(self) -> None:
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._client.close()

    # Requests

    def _find(self, served_model: str | None) -> Model:
        """What the server says of the model. Raises ValueError if it serves another."""
        try:
            cards = self._start(self._cards()).result()
        except self._errors as error:
            raise self._failure(error, "start it, for example with `vllm serve`") from error
        except (AttributeError, TypeError) as error:  # what the client makes of a web page
            raise ValueError(
                f"{self.address} does not speak OpenAI's protocol; is --base_url right?"
            ) from error
        asked = served_model or self.model.name
        for card in cards:
            root = getattr(card, "root", None) or card.id
            if asked in (card.id, root) or (served_model is None and self._is_folder(root)):
                if self.model.folder and Path(root).is_dir() and not self._is_folder(root):
                    raise ValueError(
                        f"the server at {self.address} has {asked} from {root}, not from {self.model.name}: "
                        "name that folder as the model"
                    )
                return card
        raise ValueError(
            f"the server at {self.address} serves {', '.join(card.id for card in cards) or 'nothing'}, not "
            f"{asked}: start it with that model, or give its name there with --served_model"
        )

    async def _cards(self) -> list[Model]:
        return [card async for card in self._client.with_options(max_retries=2).models.list()]

    def _is_folder(self, root: str) -> bool:
        return self.model.folder is not None and Path(root).resolve() == self.model.folder

    def _try_forms(self) -> tuple[bool, bool, str]:
        """Whether it takes token ids, whether it takes vLLM's fields, and the model's name in its answers."""
        ids = self.model.tokenizer("a b").input_ids
        decoding, refusal = Decoding(1), None
        for sends_ids, knows_more in itertools.product((True, False), repeat=2):
            self._sends_ids, self._knows_more, self._says = sends_ids, knows_more, ""
            try:
                fields = self.model.fields(len(ids), None, decoding, 0, 0)
                answer = self._start(self._create(ids, decoding, fields)).result()
            except self._refusals as error:
                refusal = refusal or error
                continue
            except self._errors as error:
                raise self._failure(error, "look at its output, and start it again") from error
            return sends_ids, knows_more, answer.model
        assert refusal is not None
        raise self._failure(refusal, "look at its output") from refusal

    async def _create(
        self, ids: Sequence[int], decoding: Decoding, fields: Mapping[str, Any], **more: Any
    ) -> Completion:
        """One completion of a prompt. Errors: the client's own."""
        tokenizer, extra = self.model.tokenizer, dict(more)
        if self._knows_more:
            extra |= {**self.model.more_fields(decoding), "return_token_ids": True}
        else:
            fields = {**fields, "stop": fields["stop"][:STOPS]}  # the others are found in the text
        prompt: Any = list(ids)
        if not self._sends_ids:
            own = ids[1:] if ids and ids[0] == tokenizer.bos_token_id else ids  # the server adds its own
            prompt = tokenizer.decode(list(own), clean_up_tokenization_spaces=False)
        given = {name: value for name, value in fields.items() if value != []}
        answer = await self._client.completions.create(
            model=self.served, prompt=prompt, extra_body=extra, **given
        )
        if len(getattr(answer, "choices", None) or []) != 1:
            raise ValueError(f"the server at {self.address} gave no completion, but: {str(answer)[:200]}")
        if self._says and answer.model != self._says:
            raise ValueError(f"the server now answers as {answer.model}, and not as {self._says}")
        return answer

    def _text(self, choice: CompletionChoice, stop: Sequence[str]) -> str:
        tokens: list[int] | None = getattr(choice, "token_ids", None)
        if tokens is not None:
            return self.model.text(tokens, stop)
        return choice.text[: min((at for w in stop if (at := choice.text.find(w)) >= 0), default=None)]

    async def _logps(self, ids: Sequence[int], echoes: bool) -> list[float | None]:
        """Of every token of a prompt after those before it, in nats; the first has none."""
        more = {"echo": True, "logprobs": 1} if echoes else {"prompt_logprobs": 1}
        decoding = Decoding(1)
        fields = self.model.fields(len(ids), None, decoding, 0, 0)
        (choice,) = (await self._asked(self._create(ids, decoding, fields, **more))).choices
        if echoes:
            return list(choice.logprobs.token_logprobs or []) if choice.logprobs else []
        found = getattr(choice, "prompt_logprobs", None) or []
        return [
            None if one is None else one.get(str(token), {}).get("logprob")
            for one, token in zip(found, ids, strict=False)
        ]

    def _find_logprobs(self) -> bool:
        """Whether log-probabilities of prompts come by echo; else by vLLM's own field.

        Raises ValueError if they do not come at all.
        """
        ids = self.model.tokenizer("a b").input_ids * 2
        for echoes in (True, False) if self._sends_ids else ():
            try:
                scored(self._start(self._logps(ids, echoes)).result(), 1, len(ids))
            except ValueError as error:
                logger.debug("log-probabilities of prompts (echo: %s): %s", echoes, error)
            else:
                return echoes
        raise ValueError(
            f"the server at {self.address} does not return the log-probabilities of a prompt's tokens "
            "(`echo` with `logprobs`, or `prompt_logprobs`): score by completions (--scoring generate), or "
            "serve the model with vLLM"
        )

    async def _asked(self, asking: Coroutine[Any, Any, Completion]) -> Completion:
        try:
            return await asking
        except self._errors as error:
            raise self._failure(error, KEEP_DONE) from error

    def _failure(self, error: OpenAIError, remedy: str) -> Exception:
        """ValueError if the server refuses what was asked; else ConnectionError, with the remedy."""
        status = getattr(error, "status_code", None)
        said = f"the server at {self.address}: {' '.join(str(error).split())[:300].rstrip('.')}; "
        if status in (401, 403):
            return ValueError(f"{said}give its key in OPENAI_API_KEY")
        if status is not None and status < 500 and status not in (408, 409, 429):
            return ValueError(f"{said}look at its output")
        return ConnectionError(said + remedy)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _in_flight(
        self,
        n: int,
        ask: Callable[[int], Coroutine[Any, Any, T]],
        on_done: Callable[[int, T], object],
    ) -> None:
        """Call on_done(i, what ask(i) comes to) for i below n, with at most `batch_size` of them under way.

        After an error nothing more is asked; what is in flight is waited for, and kept.
        """
        numbers, waiting = iter(range(n)), dict[Future[T], int]()
        problem: BaseException | None = None
        while True:
            for i in itertools.islice(numbers, 0 if problem else self.batch_size - len(waiting)):
                waiting[self._start(ask(i))] = i
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                i, error = waiting.pop(future), future.exception()
                if error is None:
                    on_done(i, future.result())
                problem = problem or error
        if problem is not None:
            raise problem
