"""vLLM in this process, where it is installed; deltas are attached to the model that it has loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lota.evaluate.batching import longest_first
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine_outside import OutsideModel, scored
from lota.evaluate.loglik import Request, request_order
from lota.share.delta.reader import Delta

WORKER = "lota.share.vllm.DeltaWorker"


class VllmEngine:
    """A model in vLLM (0.33): `concurrency` sequences are handed over at a time, and vLLM batches them."""

    def __init__(
        self,
        model: OutsideModel,
        *,
        tokenizer: str | None = None,
        dtype: str | None = None,
        deltas: Sequence[Delta] = (),
        concurrency: int,
    ) -> None:
        """tokenizer: where it is, if not with the model. dtype: None for the model's own."""
        import vllm  # slow to import, and in an environment of its own

        self.model, self.batch_size, self._vllm = model, concurrency, vllm
        extension = {"worker_extension_cls": WORKER} if deltas else {}
        self._llm = vllm.LLM(model.name, tokenizer=tokenizer, dtype=dtype or "auto", seed=0, **extension)
        for delta in deltas:
            self._llm.collective_rpc("attach_delta", args=(str(delta.path),))
        config = self._llm.llm_engine.model_config
        self.context: int | None = config.max_model_len
        # a request generates at least one token, after all that it reads
        self.readable = None if self.context is None else self.context - 2
        self.key = {"engine": "vllm", **model.key, "context": self.context}
        if deltas:
            self.key["deltas"] = [delta.checksum for delta in deltas]
        self.settings = {"dtype": str(config.dtype).removeprefix("torch.")}

    def check(self, decoding: Decoding | None) -> None:
        """It can."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        indices: Sequence[int],
        sample: int = 0,
        on_done: Callable[[int, str], object],
    ) -> None:
        prompts = self.model.prompts(prompts)

        def fields(i: int) -> dict[str, Any]:
            asked = self.model.fields(len(prompts[i]), self.context, decoding, indices[i], sample)
            return {**asked, **self.model.more_fields(decoding)}

        for i, output in self._generate(longest_first(prompts), prompts, fields):
            on_done(i, self.model.text(output.outputs[0].token_ids, decoding.stop))

    def logliks(self, requests: Sequence[Request], *, on_done: Callable[[int, float], object]) -> None:
        texts = [[*context, *after] for context, after in requests]
        asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        for i, output in self._generate(request_order(requests), texts, lambda i: asked):
            logps = [
                None if found is None else found[token].logprob
                for found, token in zip(output.prompt_logprobs, texts[i], strict=True)
            ]
            on_done(i, scored(logps, len(requests[i][0]), len(texts[i])))

    def _generate(
        self,
        order: Sequence[int],
        sequences: Sequence[Sequence[int]],
        fields: Callable[[int], dict[str, Any]],
    ) -> Any:
        """Yields (number, vLLM's output) of the sequences in their order, `batch_size` at a time."""
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            prompts = [{"prompt_token_ids": list(sequences[i])} for i in rows]
            params = [self._vllm.SamplingParams(**fields(i)) for i in rows]
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            yield from zip(rows, outputs, strict=True)
