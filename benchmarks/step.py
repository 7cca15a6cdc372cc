"""Step time and peak memory of one optimizer step: LoTA with scattered entries, rows, columns and blocks
against dense masked RMSprop, PEFT LoRA and PEFT SHiRA.

    OMP_NUM_THREADS=1 python -m benchmarks.step       # CPU, 124M-parameter Llama shape, 4 x 128 tokens
    python -m benchmarks.step --sparsity 0.99 --contestants lota peft_lora_r64
    python -m benchmarks.step --contestants lota lota_packed lota_padded        # examples of many lengths
    python -m benchmarks.step --shape 8b --batch 8 --length 512 --dtype bfloat16 --device cuda --checkpointing

Contestants take turns within one process, so that drift of the machine hits all alike; a line of JSON per
contestant, then a table with ratios of medians, then which of the wanted ratios are reached. Peak memory is
measured in a process of its own per contestant. The dense baseline to compare with is `dense_masked_scope`:
`dense_masked_rmsprop` also computes gradients that it multiplies by zero.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lota
from benchmarks.step_report import FAIR_DENSE, LORA, SHIRA, STRUCTURED, Measured, reached, table
from lota.data import packed
from lota.data.batches import Batch, Encoded, collate, next_tokens
from lota.masks import Mask
from lota.masks.extract.units import DEFAULT_BLOCK, units_of
from lota.masks.files import pack
from lota.models.head import token_logps
from lota.models.loading import enable_activation_checkpointing, turn_dropout_off
from lota.models.packed import pack_attention
from lota.models.scope import find_scope
from lota.system import peak_memory_bytes
from lota.train.losses import response_logps

if TYPE_CHECKING:
    from peft import PeftConfig

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[torch.Tensor], None]  # one training step on a batch of token ids
LENGTHS = (128, 96, 80, 64, 56, 40, 32, 16)  # tokens of the examples of a ragged batch: half would be padding
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTING = ("shape", "sparsity", "batch", "length", "dtype", "device")
SHAPES = {  # vocabulary, hidden, intermediate, layers, heads, key-value heads, tied
    "124m": (50_257, 768, 2_048, 12, 12, 12, True),
    "tiny": (512, 64, 172, 4, 4, 4, True),
    "1b": (128_256, 2_048, 8_192, 16, 32, 8, True),
    "8b": (128_256, 4_096, 14_336, 32, 32, 8, False),
}


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of the shape with random weights, the same for every contestant."""
    vocabulary, hidden, intermediate, layers, heads, kv_heads, tied = SHAPES[args.shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=max(1024, args.length), use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    turn_dropout_off(model)
    if args.checkpointing:
        enable_activation_checkpointing(model)
    return model.train()


def compile_if_asked(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Compile the blocks; after an optimizer is fused, whose compact gradients become part of them."""
    if getattr(args, "compile", False):
        lota.compile_blocks(model)


def random_mask(model: torch.nn.Module, sparsity: float) -> Mask:
    generator = torch.Generator().manual_seed(0)
    scope = find_scope(model)
    bits = {name: pack(torch.rand(t.shape, generator=generator) >= sparsity) for name, t in scope.items()}
    return Mask(bits, {name: tensor.shape for name, tensor in scope.items()})


def line_mask(model: torch.nn.Module, sparsity: float, granularity: str, block: int = DEFAULT_BLOCK) -> Mask:
    """Whole rows, columns or blocks at random, the same share of every weight."""
    rng = np.random.default_rng(0)
    bits, scope = {}, find_scope(model)
    for name, tensor in scope.items():
        units = units_of(name, tensor, granularity, block)
        chosen = np.zeros(units.count, np.bool_)
        chosen[rng.permutation(units.count)[: round((1 - sparsity) * units.count)]] = True
        bits[name] = torch.from_numpy(units.packed(chosen))
    return Mask(bits, {name: tensor.shape for name, tensor in scope.items()})


def examples(ids: torch.Tensor) -> list[Encoded]:
    """As many tokens as ids has, in twice as many examples; the longest is as long as a row of ids."""
    shares, tokens = [n * ids.numel() // sum(LENGTHS) for n in LENGTHS], iter(ids.flatten().tolist())
    n_copies = max(1, len(ids) // 4)
    return [Encoded(list(islice(tokens, n // n_copies)), 0) for n in shares for _ in range(n_copies)]


def backward_examples(
    layout: Callable[[list[Encoded]], Batch], model: torch.nn.Module, ids: torch.Tensor
) -> None:
    batch = layout(examples(ids)).to(ids.device)
    logps, _ = response_logps(model, batch, contextlib.nullcontext())
    (-logps.mean()).backward()


def backward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    logps = token_logps(model, {"input_ids": ids}, next_tokens(ids))
    (-logps.sum(dim=1).mean()).backward()


def ours(
    args: argparse.Namespace,
    granularity: str = "element",
    block: int = DEFAULT_BLOCK,
    layout: Callable[[list[Encoded]], Batch] | None = None,
) -> Step:
    """LoTA: compact state, fused into the backward pass. layout: of a ragged batch with as many tokens."""
    model = build_model(args)
    if layout is packed.pack:
        pack_attention(model.eval(), args.shape)
        model.train()
    if granularity == "element":
        mask = random_mask(model, args.sparsity)
    else:
        mask = line_mask(model, args.sparsity, granularity, block)
    optimizer = lota.MaskedRMSprop(model, mask, lr=1e-5, grad_norm_strategy="even", max_grad_norm=10.0)
    lota.fuse_in_backward(optimizer)
    compile_if_asked(args, model)
    forward_backward = backward if layout is None else partial(backward_examples, layout)

    def step(ids: torch.Tensor) -> None:
        forward_backward(model, ids)
        optimizer.step()

    return step


def dense_masked(args: argparse.Namespace, scope_only: bool = False) -> Step:
    """Full gradients and full-size state, multiplied by a dense mask, fused in the same hooks.

    scope_only: parameters outside of the scope are frozen, as a careful user would have them, instead of
    trained under a mask of zeros.
    """
    model = build_model(args)
    mask = random_mask(model, args.sparsity)
    square_avg, kept = {}, {}
    for name, p in model.named_parameters():
        if scope_only and name not in mask:
            p.requires_grad_(False)
            continue
        square_avg[p] = torch.zeros_like(p, dtype=torch.float32)
        kept[p] = mask.dense(name).to(p.device) if name in mask else torch.zeros_like(p, dtype=torch.bool)

    def hook(p: torch.nn.Parameter) -> None:
        with torch.no_grad():
            assert p.grad is not None
            grad = p.grad.float() * kept[p]
            grad.mul_((10.0 / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0))
            square_avg[p].mul_(0.99).addcmul_(grad, grad, value=0.01)
            p.addcdiv_(grad.to(p.dtype), square_avg[p].sqrt().add_(1e-8).to(p.dtype), value=-1e-5)
            p.grad = None

    for p in square_avg:
        p.register_post_accumulate_grad_hook(hook)
    compile_if_asked(args, model)
    return lambda ids: backward(model, ids)


def adapted(model: torch.nn.Module, config: PeftConfig) -> torch.nn.Module:
    """The model with a PEFT adapter in its own dtype: in fp32, PEFT's default beside bf16 weights, the
    adapter's products would be fp32 and slow, which users avoid by autocast.
    """
    from peft import get_peft_model

    return get_peft_model(model, config, autocast_adapter_dtype=False)


def adapter_step(model: torch.nn.Module, config: PeftConfig) -> Step:
    """A PEFT adapter on all linear layers of `model`, trained with torch's RMSprop."""
    wrapped = adapted(model, config)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.RMSprop(trained, lr=1e-5, alpha=0.99)

    def step(ids: torch.Tensor) -> None:
        backward(wrapped, ids)
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def adapter(config_of: Callable[[], PeftConfig]) -> Callable[[argparse.Namespace], Step]:
    def build(args: argparse.Namespace) -> Step:
        model = build_model(args)
        step = adapter_step(model, config_of())
        compile_if_asked(args, model)
        return step

    return build


def lora_config() -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(r=64, lora_alpha=64, target_modules=LINEAR, task_type="CAUSAL_LM")


def shira_config() -> PeftConfig:
    from peft import ShiraConfig

    return ShiraConfig(r=64, target_modules=LINEAR, task_type="CAUSAL_LM")


Contestants = dict[str, Callable[[argparse.Namespace], Step]]
CONTESTANTS: Contestants = {
    "lota": ours,
    "dense_masked_rmsprop": dense_masked,
    "dense_masked_scope": partial(dense_masked, scope_only=True),
    "peft_lora_r64": adapter(lora_config),
    "peft_shira_r64": adapter(shira_config),
    "lota_rows": partial(ours, granularity="row"),
    "lota_columns": partial(ours, granularity="column"),
    "lota_packed": partial(ours, layout=packed.pack),
    "lota_padded": partial(ours, layout=partial(collate, pad_token_id=0)),
    "lota_blocks": partial(ours, granularity="block"),
}
DEFAULT = ["lota", *STRUCTURED, FAIR_DENSE, "dense_masked_rmsprop", LORA, SHIRA]
REFERENCES = (LORA, FAIR_DENSE, SHIRA)


def token_batch(args: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPES[args.shape][0], (args.batch, args.length), generator=generator).to(
        args.device
    )


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, ids: torch.Tensor, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step(ids)
    synchronize(device)
    return time.perf_counter() - start


def times(args: argparse.Namespace, contestants: Contestants) -> dict[str, list[float]]:
    """Seconds of each of args.rounds steps per contestant, taken in turns, after a step to warm up."""
    steps = {name: contestants[name](args) for name in args.contestants}
    ids = token_batch(args)
    for step in steps.values():
        step(ids)
    seconds: dict[str, list[float]] = {name: [] for name in args.contestants}
    for _ in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, ids, args.device))
    return seconds


