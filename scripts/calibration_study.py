"""Masks from dense calibrations of little memory, held against those of fp32 calibrations.

    python -m scripts.calibration_study --out study --data_dir DATA --stories MODELS/stories260K

For each task a base whose weights are bf16 numbers, as released ones are, is calibrated in fp32 with several
seeds, and with one seed at lower precision: all that saves memory together, and each part of it alone. Of
each run a mask is extracted. Also: masks from gradients, summed in fp32 and in bf16. Finished stages are not
run again. Writes study/results.json, calibration.md, .png and .html.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lota.masks import Mask
from lota.models.hashing import remembered_hash
from lota.plots import bars
from lota.report.page import Section
from lota.storage import write_json
from scripts.stages import ROOT, Stages
from scripts.study_report import Table, about_sections, study_sections, write_report
from scripts.terms import TASKS as TASK_TEXTS
from scripts.workloads import BASES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BF16, ROUNDED = "model.policy_dtype=bfloat16", "stochastic_rounding=true"
# name -> (what it is, settings)
VARIANTS = {
    "fp32": ("fp32 weights and state", ""),
    "state-bf16": ("fp32 weights, bf16 average", "optimizer_state=bfloat16"),
    "state-factored": ("fp32 weights, factored average", "optimizer_state=factored"),
    "weights-bf16": ("bf16 weights rounded by lot, fp32 average", f"{BF16} {ROUNDED}"),
    "low": ("bf16 weights rounded by lot, bf16 average", f"{BF16} {ROUNDED} optimizer_state=bfloat16"),
    "low-factored": (
        "bf16 weights rounded by lot, factored average",
        f"{BF16} {ROUNDED} optimizer_state=factored",
    ),
}
# task -> (embedded or stories260K, settings of its runs)
SHORT = "lr=1e-4 batch_size=8 n_examples=320 warmup_steps=10 max_length=256 max_prompt_length=192"
TASKS = {
    "toy_sort": ("tiny", "lr=1e-3 batch_size=16 n_examples=1600 warmup_steps=20"),
    "gsm8k": (
        "stories",
        f"{SHORT} n_eval_examples=64",
    ),
    "sql": (
        "stories",
        f"{SHORT} n_eval_examples=64",
    ),
}
NAMES = {"seeds": "fp32, another seed"} | {name: about for name, (about, _) in list(VARIANTS.items())[1:]}
ABOUT = {"tiny": BASES["tiny-llama"].about, "stories": BASES["stories260K"].about}


class Study(Stages):
    """The stages of this study."""

    def __init__(self, out: Path, data_dir: str, models: dict[str, Path]):
        super().__init__(out)
        self.data_dir, self.models = data_dir, models

    def base(self, name: str) -> Path:
        """The model with its weights rounded to bf16."""
        folder = self.out / f"base-{name}"
        if not (folder / "model.safetensors").exists():
            model = AutoModelForCausalLM.from_pretrained(self.models[name], dtype=torch.bfloat16)
            AutoTokenizer.from_pretrained(self.models[name]).save_pretrained(folder)
            model.save_pretrained(folder)
        return folder

    def calibrate(self, task: str, variant: str, seed: int) -> Path:
        """The run's folder."""
        model, settings = TASKS[task]
        folder = self.out / f"{task}-{variant}-{seed}"
        self.run(
            f"train_single_gpu.py exp_name={folder.name} 'local_dirs=[{self.out}]' model=blank_model "
            f"model.name_or_path={self.base(model)} 'datasets=[{task}]' data_dir={self.data_dir} "
            f"{settings} lr_scheduler=linear n_epochs=null seed={seed} do_first_eval=false "
            f"eval_every={settings.split('n_examples=')[1].split()[0]} {VARIANTS[variant][1]}",
            folder / "done",
        )
        last = max(folder.glob("*-*/policy.pt"), key=lambda path: path.stat().st_mtime)
        (folder / "done").write_text(last.parent.name)
        return folder

    def mask(self, task: str, variant: str, seed: int) -> Mask:
        folder = self.calibrate(task, variant, seed)
        tuned = folder / (folder / "done").read_text()
        return self.extracted(task, f"{folder.name}", f"--tuned {tuned}")

    def gradient_mask(self, task: str, dtype: str, sums: str) -> Mask:
        """From the sum of gradients. dtype: of weights and gradients; sums: of what they are added up in."""
        data = f"--datasets {task} --data_dir {self.data_dir} --score_batches 64 --max_length 256"
        options = f"{data} --max_prompt_length 192 --dtype {dtype} --score_dtype {sums}"
        return self.extracted(task, f"{task}-gradient-{dtype}-{sums}", f"--score gradient {options}")

    def extracted(self, task: str, name: str, options: str) -> Mask:
        base = self.base(TASKS[task][0])
        file = self.out / "masks" / name / "0.9_mask.pt"
        self.run(
            f"extract_masks.py --base {base} {options} --sparsities 0.9 --name {name} --out {self.out}/masks",
            file,
        )
        return Mask.load(file)

    def nats(self, task: str, variant: str, seed: int) -> float:
        """Held-out loss per response token after the calibration."""
        lines = (self.calibrate(task, variant, seed) / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line).get("nats_per_token/eval") for line in lines]
        return next(value for value in reversed(found) if value is not None)


def iou(one: Mask, other: Mask) -> float:
    shared = one.intersect(other).n_kept
    return shared / (one.n_kept + other.n_kept - shared)


