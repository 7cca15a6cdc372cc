"""Three tasks one after the other in one model: what later tasks cost earlier ones, and what can keep these.

    OMP_NUM_THREADS=1 python -m scripts.sequence_study --groups "real tasks on study-llama" "toy tasks"

Full fine-tuning, LoRA, random masks, LoTA whose masks may overlap and LoTTO learn the tasks in both orders, each
at three or more learning rates: a curve of learning against forgetting. Of each the rate is chosen that has the
least validation loss, over all tasks, after the last stage; test rows are reported. Then, at the rate of LoTTO,
what could keep the behaviour of earlier tasks: `retain` of config/lotto.yaml, and fewer entries for later tasks.
Goes on where it was interrupted. Writes sequences.md, sequences.png and a page.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lota.lotto.config import LottoConfig
from lota.lotto.driver import Lotto
from lota.models.loading import load_model
from lota.storage import content_key
from lota.train.trainer import Trainer
from scripts.cells import Cells, Record
from scripts.study import VALIDATION, Study, best_rate
from scripts.workloads import GROUPS, SMOKE, WORKLOADS, Workload

SPARSITY = 0.9
ORDERS = ("given", "reversed")
PART = "sequence"
logger = logging.getLogger("study")


@dataclass(frozen=True)
class Way:
    """How a sequence of tasks is learnt."""

    name: str
    method: str  # of lotto.py
    start: float  # learning rate that the search begins with
    settings: Mapping[str, Any] = field(default_factory=dict)  # further keys of lotto.py
    retain: Mapping[str, float] = field(default_factory=dict)  # keys of its group `retain`
    late_sparsity: float | None = None  # of the masks of all tasks but the first; None: as the first's
    like: str = ""  # the way whose learning rate it takes; empty: it has a search of its own


LOTTO = Way("LoTTO", "lotto", 5e-3)
FFT = Way("full fine-tuning", "fft", 5e-4)
WAYS = (
    FFT,
    Way("LoRA, AdamW", "lora", 2e-3, {"optimizer": "AdamW"}),
    Way("random masks", "random", 5e-3),
    Way("LoTA, overlapping", "lota", 5e-3),
    LOTTO,
)


def _lotto_with(name: str, late_sparsity: float | None = None, **retain: float) -> Way:
    return Way(f"LoTTO, {name}", "lotto", 0.0, {}, retain, late_sparsity, like=LOTTO.name)


KEEPING = (
    _lotto_with("replay of 1 %", replay_fraction=0.01),
    _lotto_with("replay of 5 %", replay_fraction=0.05),
    _lotto_with("L2-SP 0.01", l2_sp=0.01),
    _lotto_with("L2-SP 0.1", l2_sp=0.1),
    _lotto_with("EWC 0.01", ewc=0.01),
    _lotto_with("EWC 0.1", ewc=0.1),
    _lotto_with("avoid 1", avoid=1.0),
    _lotto_with("avoid 100", avoid=100.0),
    _lotto_with("later tasks s = 0.99", late_sparsity=0.99),
    Way("full fine-tuning, replay of 1 %", "fft", 0.0, retain={"replay_fraction": 0.01}, like=FFT.name),
)


class Sequences:
    """All sequences of one group of tasks."""

    def __init__(self, out: Path, name: str, workloads: Sequence[tuple[str, Workload]], rates: Sequence[float]):
        self.out, self.name, self.rates = out, name, rates
        self.studies = {one.task: Study(out, key, one, sparsities=[SPARSITY]) for key, one in workloads}
        self.first = next(iter(self.studies.values()))
        self.cells = Cells(out / f"{name}.jsonl")
        self.sizes = content_key([study.sizes for study in self.studies.values()])[:12]

    def config(self, way: Way, order: str, seed: int, lr: float) -> LottoConfig:
        """The settings of `python lotto.py`."""
        workload, tasks = self.first.workload, list(self.studies)
        length = max(study.workload.max_length for study in self.studies.values())
        config = LottoConfig(
            exp_name="run", datasets=[], tasks=tasks, order=order, method=way.method, sparsity=SPARSITY,
            data_dir=workload.data_dir, seed=seed, lr=lr, validation_fraction=VALIDATION, n_epochs=None,
            n_examples=workload.n_examples, batch_size=workload.batch_size, lr_scheduler="linear",
            warmup_steps=workload.steps // 10, max_length=length, max_prompt_length=length - 1,
            do_first_eval=False, eval_every=10**9, n_eval_examples=1, overwrite=True,
            local_dirs=[str(self.out / "runs" / self.name)], minimum_log_interval_secs=1e9,
        )  # fmt: skip
        config.model.name_or_path = str(self.first.folder)
        if way.method == "lora":
            rank = self.first.rank_for(SPARSITY)
            config.lora_rank, config.lora_alpha = rank, 2.0 * rank
        for key, value in way.settings.items():
            setattr(config, key, value)
        for key, value in way.retain.items():
            setattr(config.retain, key, value)
        if way.late_sparsity is not None:
            config.task_overrides = {t: {"sparsity": way.late_sparsity} for t in config.sequence[1:]}
        return config

    def measured(self, way: Way, order: str, seed: int, lr: float) -> Record:
        """Results after each stage, None if a run diverged; the sequence is learnt unless they are there."""
        cell = {"part": PART, "way": way.name, "order": order, "seed": seed, "lr": lr, "sizes": self.sizes}
        return self.cells.get(**cell) or self.cells.add(self._learnt(way, order, seed, lr), **cell)

    def _learnt(self, way: Way, order: str, seed: int, lr: float) -> Record:
        lotto = Lotto(self.config(way, order, seed, lr), lambda config: Trainer(config, self.task).train(), self.task)
        stages: list[Record] | None = []
        try:
            with lotto.opened():
                for stage, policy in lotto.learnt():
                    last = stage.number == len(self.studies)
                    stages.append(self._results(policy, list(lotto.config.sequence[: stage.number]), last))
        except ValueError as error:
            if "lower lr" not in str(error):
                raise
            stages = None
        shutil.rmtree(lotto.folder)
        return {"base": self.first.base_hash, "tasks": lotto.config.sequence, "stages": stages}

    def task(self, name: str) -> Any:
        return self.studies[name].task

    def _results(self, policy: Path, tasks: Sequence[str], last: bool) -> Record:
        """Validation and test loss on the tasks so far; scores of the newest, at the end of all; own text."""
        first = self.first
        model = load_model(first.folder, archive=policy, tokenizer=first.tokenizer).eval()
        found: Record = {}
        for name in tasks:
            study = self.studies[name]
            values = {split: study.nats(model, first.tokenizer, study.rows(split)) for split in ("validation", "test")}
            if study.workload.n_scored and (last or name == tasks[-1]):
                values["score"] = study.score(model, first.tokenizer)
            found[name] = values
        return {"tasks": found} | ({"own": first.own(model, first.tokenizer)} if last else {})

    def rate(self, way: Way, order: str, seeds: Sequence[int]) -> float:
        """The rate with the least validation loss of all tasks after the last stage; means over seeds."""

        def loss(lr: float) -> float:
            runs = [self.measured(way, order, seed, lr) for seed in seeds]
            return fmean(final(run, "validation") if run["stages"] else float("inf") for run in runs)

        return best_rate(self.rates, way.start, loss)


def final(run: Record, key: str) -> float:
    """Mean over the tasks, after the last stage. key: `validation`, `test` or `score`."""
    return fmean(values[key] for values in run["stages"][-1]["tasks"].values())


def learnt(run: Record, key: str) -> float:
    """Mean over the tasks, each after its own stage."""
    return fmean(stage["tasks"][task][key] for task, stage in zip(run["tasks"], run["stages"], strict=True))


def forgotten(run: Record, key: str) -> float:
    """Mean over all tasks but the last: after the last stage, minus after its own."""
    own = zip(run["tasks"][:-1], run["stages"], strict=False)
    return fmean(run["stages"][-1]["tasks"][task][key] - stage["tasks"][task][key] for task, stage in own)


def run(sequences: Sequences, args: argparse.Namespace) -> None:
    """All ways of one group of tasks, in the orders that are asked for."""
    ways = [way for way in (*WAYS, *KEEPING) if way.name in args.ways]
    for order in args.orders:
        chosen: dict[str, float] = {}
        for way in ways:
            lr = chosen[way.like] if way.like else sequences.rate(way, order, args.seeds)
            chosen[way.name] = lr
            for seed in args.seeds:
                sequences.measured(way, order, seed, lr)


# Reports


@dataclass(frozen=True)
class Setting:
    """A way in one order at one rate: its runs with several seeds, none of which diverged."""

    way: str
    order: str
    lr: float
    runs: Sequence[Record]

    def values(self, what: Callable[[Record, str], float], key: str) -> list[float]:
        """One per run; none if the tasks do not have it."""
        try:
            return [what(run, key) for run in self.runs]
        except KeyError:
            return []


def settings(records: Sequence[Record]) -> dict[tuple[str, str], list[Setting]]:
    """(order, way) -> its settings."""
    runs: dict[tuple[str, str, float], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        if cell["part"] == PART:
            runs.setdefault((cell["order"], cell["way"], cell["lr"]), []).append(record)
    found: dict[tuple[str, str], list[Setting]] = {}
    for (order, way, lr), own in runs.items():
        if all(run["stages"] for run in own):
            found.setdefault((order, way), []).append(Setting(way, order, lr, own))
    return found


def best(found: Sequence[Setting]) -> Setting:
    """By validation loss of all tasks after the last stage."""
    return min(found, key=lambda setting: fmean(setting.values(final, "validation")))


MEASURES = (
    ("after its own stage, nats", learnt, "test", 1, 3),
    ("after the last stage, nats", final, "test", 1, 3),
    ("earlier tasks' loss", forgotten, "test", 1, 3),
    ("score after its own stage (%)", learnt, "score", 100, 1),
    ("score after the last stage (%)", final, "score", 100, 1),
)


def table(records: Sequence[Record], order: str) -> list[list[str]]:
    """Lines of cells: every way at its best rate, means over tasks and seeds."""
    header = ["way", "lr", *(name for name, *_ in MEASURES), "own text, nats per byte", "seeds"]
    lines = [header]
    for (own, way), found in settings(records).items():
        if own == order:
            setting = best(found)
            cells = [shown(setting.values(what, key), *how) for _, what, key, *how in MEASURES]
            own_text = shown([run["stages"][-1]["own"] for run in setting.runs], 1, 4)
            lines.append([way, f"{setting.lr:g}", *cells, own_text, str(len(setting.runs))])
    return lines


def by_task(records: Sequence[Record], order: str) -> list[list[str]]:
    """Lines of cells: loss (score) of every task after its own stage and after the last, at the best rate."""
    lines: list[list[str]] = []
    for (own, way), found in settings(records).items():
        if own != order:
            continue
        setting = best(found)
        tasks = setting.runs[0]["tasks"]
        lines = lines or [["way", *(f"{task}, {when}" for task in tasks for when in ("own stage", "last"))]]
        cells = []
        for at, task in enumerate(tasks):
            for stage in (at, -1):
                values = [run["stages"][stage]["tasks"][task] for run in setting.runs]
                cell = shown([value["test"] for value in values])
                if "score" in values[0]:
                    cell += f" ({shown([value['score'] for value in values], 100, 1)})"
                cells.append(cell)
        lines.append([way, *cells])
    return lines


def draw(found: Mapping[str, Sequence[Record]], path: Path) -> None:
    """A column per group and order: what earlier tasks lose against what is learnt, over learning rates."""
    panels = [(name, order) for name, records in found.items() for order in dict.fromkeys(o for o, _ in settings(records))]
    with figure_at(path, 5.0 * len(panels), 5.2, "") as figure:
        for axes, (name, order) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for color, (own, way) in zip(PALETTE, [key for key in settings(found[name]) if key[0] == order], strict=False):
                ordered = sorted(settings(found[name])[own, way], key=lambda setting: setting.lr)
                points = [(fmean(s.values(learnt, "test")), fmean(s.values(forgotten, "test"))) for s in ordered]
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=way)
            axes.set(title=f"{name}, {order} order", xlabel="loss of a task after its own stage, nats per token")
            axes.set_ylabel("what earlier tasks lose by the end, nats per token")
            axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
