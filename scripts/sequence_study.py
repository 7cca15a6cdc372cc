"""Three tasks one after the other in one model: what later tasks cost earlier ones, and what can keep these.

    OMP_NUM_THREADS=1 python -m scripts.sequence_study --groups "real tasks" "toy tasks"

Full fine-tuning, LoRA, random masks, LoTA whose masks may overlap and LoTTO learn the tasks, each at three or
more learning rates: a curve of learning against forgetting. Of each the rate is chosen that has the least
validation loss, over all tasks, after the last stage; test rows are reported. Then, at LoTTO's rate, what
could keep the behaviour of earlier tasks: `retain` of config/lotto.yaml, and fewer entries for later tasks.
The reversed order has the rates of the given one. Goes on where it was interrupted. Writes sequences.md, .png
and .html.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lota.lotto.config import LottoConfig
from lota.lotto.driver import Lotto
from lota.models.loading import load_model
from scripts.cells import Cells, Record
from scripts.methods import RATES, SCOPE, best_rate
from scripts.sequence_report import PART, SIZES, final, group_key, members, report
from scripts.study import VALIDATION, Study
from scripts.study_command import in_study, study_parser
from scripts.workloads import BASES, GROUPS, WORKLOADS

SPARSITY = 0.9
SMOKE_SIZES = {
    **dict.fromkeys(("n_validation", "n_test"), 8),
    **{"n_examples": 32, "n_scored": 4, "own_bytes": 500, "new_tokens": 4},
}
ORDERS = ("given", "reversed")


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
WITHIN = Way(SCOPE.name, "lota", 5e-4, {"sparsity": 0.0})
OVERLAPPING = Way("LoTA, overlapping", "lota", 5e-3)
WAYS = (
    FFT,
    WITHIN,
    Way("LoRA, AdamW", "lora", 2e-3, {"optimizer": "AdamW"}),
    Way("LoRA, RMSprop", "lora", 2e-3, {"optimizer": "RMSprop"}),
    Way("random masks", "random", 5e-3),
    OVERLAPPING,
    LOTTO,
)


def _lotto_with(name: str, late_sparsity: float | None = None, **retain: float) -> Way:
    return Way(f"LoTTO, {name}", "lotto", 0.0, {}, retain, late_sparsity, like=LOTTO.name)


KEEPING = (
    *(_lotto_with(f"replay of {share:.0%}", replay_fraction=share) for share in (0.01, 0.05, 0.2)),
    *(_lotto_with(f"L2-SP {strength:g}", l2_sp=strength) for strength in (1.0, 10.0, 100.0)),
    *(_lotto_with(f"EWC {strength:g}", ewc=strength) for strength in (1.0, 10.0, 100.0)),
    *(_lotto_with(f"avoid {strength:g}", avoid=strength) for strength in (1.0, 100.0)),
    _lotto_with("later tasks s = 0.99", late_sparsity=0.99),
    _lotto_with("replay of 5% and EWC 10", replay_fraction=0.05, ewc=10.0),
    Way("full fine-tuning, replay of 5%", "fft", 0.0, retain={"replay_fraction": 0.05}, like=FFT.name),
    Way("full fine-tuning, EWC 10", "fft", 0.0, retain={"ewc": 10.0}, like=FFT.name),
    Way(
        f"{OVERLAPPING.name}, replay of 5%", "lota", 0.0, {}, {"replay_fraction": 0.05}, like=OVERLAPPING.name
    ),
    Way(
        f"{WITHIN.name}, replay of 5%",
        "lota",
        0.0,
        WITHIN.settings,
        {"replay_fraction": 0.05},
        like=WITHIN.name,
    ),
)


class Sequences:
    """All sequences of one group of tasks."""

    def __init__(self, out: Path, name: str, sizes: Mapping[str, Any], rates: Sequence[float]):
        """sizes: fields of all workloads that differ from scripts/workloads.py."""
        self.out, self.name, self.rates = out, name, rates
        workloads = members(name, sizes)
        self.studies = {
            one.task: Study(out, key, one, sparsities=[SPARSITY]) for key, one in workloads.items()
        }
        self.first = next(iter(self.studies.values()))
        self.cells = Cells(out / f"{name}.jsonl")
        self.sizes = group_key(workloads, self.first.base_hash)

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
            local_dirs=[str(self.out / "runs" / self.name)], minimum_log_interval_secs=1e9, packing=True,
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
        trainer = BASES[self.first.workload.base].trainer
        lotto = Lotto(
            self.config(way, order, seed, lr), lambda run: trainer(run, self.task).train(), self.task
        )
        stages: list[Record] = []
        diverged = False
        try:
            with lotto.opened():
                for stage, policy in lotto.learnt():
                    last = stage.number == len(self.studies)
                    stages.append(self._results(policy, list(lotto.config.sequence[: stage.number]), last))
        except ValueError as error:
            if "lower lr" not in str(error):
                raise
            diverged = True
        shutil.rmtree(lotto.folder, ignore_errors=True)  # absent if the first run diverged
        return {
            "base": self.first.base_hash,
            "tasks": lotto.config.sequence,
            "stages": None if diverged else stages,
        }

    def task(self, name: str) -> Any:
        return self.studies[name].task

    def _results(self, policy: Path, tasks: Sequence[str], last: bool) -> Record:
        """Validation and test loss on the tasks so far; scores of the newest, at the end of all; own text."""
        first = self.first
        model = load_model(first.folder, archive=policy, tokenizer=first.tokenizer).eval()
        found: Record = {}
        for name in tasks:
            study = self.studies[name]
            values = {
                split: study.nats(model, first.tokenizer, study.rows(split))
                for split in ("validation", "test")
            }
            if study.workload.n_scored and (last or name == tasks[-1]):
                values["score"] = study.score(model, first.tokenizer)
            found[name] = values
        return {"tasks": found} | ({"own": first.own(model, first.tokenizer)} if last else {})

    def rate(self, way: Way, seeds: Sequence[int]) -> float:
        """The rate with the least validation loss of all tasks after the last stage; means over seeds."""

        def loss(lr: float) -> float:
            runs = [self.measured(way, ORDERS[0], seed, lr) for seed in seeds]
            return fmean(final(run, "validation") if run["stages"] else float("inf") for run in runs)

        return best_rate(self.rates, way.start, loss)


def run(sequences: Sequences, args: argparse.Namespace) -> None:
    """All ways of one group of tasks, in the orders that are asked for."""
    every = {way.name: way for way in (*WAYS, *KEEPING)}
    for order in args.orders:
        for way in (way for way in every.values() if way.name in args.ways):
            lr = sequences.rate(every[way.like or way.name], args.seeds)
            for seed in args.seeds:
                sequences.measured(way, order, seed, lr)


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser(__doc__, GROUPS, list(GROUPS), option="--groups")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    every = [way.name for way in (*WAYS, *KEEPING)]
    parser.add_argument("--ways", nargs="+", choices=every, default=every)
    args = parser.parse_args(arguments)
    if not args.report:
        groups = ["toy tasks"] if args.smoke else args.groups
        sizes, rates = (SMOKE_SIZES, (1e-3, 1e-2)) if args.smoke else (SIZES, RATES)
        for name in in_study(args.out, {name: WORKLOADS[GROUPS[name][0]].base for name in groups}):
            run(Sequences(args.out.resolve(), name, sizes, rates), args)
    print(report(args.out))


if __name__ == "__main__":
    main()
