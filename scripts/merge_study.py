"""Merging dense task vectors against sparse ones: three toy tasks, the embedded model, several seeds.

    python -m scripts.merge_study --out study --seeds 0 1 2

Each task is learnt alone by full fine-tuning (FFT), by LoTA under a mask of its own at two learning rates, or
by LoTA under masks that share no entry, at the rate that is best on validation rows, which no run trains on
and no number reports. Then the three are merged by each method, and every merged model is
scored on every task. Finished stages are not run again. Writes study/results.json, table.md, merging.png and
commands.txt.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.data.batches import encode
from lota.data.prompts import Prompter
from lota.data.task import Row, Task
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import TransformersEngine
from lota.evaluate.estimates import mean_and_stderr
from lota.evaluate.evaluator import Evaluator
from lota.evaluate.loglik import logliks
from lota.evaluate.scorers import TaskRequest
from lota.models.loading import load_model, load_tokenizer
from lota.plots import heatmap
from lota.storage import write_json
from scripts.stages import ROOT, Stages
from tasks import get_task

Record = dict[str, Any]  # plain values, as in results.json

BASE = ROOT / "assets" / "tiny-llama"
TASKS = ("toy_sort", "toy_shift", "toy_reverse")
# Kind of task vector -> learning rates, of which validation rows choose
RATES = {
    "FFT": (3e-4, 1e-3, 3e-3),
    "LoTA": (3e-3, 1e-2, 3e-2),
    "LoTA, lr 3e-3": (3e-3,),
    "LoTA, disjoint": (3e-3, 1e-2, 3e-2),
}
RATE_SEED = 100  # of the runs that choose
VALIDATION = 0.1  # share of the training rows
SPARSITY = "0.9"
METHODS = {
    "sum": "--method sum",
    "half the sum": "--method task_arithmetic --lambda 0.5",
    "TIES, 20 %": "--method ties --density 0.2",
    "DARE, 50 %": "--method dare --density 0.5",
    "DARE + TIES, 50 %": "--method dare_ties --density 0.5",
    "largest 10 %": "--method magnitude_prune --density 0.1",
}


class Study(Stages):
    """The stages of this study."""

    def __init__(self, out: Path, data_fraction: float, n_examples: int):
        super().__init__(out)
        self.data_fraction, self.n_examples = data_fraction, n_examples

    def rate(self, kind: str) -> float:
        """Of a kind's grid the one with the least validation loss, averaged over tasks."""
        grid = RATES[kind]
        return grid[0] if len(grid) == 1 else min(grid, key=lambda lr: self._validation_nats(kind, lr))

    def _validation_nats(self, kind: str, lr: float) -> float:
        found = []
        for task in TASKS:
            log = self.learn(kind, task, RATE_SEED, lr).parent / "metrics.jsonl"
            lines = map(json.loads, log.read_text().splitlines())
            found.append([line["nats_per_token/eval"] for line in lines if "nats_per_token/eval" in line][-1])
        return fmean(found)

    def learn(self, kind: str, task: str, seed: int, lr: float | None = None) -> Path:
        """A task learnt alone: the folder with its policy.pt. lr: None for the kind's best."""
        mask = "null" if kind == "FFT" else self.mask(kind, task, seed)
        tried = "" if lr is None else f"_{lr:g}"
        folder = self.out / str(seed) / f"{slug(kind)}_{task}{tried}"
        epoch = folder / "epoch-1"
        # validation rows, of which a run is evaluated on a sample near its end and at its end
        every = max(1, int(5000 * self.data_fraction))
        self.run(
            f"train_single_gpu.py exp_name={folder.name} 'local_dirs=[{folder.parent}]' model=tiny "
            f"'datasets=[{task}]' mask_path={mask} lr={lr or self.rate(kind):g} seed={seed} batch_size=16 "
            f"data_fraction={self.data_fraction:g} lr_scheduler=linear warmup_steps=20 do_first_eval=false "
            f"validation_fraction={VALIDATION:g} eval_every={every}",
            epoch / "policy.pt",
        )
        return epoch

    def mask(self, kind: str, task: str, seed: int) -> Path:
        """Where FFT changed most; of disjoint masks, among what earlier tasks left."""
        folder = self.out / str(seed) / "masks" / slug(kind)
        earlier = TASKS[: TASKS.index(task)] if kind == "LoTA, disjoint" else ()
        protect = " ".join(str(self.mask(kind, name, seed)) for name in earlier)
        tuned = self.learn("FFT", task, seed)
        self.run(
            f"extract_masks.py --base {BASE} --tuned {tuned} --sparsities {SPARSITY} --name {task}"
            f" --out {folder}" + (f" --protect {protect}" if protect else ""),
            folder / task / f"{SPARSITY}_mask.pt",
        )
        return folder / task / f"{SPARSITY}_mask.pt"

    def merge(self, kind: str, method: str, seed: int) -> Path:
        """The three tasks of one kind and seed, merged."""
        inputs = " ".join(str(self.learn(kind, task, seed)) for task in TASKS)
        out = self.out / str(seed) / "merged" / f"{slug(kind)}_{list(METHODS).index(method)}"
        draws = f" --seed {seed}" if "dare" in METHODS[method] else ""
        self.run(
            f"merge_models.py --base {BASE} --deltas {inputs} {METHODS[method]}{draws} --out {out}",
            out / "merge.json",
        )
        return out

    def score(self, model: Path, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """task -> accuracy and held-out nats per token, on the first `n_examples` test rows."""
        file = model / "scores.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        if set(names) <= set(found):
            return {name: found[name] for name in names}
        archive = str(model) if (model / "policy.pt").is_file() else None
        base = BASE if archive else model
        tokenizer = load_tokenizer(base)
        policy = load_model(base, archive=archive, tokenizer=tokenizer)
        engine = TransformersEngine(policy, tokenizer, batch_size=200)
        evaluator = Evaluator(engine, Prompter(tokenizer), model_name=str(model), out_dir=model)
        for name in names:
            task = get_task(name)
            rows = task.load("test", "")[: self.n_examples]
            request = TaskRequest(task, rows, Decoding(task.max_new_tokens, stop=task.stop))
            result = evaluator.evaluate(request)
            found[name] = {"accuracy": result.score, "nats": held_out_nats(policy, tokenizer, task, rows)}
        write_json(file, found)
        return found


def held_out_nats(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row]
) -> float:
    """Mean loss per response token, in nats."""
    requests, prompter = [], Prompter(tokenizer)
    for row in rows:
        coded = encode(tokenizer, prompter.example(task, row), max_length=256, max_prompt_length=128)
        n = coded.prompt_length
        requests.append((coded.input_ids[:n], coded.input_ids[n:]))
    return -sum(logliks(model, requests, batch_size=100)) / sum(len(after) for _, after in requests)


