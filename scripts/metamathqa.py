"""Measure a run as PEFT's comparison of methods on MetaMathQA does, and write its JSON fields.

    python -m scripts.metamathqa RUNS/entry/step-20000 --name entry --out results

Test accuracy: greedy completions of all gsm8k test questions, at most 300 tokens. Forgetting: how much the
mean token loss on Wikipedia grows over the base's (nats per token; 100 articles of FineWiki, of each the
first 768 tokens, or as many as the model takes). Where this differs from PEFT's script: the training loss
counts responses alone, the order of rows is drawn by the seed, and no validation accuracy is measured on the
way. What is not measured here is null.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import Config, default_cache, expanded
from lota.data.batches import seeded_sample
from lota.data.prompts import Prompter
from lota.evaluate.batching import context_length, first_token
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import TransformersEngine
from lota.evaluate.evaluator import Evaluator
from lota.evaluate.loglik import logliks
from lota.evaluate.scorers import TaskRequest
from lota.masks import Mask
from lota.models.hashing import remembered_hash
from lota.models.loading import dtype_of, load_model, load_tokenizer
from lota.settings import stored_settings
from lota.storage import content_key, whole_lines, write_json
from lota.system import package_versions
from tasks import get_task

WIKI_TOKENS = 768  # of each article, the token for the beginning included
EVERY = 250  # steps of an entry of the results
CONTEXT, NEW_TOKENS = 800, 300  # tokens of question and answer, and of the answer


@dataclass(frozen=True)
class Run:
    """A finished run, by its checkpoint."""

    checkpoint: Path

    @property
    def config(self) -> dict[str, Any]:
        return stored_settings(self.checkpoint.parent / "config.yaml", Config())

    @property
    def base(self) -> str:
        return str(self.config["model"]["name_or_path"])

    def load(self, archive: Path | None, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base or, from its policy.pt, the tuned model, in the run's dtype."""
        tokenizer = load_tokenizer(self.base)
        dtype = dtype_of(self.config["model"]["policy_dtype"])
        path = None if archive is None else str(archive)
        model = load_model(self.base, archive=path, dtype=dtype, device=device, tokenizer=tokenizer)
        return model.eval(), tokenizer

    def log(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of training."""
        path = self.checkpoint.parent / "metrics.jsonl"
        lines = (json.loads(line) for _, line in whole_lines(path))
        return [line for line in lines if "examples_per_second" in line]


def wiki_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Mean loss over all tokens of all texts, in nats."""
    first = first_token(tokenizer, "perplexity")
    coded = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    reach = min(WIKI_TOKENS, context_length(model.config) or WIKI_TOKENS) - 1
    requests = [([first], ids[:reach]) for ids in coded if ids]
    return -sum(logliks(model, requests, batch_size=4)) / sum(len(after) for _, after in requests)


def base_loss(run: Run, texts: list[str], device: str, file: Path) -> float:
    """That of the base; measured once for all runs of a folder."""
    key = content_key([remembered_hash(run.base), run.config["model"]["policy_dtype"], texts])
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if key not in known:
        known[key] = wiki_loss(*run.load(None, device), texts)
        write_json(file, known)
    return float(known[key])


def test_accuracy(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> float:
    """Share of test questions that are answered rightly; predictions go to <checkpoint>/metrics."""
    task = get_task("metamathqa")
    rows = task.load("test", args.data_dir)
    chosen = seeded_sample(range(len(rows)), args.n_examples or len(rows), 0)
    request = TaskRequest(task, rows, Decoding(NEW_TOKENS), chosen)
    engine = TransformersEngine(model, tokenizer, batch_size=args.bs)
    evaluator = Evaluator(engine, Prompter(tokenizer), model_name=str(run.checkpoint), out_dir=run.checkpoint)
    with tqdm(total=len(chosen), desc="gsm8k", unit="example") as bar:
        return evaluator.evaluate(request, on_done=lambda prediction: bar.update()).score


def progress(log: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is known of the run after every EVERY steps; time and tokens of training alone."""
    seconds = tokens = 0.0
    before = {"examples": 0}
    for _, group in itertools.groupby(log, key=lambda line: (line["step"] - 1) // EVERY):
        time_ = tokens_ = nats = 0.0
        start = before["examples"]
        for line in group:
            new = line["examples"] - before["examples"]
            taken = new / line["examples_per_second"]
            time_, tokens_ = time_ + taken, tokens_ + taken * line["tokens_per_second"]
            nats += new * line["nats_per_token/train"]
            before = line
        seconds, tokens = seconds + time_, tokens + tokens_
        yield {
            "step": before["step"],
            "train loss": nats / (before["examples"] - start),
            "train samples": before["examples"],
            "train time": time_,
            "tokens / sec": tokens_ / time_,
            "elapsed train time": seconds,
            "train total tokens": round(tokens),
        }


def train_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's settings under the names of PEFT's comparison."""
    return {
        "model_id": config["model"]["name_or_path"],
        "dtype": config["model"]["policy_dtype"],
        "max_seq_length": config["max_length"],
        "batch_size": config["batch_size"],
        "batch_size_eval": None,
        "max_steps": None if config["n_examples"] is None else config["n_examples"] // config["batch_size"],
        "eval_steps": None,
        "compile": config["compile"],
        "use_gc": config["activation_checkpointing"],
        "query_template": get_task("metamathqa").prompt({"query": "{query}"}),
        "seed": config["seed"],
        "grad_norm_clip": config["max_grad_norm"],
        "optimizer_type": config["optimizer"],
        "optimizer_kwargs": {key: config[key] for key in ("lr", "weight_decay")},
        "lr_scheduler": config["lr_scheduler"],
        "use_amp": False,
        "autocast_adapter_dtype": None,
        "generation_kwargs": {"max_length": CONTEXT, "max_new_tokens": NEW_TOKENS},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def results(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """All fields; measures what is to be measured."""
    start, created = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    config, log = run.config, run.log()
    texts = [row["text"] for row in get_task("finewiki").load("test", args.data_dir)]
    before = base_loss(run, texts, args.device, args.out / "base_loss.json")
    model, tokenizer = run.load(run.checkpoint / "policy.pt", args.device)
    forgetting = wiki_loss(model, tokenizer, texts) - before
    accuracy = test_accuracy(run, model, tokenizer, args)
    lines = list(progress(log))
    last = lines[-1]
    mask = Mask.load(config["mask_path"]) if config["mask_path"] else None
    delta = run.checkpoint / "delta.safetensors"
    file = delta if delta.is_file() else run.checkpoint / "policy.pt"
    hubs = {"metamath": get_task("metamathqa").hub, "gsm8k": get_task("gsm8k").hub}
    revisions = {name: {"sha": hub and hub.revision, "created_at": None} for name, hub in hubs.items()}
    method = {"peft_type": "LOTA", **mask.meta, "kept": mask.n_kept} if mask else None
    return {
        "run_info": {
            "created_at": created.replace(microsecond=0).isoformat(),
            "total_time": last["elapsed train time"] + time.perf_counter() - start,
            "experiment_name": f"lota/{args.name}",
            "peft_branch": None,
            "train_config": {**train_config(config), "batch_size_eval": args.bs},
            "peft_config": method,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": max(line["peak_memory_bytes"] for line in log),
            "accelerator_memory_reserved_99th": None,
            "train_time": last["elapsed train time"],
            "file_size": file.stat().st_size,
            "num_trainable_params": log[-1]["trained_entries"],
            "num_total_params": model.num_parameters(),
            "status": "success",
            "metrics": [
                *lines,
                {
                    "step": last["step"],
                    "test accuracy": accuracy,
                    "train loss": last["train loss"],
                    "train samples": last["train samples"],
                    "train total tokens": last["train total tokens"],
                    "forgetting": forgetting,
                },
            ],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None, "weights_hash": remembered_hash(run.base)},
            "dataset_info": revisions,
            "package_info": {f"{name}-version": version for name, version in package_versions().items()},
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
            },
            "pytorch_info": torch.__config__.show(),
        },
    }


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="last checkpoint folder of a run")
    add("--name", required=True, help="of the row, and of its file")
    add("--out", type=Path, required=True, help="folder for the JSON files")
    add("--data_dir", default=default_cache(), help="has tasks/gsm8k and tasks/finewiki; else from the hub")
    add("--n_examples", type=int, default=0, help="a sample of the test questions; 0: all (default)")
    add("--bs", type=int, default=50, help="questions per batch (50)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.data_dir = expanded(args.data_dir)
    try:
        found = results(Run(args.checkpoint), args)
    except (ValueError, OSError) as error:
        sys.exit(f"metamathqa.py: {error}")
    file = args.out / f"lota--{args.name}.json"
    write_json(file, found)
    last = found["train_info"]["metrics"][-1]
    print(f"{file}: test accuracy {last['test accuracy']:.3f}, forgetting {last['forgetting']:.3f}")


if __name__ == "__main__":
    main()
