"""The whole method on the embedded tiny model, on a CPU in a few minutes: `make demo`.

Calibrate on toy_sort, extract masks at three sparsities, adapt at each, convert, evaluate, sample, then learn
two tasks one after the other in one model, and draw it all. Every stage is one of the project's commands, run
as a user would, and nothing of lota/ is imported: the script runs from a clone that is not installed.
Results go to demo/, which each call makes anew.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
BASE, OUT, TASK = "assets/tiny-llama", "demo", "toy_sort"
PROMPTS = "assets/prompts/demo_prompts.json"
DENSE_LR = 1e-3
MASK_LR = {"0.5": 5e-3, "0.9": 1e-2, "0.99": 3e-2}  # the fewer entries train, the larger the steps they need
TRAINING = (
    f"loss=sft model=tiny 'datasets=[{TASK}]' batch_size=16 n_epochs=1 lr_scheduler=linear warmup_steps=20 "
    f"do_first_eval=false eval_every=3200 eval_batch_size=64 'local_dirs=[{OUT}/runs]' overwrite=true"
)
SEQUENCE = (
    "exp_name=lotto 'tasks=[toy_sort,toy_shift]' sparsity=0.9 model=tiny lr=1e-2 batch_size=16 "
    "n_examples=3200 lr_scheduler=linear warmup_steps=20 calibrate.lr=1e-3 calibrate.n_steps=60 "
    "do_first_eval=false "
    f"eval_batch_size=100 n_eval_examples=200 'local_dirs=[{OUT}/runs]' overwrite=true"
)
COLUMNS = "{:<17} {:>8} {:>12} {:>6} {:>16} {:>8} {:>9}".format


@dataclass
class Row:
    """A line of the table; None if nothing trained."""

    method: str
    sparsity: float | None
    lr: float | None
    kept: int  # entries that train
    score: float
    stderr: float  # of the score
    seconds: float | None = None  # of the training command
    memory: int | None = None  # bytes, peak of its process


class Demo:
    """Runs the stages one after the other and keeps the commands."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def run(self, title: str, line: str) -> float:
        """One command of the project from its root, output shown as it comes; returns its seconds.

        Ends the demo with the command and its exit code when it fails.
        """
        self.commands.append(f"python {line}")
        print(f"\n=== {title}\n$ python {line}", flush=True)
        # one thread: for a model this small a second one gains little, and loses much beside other programs
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-u", *shlex.split(line)]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, check=False)
        if done.returncode:
            sys.exit(f"\ndemo stopped: '{title}' failed with exit code {done.returncode}:\n  python {line}")
        return time.perf_counter() - start

    def train(self, name: str, lr: float, mask: str) -> tuple[str, float]:
        """A training run, then its conversion; returns the checkpoint folder and the training's seconds."""
        title = f"{name}: train {'every weight' if mask == 'null' else 'only what the mask keeps'}"
        seconds = self.run(
            title, f"train_single_gpu.py exp_name={name} mask_path={mask} lr={lr:g} {TRAINING}"
        )
        folder = f"{OUT}/runs/{name}/epoch-1"
        arguments = f"--model_path {BASE} --policy_path {folder}/policy.pt --save_path {folder}"
        self.run(f"{name}: convert", f"convert_policy_to_hf_resize.py {arguments}")
        return folder, seconds

    def evaluate(self, title: str, model: str, out: str) -> tuple[float, float]:
        """(accuracy, standard error) on the task's test split."""
        arguments = f"--model {model} --datasets {TASK} --bs 200 --out {out}"
        self.run(f"{title}: evaluate", f"eval_model_all.py {arguments}")
        result = json.loads((ROOT / out / "metrics" / f"{TASK}.json").read_text())
        return result["score"], result["stderr"]

    def sample(self, title: str, model: str, out: str) -> list[dict[str, str]]:
        """Completions of the bundled prompts in AlpacaEval's format."""
        self.run(
            f"{title}: sample",
            f"generate_samples.py --prompt_set {PROMPTS} --temperatures 0.7 --model_name {title} "
            f"--model_path {model} --out {out} --max_length 256 --max_prompt_length 128",
        )
        return json.loads((ROOT / out / f"{Path(PROMPTS).stem}_temp0.7.json").read_text())


