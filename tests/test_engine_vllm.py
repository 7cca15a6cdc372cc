"""vLLM as the engine, with a stand-in for its `LLM` over a tiny model: equal results, and deltas attached."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval_model_all
import generate_samples
from lota.delta import Delta, extract
from lota.share.delta.attach import attach
from tests.chars import char_tokenizer, save_pair
from tests.delta_models import change
from tests.evaluations import json_lines, write_rows
from tests.openai_server import Server
from tests.test_eval_model_all import choice_row


@dataclass
class SamplingParams:
    """Those of vLLM's that are used; any other name is an error."""

    max_tokens: int
    temperature: float
    seed: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: int | None = None


class LLM:
    made: list[LLM] = []  # noqa: RUF012

    def __init__(self, model, *, tokenizer, dtype, seed, worker_extension_cls=None):
        self.extension, self.sizes = worker_extension_cls, []
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.server = Server(self.model, char_tokenizer(), name=model)
        config = SimpleNamespace(max_model_len=256, dtype=torch.float32)
        self.llm_engine = SimpleNamespace(model_config=config)
        self.made.append(self)

    def collective_rpc(self, name, args):
        assert (self.extension, name) == ("lota.share.vllm.DeltaWorker", "attach_delta")
        attach(self.model, Delta.open(*args))

    def generate(self, prompts, params, use_tqdm):
        assert not use_tqdm
        self.sizes.append(len(prompts))
        return [
            self.output(one["prompt_token_ids"], asked) for one, asked in zip(prompts, params, strict=True)
        ]

    def output(self, ids, params):
        (choice,) = self.server.completion({**vars(params), "prompt": ids, "return_token_ids": True})[
            "choices"
        ]
        logprobs = [
            found and {int(token): SimpleNamespace(**value) for token, value in found.items()}
            for found in choice.get("prompt_logprobs", [])
        ]
        output = SimpleNamespace(token_ids=choice["token_ids"])
        return SimpleNamespace(outputs=[output], prompt_logprobs=logprobs)


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "made", [])
    return LLM


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a delta of it, data."""
    place = tmp_path_factory.mktemp("place")
    save_pair(place / "base")
    tuned = change(AutoModelForCausalLM.from_pretrained(place / "base"), density=0.5)
    tuned.save_pretrained(place / "tuned")
    extract(place / "base", place / "tuned", place / "d.safetensors")
    write_rows(place, "gsm8k", "test", [{"question": "x" * i, "answer": f"#### {i}"} for i in range(1, 8)])
    write_rows(place, "ARC-Easy", "test", [choice_row(i) for i in range(3)])
    (place / "prompts.json").write_text(json.dumps(["Hi", "Name a colour, please.", "Why?"]))
    return place


def run(place, out, datasets, *more):
    line = ["--model", place / "base", "--data_dir", place, "--datasets", datasets, "--out", out, *more]
    assert eval_model_all.main([*map(str, line), "--max_new_tokens", "9"]) == 0
    return out / "metrics"


@pytest.mark.parametrize("delta", [False, True])
def test_results_equal_those_of_transformers(place, tmp_path, vllm, delta):
    on_top = ["--delta", place / "d.safetensors"] if delta else []
    local = run(place, tmp_path / "local", "gsm8k", "--sample", *on_top)
    inside = run(
        place, tmp_path / "vllm", "gsm8k", "--sample", "--engine", "vllm", "--concurrency", 3, *on_top
    )
    assert vllm.made[0].sizes == [3, 3, 1]
    assert (inside / "gsm8k_predictions.jsonl").read_bytes() == (
        local / "gsm8k_predictions.jsonl"
    ).read_bytes()
    local, inside = (
        run(place, tmp_path / out, "ARC-Easy", "--scoring", "loglik", "--engine", engine, *on_top)
        for out, engine in (("local", "transformers"), ("vllm", "vllm"))
    )
    ours, theirs = (json_lines(at / "ARC-Easy_loglik_predictions.jsonl") for at in (inside, local))
    assert [one["logliks"] for one in ours] == [pytest.approx(one["logliks"], abs=1e-3) for one in theirs]
    settings = json.loads((inside / "ARC-Easy_loglik.json").read_text())["settings"]
    assert settings["engine"] == "vllm"
    assert settings.get("deltas") == ([Delta.open(place / "d.safetensors").checksum] if delta else None)


def test_samples(place, tmp_path, vllm):
    line = f"--prompt_set {place}/prompts.json --model_name N --model_path {place}/base --temperatures 0.7"
    line += " --max_length 90 --max_prompt_length 60"
    for engine in ("transformers", "vllm"):
        out = str(tmp_path / engine)
        assert generate_samples.main([*line.split(), "--engine", engine, "--out", out]) == 0
    name = "prompts_temp0.7.json"
    assert (tmp_path / "vllm" / name).read_bytes() == (tmp_path / "transformers" / name).read_bytes()