def slug(kind: str) -> str:
    """A kind of vector as part of a file name."""
    return kind.replace(",", "").replace(" ", "_")


def methods_for(kind: str) -> list[str]:
    """Vectors that share no entry are only added: no other method has anything to resolve."""
    return ["sum"] if kind == "LoTA, disjoint" else list(METHODS)


def collect(study: Study, seeds: list[int]) -> list[Record]:
    """A record per kind, method ("alone": before merging) and seed: scores by task, overlaps of pairs."""
    records = []
    cases = [(kind, method) for kind in RATES for method in ("alone", *methods_for(kind))]
    for seed, (kind, method) in tqdm(list(product(seeds, cases)), desc="study", disable=None):
        record: Record = {"seed": seed, "kind": kind, "method": method}
        if method == "alone":
            record["scores"] = {t: study.score(study.learn(kind, t, seed), (t,))[t] for t in TASKS}
        else:
            folder = study.merge(kind, method, seed)
            record["scores"] = study.score(folder, TASKS)
            merged = json.loads((folder / "merge.json").read_text())
            record |= {"pairs": merged["pairs"], "exact": merged["exact"]}
        records.append(record)
    return records


def summarize(records: list[Record]) -> list[Record]:
    """Means over seeds with standard errors, per kind and method: by task, and over the tasks."""
    rows = []
    for kind, method in dict.fromkeys((record["kind"], record["method"]) for record in records):
        own = [record["scores"] for record in records if (record["kind"], record["method"]) == (kind, method)]
        row: Record = {"kind": kind, "method": method, "seeds": len(own)}
        for metric in ("accuracy", "nats"):
            row[metric] = {task: mean_and_stderr([scores[task][metric] for scores in own]) for task in TASKS}
            means = [sum(scores[task][metric] for task in TASKS) / len(TASKS) for scores in own]
            row[metric]["mean"] = mean_and_stderr(means)
        rows.append(row)
    return rows


