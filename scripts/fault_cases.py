"""The commands that scripts/faults.py disturbs, on the smallest input that takes each through all steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from scripts.forks import ROOT

TASKS = {"first": 7, "second": 9}  # name -> what its rows are made with
TASK = '''
from tasks.base import Preference, Task


class Letters(Task):
    """Letters in reverse order are preferred."""

    name, max_new_tokens, has_preferences = "{name}", 3, {preferences}

    def load(self, split, data_dir):
        start, stop = {{"train": (0, 12), "test": (12, 15)}}[split]
        return [{{"letters": " ".join(chr(97 + ({step} * i + 3 * k) % 26) for k in range(2 + i % 3))}} for i in range(start, stop)]

    def prompt(self, row):
        return row["letters"] + " {name} ->"

    def target(self, row):
        return " " + row["letters"][::-1]

    def gold(self, row):
        return row["letters"][::-1]

    def extract(self, completion):
        return completion.strip() or None

    def preference(self, row):
        return Preference(self.prompt(row), self.target(row), " " + row["letters"] + " a b")


TASK = Letters()
'''  # noqa: E501
TRAIN = (
    "train_single_gpu.py", "exp_name=run", "model.name_or_path=base", "batch_size=4", "eval_batch_size=4",
    "warmup_steps=1", "lr=1e-2", "minimum_log_interval_secs=0", "do_first_eval=false", "eval_every=12",
)  # fmt: skip
FIRST = ("loss=sft", "datasets=[first]")
CONVERT = ("convert_policy_to_hf_resize.py", "--model_path", "base", "--policy_path")
TWO_EPOCHS = (*FIRST, "n_epochs=2", "save_every=epoch_1")


@dataclass(frozen=True)
class Case:
    """A command and what it starts from."""

    name: str
    argv: tuple[str, ...]  # a script of the checkout, or -m and a module, and its arguments
    earlier: tuple[tuple[str, ...], ...] = ()  # commands that make what it needs
    interrupted: tuple[tuple[str, ...], ...] = ()  # the same, which may fail

    def write(self, folder: Path) -> None:
        """The files that every case starts from: a base and a tuned model, a mask, tasks, prompts."""
        write_models(folder)
        (folder / "tasks").mkdir()
        for name, step in TASKS.items():
            text = TASK.format(name=name, step=step, preferences=False)
            (folder / "tasks" / f"{name}.py").write_text(text)
        (folder / "tasks" / "liked.py").write_text(TASK.format(name="liked", step=5, preferences=True))
        prompts = [{"instruction": text} for text in ("Say a.", "Say b.", "Say c.")]
        (folder / "prompts.json").write_text(json.dumps(prompts))


def write_models(folder: Path) -> None:
    """base/, tuned/ and 0.5_mask.pt: a Llama of one small layer with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lota.masks import Mask
    from lota.models.scope import find_scope

    source = ROOT / "assets" / "tiny-llama"
    content = json.loads((source / "config.json").read_text())
    content |= {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "head_dim": 4}
    content |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**content))
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(source / file, folder / name / file)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape))
    kept = {name: torch.rand(tensor.shape) < 0.5 for name, tensor in find_scope(model).items()}
    Mask.from_dense(kept).save(folder / "0.5_mask.pt")


def _train(*overrides: str) -> tuple[str, ...]:
    return (*TRAIN, *overrides)