def own_process_peak(args: argparse.Namespace, name: str, module: str) -> int:
    """Peak bytes of a process that builds one contestant and makes three steps."""
    options = [f"--{key}={getattr(args, key)}" for key in SETTING]
    flags = [f"--{flag}" for flag in ("checkpointing", "compile") if getattr(args, flag)]
    command = [sys.executable, "-W", "ignore", "-m", module, "--peak-of", name, *options, *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.split()[-1])


def print_peak(args: argparse.Namespace, contestants: Contestants) -> None:
    step, ids = contestants[args.peak_of](args), token_batch(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step(ids)
    print(peak_memory_bytes(torch.device(args.device)))


def main(
    contestants: Contestants = CONTESTANTS,
    default: list[str] = DEFAULT,
    batch: int = 4,
    description: str = __doc__,
    module: str = "benchmarks.step",
    references: Sequence[str] = REFERENCES,
) -> None:
    """Compare contestants with each reference that takes part; with the first contestant if none does.

    module: the one that has all contestants.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=batch, help="rows")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per contestant")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile each transformer block")
    parser.add_argument("--contestants", nargs="+", choices=contestants, default=default)
    parser.add_argument("--peak-of", choices=contestants, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args, contestants)
        return
    seconds = times(args, contestants)
    setting = {key: getattr(args, key) for key in SETTING}
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor(),
    }
    rows = []
    for name in args.contestants:
        row = Measured(name, statistics.median(seconds[name]), own_process_peak(args, name, module))
        rows.append(row)
        measured = {"seconds": seconds[name], "peak_bytes": row.peak}
        print(json.dumps({"contestant": name, **setting, **machine, **measured}), flush=True)
    print(f"\n{table(rows, references)}")
    wanted_at = {"shape": "124m", "batch": 4, "length": 128, "dtype": "float32", "device": "cpu"}
    if all(setting[key] == value for key, value in wanted_at.items()):
        print("\n" + "\n".join(reached(rows, args.sparsity)))


if __name__ == "__main__":
    main()