def table(rows: list[Record]) -> str:
    """Markdown: accuracy in per cent by task and on average, held-out nats per token on average."""
    lines = [
        f"| vectors | merged by | {' | '.join(TASKS)} | mean accuracy (%) | held-out nats per token |",
        "|---|---|" + "---|" * (len(TASKS) + 2),
    ]
    for row in rows:
        cells = [_number(row["accuracy"][name], 100, 1) for name in (*TASKS, "mean")]
        method = "(not merged)" if row["method"] == "alone" else f"`{METHODS[row['method']]}`"
        lines.append(
            f"| {row['kind']} | {method} | {' | '.join(cells)} | {_number(row['nats']['mean'], 1, 3)} |"
        )
    return "\n".join(lines)


def _number(estimate: tuple[float, float | None], factor: float, digits: int) -> str:
    mean, error = estimate
    shown = f"{factor * mean:.{digits}f}"
    return shown if error is None else f"{shown} ± {factor * error:.{digits}f}"


def overlaps(records: list[Record]) -> str:
    """Per kind: what two tasks' vectors share, averaged over pairs and seeds."""
    lines = [
        "| vectors | entries of the smaller in both | signs differ there | cosine |",
        "|---|---|---|---|",
    ]
    for kind in RATES:
        pairs = [pair for r in records if (r["kind"], r["method"]) == (kind, "sum") for pair in r["pairs"]]
        shared = mean_and_stderr([pair["overlap_share"] for pair in pairs])
        signs = [pair["sign_conflict_share"] for pair in pairs if pair["sign_conflict_share"] is not None]
        conflicts = _number(mean_and_stderr(signs), 100, 1) + " %" if signs else "-"
        cosine = _number(mean_and_stderr([pair["cosine"] for pair in pairs]), 1, 3)
        lines.append(f"| {kind} | {_number(shared, 100, 1)} % | {conflicts} | {cosine} |")
    return "\n".join(lines)


def plot(rows: list[Record], path: Path) -> None:
    """Accuracy averaged over the tasks: a row per kind of vector, a column per method."""
    means = {(row["kind"], row["method"]): row["accuracy"]["mean"] for row in rows}
    cells = [[means.get((kind, method), (None, None)) for method in ("alone", *METHODS)] for kind in RATES]
    heatmap(
        [[None if mean is None else 100 * mean for mean, _ in line] for line in cells],
        list(RATES),
        ["not merged", *METHODS],
        path,
        title=f"Three tasks merged into one model, mean of {rows[0]['seeds']} seeds",
        label="mean accuracy (%)",
        row_label="task vectors",
        column_label="merged by",
        errors=[[None if error is None else 100 * error for _, error in line] for line in cells],
        limits=(0, 100),
        fmt=".0f",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "study", help="folder for everything (default: study)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and samples")
    parser.add_argument(
        "--data_fraction",
        type=float,
        default=0.28,
        help="of about 5,760 training rows per task",
    )
    parser.add_argument("--n_examples", type=int, default=100, help="test rows per task")
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    study = Study(args.out.resolve(), args.data_fraction, args.n_examples)
    records = collect(study, args.seeds)
    rows = summarize(records)
    write_json(args.out / "results.json", {"records": records, "rows": rows})
    (args.out / "commands.txt").write_text("\n".join(dict.fromkeys(study.commands)) + "\n", encoding="utf-8")
    (args.out / "table.md").write_text(f"{table(rows)}\n\n{overlaps(records)}\n", encoding="utf-8")
    plot(rows, args.out / "merging.png")
    print(f"{table(rows)}\n\n{overlaps(records)}")


if __name__ == "__main__":
    main()