def peak_memory(run: str) -> int:
    """Bytes, of the whole training process."""
    lines = (ROOT / OUT / "runs" / run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return max(json.loads(line)["peak_memory_bytes"] for line in lines)


def n_parameters(folder: str) -> int:
    """All entries of a model's safetensors file, from its header."""
    with safe_open(ROOT / folder / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (not a dict)


def run_pipeline(demo: Demo) -> tuple[list[Row], list[dict[str, str]]]:
    """All stages; the rows of the table and the samples."""
    rows = [Row("base model", None, None, 0, *demo.evaluate("base", BASE, f"{OUT}/base"))]
    tuned, seconds = demo.train("calibrate", DENSE_LR, "null")
    rows.append(
        Row("full fine-tuning", 0.0, DENSE_LR, n_parameters(BASE), *demo.evaluate("calibrate", tuned, tuned))
    )
    rows[-1].seconds, rows[-1].memory = seconds, peak_memory("calibrate")
    arguments = (
        f"--base {BASE} --tuned {tuned} --sparsities {' '.join(MASK_LR)} --name {TASK} --out {OUT}/masks"
    )
    demo.run("extract the masks", f"extract_masks.py {arguments}")
    masks = json.loads((ROOT / OUT / "masks" / TASK / "summary.json").read_text())["masks"]
    for sparsity, lr in MASK_LR.items():
        name = f"lota_{sparsity}"
        folder, seconds = demo.train(name, lr, f"{OUT}/masks/{TASK}/{sparsity}_mask.pt")
        score = demo.evaluate(name, folder, folder)
        rows.append(
            Row("LoTA", float(sparsity), lr, masks[sparsity]["kept"], *score, seconds, peak_memory(name))
        )
    return rows, demo.sample("lota_0.9", f"{OUT}/runs/lota_0.9/epoch-1", f"{OUT}/samples")


def table(rows: list[Row]) -> str:
    lines = [COLUMNS("method", "sparsity", "kept entries", "lr", "accuracy", "seconds", "peak MiB")]
    for row in rows:
        memory = None if row.memory is None else row.memory / 2**20
        cells = [row.method, _number(row.sparsity, "g"), f"{row.kept:,}", _number(row.lr, "g")]
        cells += [f"{row.score:.3f} +- {row.stderr:.3f}", _number(row.seconds, ".0f"), _number(memory, ".0f")]
        lines.append(COLUMNS(*cells))
    return "\n".join(lines)


def _number(value: float | None, fmt: str) -> str:
    return "-" if value is None else f"{value:{fmt}}"


def main() -> None:
    start = time.perf_counter()
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    demo = Demo()
    rows, samples = run_pipeline(demo)
    text = table(rows)
    (ROOT / OUT / "table.txt").write_text(text + "\n")
    demo.run("two tasks, one after the other, each in weights of its own", f"lotto.py {SEQUENCE}")
    runs = " ".join(f"{OUT}/runs/{name}" for name in ("calibrate", *(f"lota_{s}" for s in MASK_LR), "lotto"))
    demo.run("figures of all runs", f"plot_runs.py {runs} --base {OUT}/base --out {OUT}/figures")
    print("\nThe same by hand:\n")
    print("\n".join(f"  {command}" for command in demo.commands))
    print(f"\nSamples of LoTA at 0.9, prompts of {PROMPTS}:\n")
    print("\n".join(f"  {s['instruction']}  ->  {s['output'][:70]!r}" for s in samples[:4]))
    print(f"\n{text}\n\naccuracy: exact match on the test split of {TASK}, +- standard error")
    print("seconds: of the training command; peak: memory of its process")
    print(f"\n{(ROOT / OUT / 'runs/lotto/forgetting.txt').read_text()}")
    print(f"of the two tasks: {OUT}/runs/lotto/ledger.txt, forgetting.png")
    print(f"figures: {OUT}/figures/index.html   all files: {OUT}/")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
