"""A small server of OpenAI's protocol over a tiny model, with vLLM's fields, whose faults a test chooses."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from lota.evaluate.decoding import Decoding
from lota.evaluate.generation import _complete, completion_text

VLLM_FIELDS = {
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "return_token_ids",
    "prompt_logprobs",
}


@dataclass
class Server:
    """What it serves and how; `asked` holds the body of every completion asked for, in order."""

    model: Any
    tokenizer: Any
    name: str
    root: str | None = None
    max_model_len: int | None = 256
    takes_ids: bool = True
    knows_vllm: bool = True  # else it refuses vLLM's fields, as OpenAI's own server does
    echoes: bool = True
    prompt_logprobs: bool = True
    faults: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # status, headers of next answers
    dies_after: int | None = None  # completions; then connections end without an answer
    delay: float = 0.0  # seconds, of the next completion
    key: str | None = None
    page: bool = False  # it is a web server
    asked: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    unanswered: int = 0  # requests since it died

    def __post_init__(self) -> None:
        self.lock, self.turn, self.at_once = threading.Lock(), threading.Lock(), 0

    @contextlib.contextmanager
    def running(self):
        handler = type("BoundHandler", (_Handler,), {"state": self})
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            http.block_on_close = False
            http.server_close()
            thread.join(10)

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, most = body["prompt"], body["max_tokens"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids
        if self.max_model_len is not None:
            assert len(ids) + most <= self.max_model_len
        decoding = Decoding(
            most, body["temperature"], body.get("top_p", 1.0), body.get("top_k", 0),
            stop=tuple(body.get("stop", ())),
        )  # fmt: skip
        draws = torch.empty(1, 0, dtype=torch.float64)
        if decoding.temperature:
            generator = torch.Generator().manual_seed(body["seed"])
            draws = torch.rand(1, most, generator=generator, dtype=torch.float64)
        with self.turn, torch.inference_mode():
            (tokens,) = _complete(self.model, self.tokenizer, [ids], draws, decoding)
            logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        text = completion_text(self.tokenizer, tokens, decoding.stop)
        whole = self.tokenizer.decode(tokens)
        if len(tokens) < most and not any(word in whole for word in decoding.stop):
            tokens = [*tokens, self.tokenizer.eos_token_id]  # vLLM returns the token that has ended it
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "length"}
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
        own = [None, *logps[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()]
        if body.get("echo") and self.echoes:
            choice["logprobs"] = {"token_logprobs": [*own, -0.5], "tokens": [str(i) for i in [*ids, 0]]}
        if body.get("prompt_logprobs") and self.prompt_logprobs:
            choice["prompt_logprobs"] = [
                None if value is None else {str(token): {"logprob": value, "rank": 1}}
                for token, value in zip(ids, own, strict=True)
            ]
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens), "total_tokens": 0}
        return {
            "id": "c", "object": "text_completion", "created": 0, "model": self.name, "choices": [choice],
            "usage": usage,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has given up
            self.wfile.write(data)

    def do_GET(self):
        if self.state.page:
            return self.answer(200, "<html>", {"Content-Type": "text/html"})
        if self.path != "/v1/models":
            return self.answer(404, {"error": {"message": "no such path"}})
        if self.state.key and self.headers["Authorization"] != f"Bearer {self.state.key}":
            return self.answer(401, {"error": {"message": "wrong key"}})
        card = {"id": self.state.name, "object": "model", "created": 0, "owned_by": "vllm"}
        card |= {"root": self.state.root, "max_model_len": self.state.max_model_len}
        return self.answer(200, {"object": "list", "data": [card]})

    def do_POST(self):
        state = self.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            dead = state.dies_after is not None and len(state.asked) >= state.dies_after
            state.unanswered += dead
            if not dead:
                state.asked.append(body)
            fault = state.faults.pop(0) if state.faults and not dead else None
            delay, state.delay = state.delay, 0.0
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        if not dead and not fault:
            time.sleep(delay)
        answer = fault and (fault[0], {"error": {"message": "a fault"}}, fault[1])
        answer = answer or (None if dead else self.answer_to(body))
        with state.lock:  # before the client can ask for more
            state.at_once -= 1
        if answer:
            self.answer(*answer)
        else:
            self.close_connection = True

    def answer_to(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.state.takes_ids and isinstance(body["prompt"], list):
            return 400, {"error": {"message": "prompt: a text is wanted"}}
        if not self.state.knows_vllm and VLLM_FIELDS & body.keys():
            return 400, {"error": {"message": "unrecognized arguments"}}
        return 200, self.state.completion(body)