def measure(study: Study, task: str, seeds: list[int]) -> dict[str, Any]:
    """Per variant, IoU with the first seed's fp32 mask, and held-out nats; IoU of pairs of fp32 seeds."""
    first = seeds[0]
    exact = {seed: study.mask(task, "fp32", seed) for seed in seeds}
    pairs = [(a, b) for a in seeds for b in seeds if a < b]
    rows: dict[str, Any] = {
        "base": remembered_hash(study.base(TASKS[task][0])),
        "seeds": {"iou": [iou(exact[a], exact[b]) for a, b in pairs],
                  "nats": [study.nats(task, "fp32", seed) for seed in seeds]},
    }  # fmt: skip
    for variant in list(VARIANTS)[1:]:
        mask = study.mask(task, variant, first)
        rows[variant] = {
            "iou": [iou(mask, exact[first])],
            "iou with other seeds": [iou(mask, exact[seed]) for seed in seeds[1:]],
            "nats": [study.nats(task, variant, first)],
        }
    summed = study.gradient_mask(task, "float32", "float32")
    in_bf16 = study.gradient_mask(task, "bfloat16", "float32")
    rows["gradient"] = {
        "fp32 sums -> bf16 sums": iou(summed, study.gradient_mask(task, "float32", "bfloat16")),
        "bf16 weights, fp32 sums -> bf16 sums": iou(
            in_bf16, study.gradient_mask(task, "bfloat16", "bfloat16")
        ),
        "fp32 -> bf16 weights, fp32 sums": iou(summed, in_bf16),
    }
    return rows


ASKED = """A calibration trains all weights of the base, and so needs much more memory than the training \
under its mask. Does it give the same mask if weights and the optimizer's average of squared gradients are \
kept in fewer bits?"""
MEASURED = """For each task the weights of the base are rounded to bf16, as those of released models are. \
It is calibrated in fp32 with several seeds, and with the first seed at lower precision. Of each \
calibration the mask of sparsity 0.9 is compared with the fp32 mask of the same seed, by IoU. "fp32, \
another seed": each pair of fp32 masks, which shows what the order of the rows alone changes. Losses: nats \
per token on held-out rows after the calibration. "bf16 average": the optimizer's average in bf16; \
"factored": its sums by row and by column alone; "rounded by lot": up or down at random, so that the mean \
is right. Nothing was chosen on these rows."""


def tables(results: dict[str, Any]) -> list[Table]:
    tasks = list(results)
    lines = [["calibration", *(f"{task}: {what}" for task in tasks for what in ("IoU", "nats per token"))]]
    for key, name in NAMES.items():
        found = [results[task][key][what] for task in tasks for what in ("iou", "nats")]
        lines.append([name, *(", ".join(f"{value:.3f}" for value in part) for part in found)])
    gradients = [["mask from gradients", *(f"{task}: IoU" for task in tasks)]]
    for key in results[tasks[0]]["gradient"]:
        gradients.append([key, *(f"{results[task]['gradient'][key]:.3f}" for task in tasks)])
    return [Table("Calibrations", lines), Table("Masks from gradients, summed in fewer bits", gradients)]


def draw(results: dict[str, Any]) -> Figure:
    """IoU of each variant, a panel per task."""
    panels = {
        f"{task}: IoU": [(fmean(found[key]["iou"]), None) for key in NAMES] for task, found in results.items()
    }
    return bars(panels, list(NAMES.values()))


def sections(results: dict[str, Any]) -> list[Section]:
    """Heading and facts of each task, figure, tables."""
    found = []
    for task, own in results.items():
        base, settings = TASKS[task]
        items = [
            f"Task: {task}, {TASK_TEXTS[task]}.",
            f"Base: {ABOUT[base]}; SHA-256 of the weights {own.get('base', 'not noted')}.",
            f"Settings of a calibration: {settings}, with a learning rate that falls to zero.",
            f"Calibrations in fp32: {len(own['seeds']['nats'])} seeds.",
        ]
        found.append(Section(task, items=items))
    figure = Section("Results", figure=draw(results), alt="IoU with the fp32 mask of the same seed")
    return [*found, figure, *study_sections(tables(results))]


def report(out: Path) -> str:
    """Write what results.json says, return the Markdown."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    about = about_sections(ASKED, MEASURED, shared="")
    return write_report(
        out,
        "calibration",
        "Masks from calibrations of little memory",
        about,
        sections(results),
        draw(results),
    )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--data_dir", help="has tasks/gsm8k and tasks/sql")
    parser.add_argument("--stories", type=Path, help="folder of stories260K")
    parser.add_argument(
        "--report", action="store_true", help="tables, figure and page of results.json, no run"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fp32 calibrations")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    arguments = parser.parse_args(words)
    if arguments.report:
        print(report(arguments.out))
        return
    if arguments.data_dir is None or arguments.stories is None:
        parser.error("--data_dir and --stories are needed to run")
    if len(arguments.seeds) < 2:
        parser.error("--seeds: at least two, whose masks are compared")
    os.chdir(ROOT)
    models = {"tiny": ROOT / "assets" / "tiny-llama", "stories": arguments.stories.resolve()}
    study = Study(arguments.out.resolve(), str(Path(arguments.data_dir).resolve()), models)
    results = {}
    for task in tqdm(arguments.tasks, desc="study", disable=None):
        results[task] = measure(study, task, arguments.seeds)
        write_json(study.out / "results.json", results)
    print(report(study.out))


if __name__ == "__main__":
    main()