_RUN = _train(*FIRST, "mask_path=0.5_mask.pt")
_POLICY = "cache/run/epoch-1"
_DELTA = ("-m", "lota.delta", "extract", "--base", "base", "--tuned", "tuned", "--out", "delta.safetensors")
_SECOND = (*_DELTA[:-3], f"{_POLICY}/policy.pt", "--out", "second.safetensors")
_SEQUENCE = (
    "lotto.py", "exp_name=sequence", "tasks=[first,second]", "sparsity=0.5", *TRAIN[2:-1],
    "n_eval_examples=2", "save_every=epoch_1",
)  # fmt: skip
CASES = (
    Case("train", _train(*TWO_EPOCHS, "mask_path=0.5_mask.pt", "save_delta=true", "sample_during_eval=true",
           "do_first_eval=true")),
    Case("train_dense", _train(*TWO_EPOCHS, "trainer=FSDPTrainer", "model.fsdp_policy_mp=bfloat16")),
    Case(
        "train_dpo",
        _train("loss=dpo", "datasets=[liked]", "mask_path=0.5_mask.pt", "model.reference=precomputed"),
    ),
    Case("train_lora", _train(*TWO_EPOCHS, "adapter=lora", "lora_rank=2")),
    Case("train_snip", _train(*FIRST, "snip=true", "snip_sparsity=0.5", "snip_batches=1")),
    Case(
        "resume",
        _train(*TWO_EPOCHS, "mask_path=0.5_mask.pt"),
        interrupted=(("-m", "scripts.fault_cases", "stop", *_train(*TWO_EPOCHS, "mask_path=0.5_mask.pt")),),
    ),
    Case("overwrite", (*_RUN, "overwrite=true", "seed=1"), earlier=(_RUN,)),
    Case(
        "extract",
        ("extract_masks.py", "--base", "base", "--tuned", "tuned", "--sparsities", "0.5", "0.9", "--name",
         "m"),
    ),
    Case("masks", ("-m", "lota.masks", "flip", "0.5_mask.pt", "--out", "flipped.pt")),
    Case("convert", (*CONVERT, _POLICY, "--save_path", "converted"), earlier=(_RUN,)),
    Case("convert_sharded", (*CONVERT, _POLICY, "--save_path", _POLICY, "--max_shard_size", "4KB"), (_RUN,)),
    Case(
        "convert_over",
        (*CONVERT, _POLICY, "--save_path", _POLICY),
        (_RUN, (*CONVERT, _POLICY, "--save_path", _POLICY, "--max_shard_size", "4KB")),
    ),
    Case("delta_extract", _DELTA),
    Case("delta_over", (*_SECOND[:-1], "delta.safetensors"), earlier=(_RUN, _DELTA)),
    Case(
        "delta_apply",
        ("-m", "lota.delta", "apply", "--model", "base", "--delta", "delta.safetensors", "--out", "applied"),
        earlier=(_DELTA,),
    ),
    Case(
        "delta_revert",
        ("-m", "lota.delta", "revert", "--model", "tuned", "--delta", "delta.safetensors", "--out",
         "reverted"),
        earlier=(_DELTA,),
    ),
    Case(
        "merge",
        ("merge_models.py", "--base", "base", "--deltas", "tuned", f"{_POLICY}", "--method", "ties",
         "--density", "0.5", "--out", "merged"),
        earlier=(_RUN,),
    ),
    Case(
        "eval",
        ("eval_model_all.py", "--model", "base", "--datasets", "first,second", "--sample", "--num_runs", "2",
         "--bs", "2"),
    ),
    Case(
        "samples",
        ("generate_samples.py", "--model_path", "base", "--prompt_set", "prompts.json", "--model_name", "me",
         "--max_length", "32", "--max_prompt_length", "16", "--chunk_size", "2", "--temperatures", "0,0.7",
         "--out", "samples"),
    ),
    Case("lotto", _SEQUENCE),
)  # fmt: skip


def stop_after_a_checkpoint(argv: list[str]) -> None:
    """Run a training command, and kill it when it has made a step beyond its first checkpoint."""
    import os
    import runpy
    import signal
    import sys

    from lota.data.batches import ScheduledBatch
    from lota.train.trainer import Trainer

    log_step = Trainer.log_step

    def stopping(trainer: Trainer, batch: ScheduledBatch, due: bool) -> None:
        log_step(trainer, batch, due)
        if trainer.saved is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.log_step = stopping  # type: ignore[assignment]
    sys.argv = [str(ROOT / argv[0]), *argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    import sys

    stop_after_a_checkpoint(sys.argv[2:])
