"""Three tasks one after the other in one model: what later tasks cost earlier ones, and what can keep these.

    OMP_NUM_THREADS=1 python -m scripts.sequence_study --groups "real tasks" "toy tasks"

Full fine-tuning, LoRA, random masks, LoTA whose masks may overlap and LoTTO learn the tasks in both orders,
each at three or more learning rates: a curve of learning against forgetting. Of each the rate is chosen that
has the least validation loss, over all tasks, after the last stage; test rows are reported. Then, at the rate
of LoTTO, what could keep the behaviour of earlier tasks: `retain` of config/lotto.yaml, and fewer entries for
later tasks. Goes on where it was interrupted. Writes sequences.md, .png and .html.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lota.lotto.config import LottoConfig
from lota.lotto.driver import Lotto
from lota.models.loading import load_model
from lota.plots import MARKERS, PALETTE, figure_at
from lota.report.page import Section
from lota.storage import content_key
from scripts.cells import Cells, Record, read_cells, shown
from scripts.study import RATES, VALIDATION, Study, best_rate, in_study, study_parser
from scripts.study_report import SHARED, Table, about_sections, study_sections, write_report
from scripts.workloads import BASES, GROUPS, WORKLOADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPARSITY = 0.9
SIZES = {"n_examples": 320, "n_validation": 60, "n_test": 100, "n_scored": 60}  # of each task
SMOKE_SIZES = {
    "n_examples": 32,
    "n_validation": 8,
    "n_test": 8,
    "n_scored": 4,
    "own_bytes": 500,
    "new_tokens": 4,
}
ORDERS = ("given", "reversed")
PART = "sequence"


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
    *(_lotto_with(f"replay of {share:.0%}", replay_fraction=share) for share in (0.01, 0.05, 0.2)),
    *(_lotto_with(f"L2-SP {strength:g}", l2_sp=strength) for strength in (1.0, 10.0)),
    *(_lotto_with(f"EWC {strength:g}", ewc=strength) for strength in (1.0, 10.0)),
    *(_lotto_with(f"avoid {strength:g}", avoid=strength) for strength in (1.0, 100.0)),
    _lotto_with("later tasks s = 0.99", late_sparsity=0.99),
    Way("full fine-tuning, replay of 5%", "fft", 0.0, retain={"replay_fraction": 0.05}, like=FFT.name),
)


class Sequences:
    """All sequences of one group of tasks."""

    def __init__(self, out: Path, name: str, sizes: Mapping[str, Any], rates: Sequence[float]):
        """sizes: fields of all workloads that differ from scripts/workloads.py."""
        self.out, self.name, self.rates = out, name, rates
        workloads = {key: replace(WORKLOADS[key], **sizes) for key in GROUPS[name]}
        self.studies = {
            one.task: Study(out, key, one, sparsities=[SPARSITY]) for key, one in workloads.items()
        }
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


MEASURES = (  # heading, what of a run, which result, factor and digits
    ("loss after its own stage", learnt, "test", 1, 3),
    ("loss after the last stage", final, "test", 1, 3),
    ("growth of earlier tasks' loss", forgotten, "test", 1, 3),
    ("score after its own stage (%)", learnt, "score", 100, 1),
    ("score after the last stage (%)", final, "score", 100, 1),
)
Lines = list[list[str]]


def summary(records: Sequence[Record], order: str) -> Lines:
    """Every way at its best rate: means over tasks and seeds, losses in nats per token."""
    lines = [["way", "lr", *(name for name, *_ in MEASURES), "own text, nats per byte", "seeds"]]
    for way, setting in bests(records, order).items():
        cells = [shown(setting.values(what, key), *how) for _, what, key, *how in MEASURES]
        own = shown([run["stages"][-1]["own"] for run in setting.runs], 1, 4)
        lines.append([way, f"{setting.lr:g}", *cells, own, str(len(setting.runs))])
    return lines


def by_task(records: Sequence[Record], order: str) -> Lines:
    """Loss, and in brackets the score, of every task after its own stage and after the last."""
    lines: Lines = []
    for way, setting in bests(records, order).items():
        tasks = setting.runs[0]["tasks"]
        lines = lines or [
            ["way", *(f"{task}, {when}" for task in tasks for when in ("own stage", "last stage"))]
        ]
        places = [(at, task) for own, task in enumerate(tasks) for at in (own, -1)]
        lines.append([way, *(_both(setting.runs, at, task) for at, task in places)])
    return lines


def _both(runs: Sequence[Record], stage: int, task: str) -> str:
    """A cell: test loss and score of a task after a stage."""
    found = [run["stages"][stage]["tasks"][task] for run in runs]
    loss = shown([one["test"] for one in found])
    return f"{loss} ({shown([one['score'] for one in found], 100, 1)})" if "score" in found[0] else loss


def every_rate(records: Sequence[Record], order: str) -> Lines:
    """Every way at every rate: the points of the figure."""
    lines = [["way", "lr", *(name for name, *_ in MEASURES[:3])]]
    for (own, way), found in settings(records).items():
        if own == order and len(found) > 1:
            for setting in sorted(found, key=lambda one: one.lr):
                cells = [shown(setting.values(what, key), *how) for _, what, key, *how in MEASURES[:3]]
                lines.append([way, f"{setting.lr:g}", *cells])
    return lines


def bests(records: Sequence[Record], order: str) -> dict[str, Setting]:
    """Way -> its setting with the least validation loss of all tasks after the last stage."""
    return {
        way: min(found, key=lambda setting: fmean(setting.values(final, "validation")))
        for (own, way), found in settings(records).items()
        if own == order
    }


def orders(records: Sequence[Record]) -> list[str]:
    """Those that there are results of."""
    return list(dict.fromkeys(order for order, _ in settings(records)))


def draw(found: Mapping[str, Sequence[Record]]) -> Figure:
    """A panel per group and order: what earlier tasks lose against what is learnt, over learning rates."""
    panels = [(name, order) for name, records in found.items() for order in orders(records)]
    with figure_at(None, 6.4, 5.2 * len(panels), "") as figure:
        for axes, (name, order) in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
        ):
            _panel(axes, {way: own for (one, way), own in settings(found[name]).items() if one == order})
            axes.set(title=f"{name}, {order} order", xlabel="loss after its own stage, mean over tasks")
            axes.set_ylabel("growth of earlier tasks' loss")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _panel(axes: Axes, ways: Mapping[str, Sequence[Setting]]) -> None:
    for number, (way, found) in enumerate(ways.items()):
        ordered = sorted(found, key=lambda setting: setting.lr)
        points = [
            (fmean(one.values(learnt, "test")), fmean(one.values(forgotten, "test"))) for one in ordered
        ]
        looks: dict[str, Any] = {
            "color": PALETTE[number % len(PALETTE)],
            "marker": MARKERS[number // len(PALETTE)],
        }
        axes.plot(*zip(*points, strict=True), markersize=5, label=way, **looks)


ASKED = """A model learns three tasks one after the other. How much of the earlier ones is lost, against how
well the later ones are learnt? LoTTO gives every task entries of its own, so that what a task has changed is
never changed again; but the model reads all its weights, and its behaviour can change all the same. What
keeps it, and what does that cost?"""
MEASURED = f"""In the way "LoTA, overlapping" each mask is drawn without regard to the others; "random masks"
share no entry; LoRA is merged after each task. Masks keep a tenth of the entries each, LoRA has about as
many. Of each way the rate is chosen that has the least validation loss, over all tasks after the last stage,
means over the seeds. Ways named "LoTTO, ..." add one thing to LoTTO, at LoTTO's rate: replay of a share of
the earlier tasks' training rows; L2-SP, a pull of each trained entry to the value that it starts from, of
that strength; EWC, the same weighted by how much the entry matters to earlier tasks (squared gradients of 64
rows of each); "avoid", masks that pass over such entries; fewer entries for later tasks. Each task has
{SIZES["n_examples"]} training rows and {SIZES["n_test"]} test rows, the first {SIZES["n_scored"]} of which
are scored."""


def report(out: Path) -> str:
    """Write table, figure and page of what is there; return the Markdown."""
    found = {name: records for name, records in read_cells(out).items() if settings(records)}
    if not found:
        sys.exit(f"{out} has no result of this study: run it first")
    results = [
        section
        for name, records in found.items()
        for order in orders(records)
        for section in (
            Section(f"{name}, {order} order", items=facts(records, order)),
            *study_sections(
                [
                    Table("Every way at its best rate", summary(records, order)),
                    Table(
                        "Task by task",
                        by_task(records, order),
                        "Test loss in nats per token, score in brackets.",
                    ),
                    Table("Every rate", every_rate(records, order), "The points of the figure."),
                ]
            ),
        )
    ]
    figure = draw(found)
    pictures = [
        Section("Learning against forgetting", figure=figure, alt="earlier tasks' loss against learning")
    ]
    shared = SHARED.partition("\n\n")[0]
    about = about_sections(ASKED, MEASURED, shared)
    return write_report(out, "sequences", "Tasks one after the other", about, [*pictures, *results], figure)


def facts(records: Sequence[Record], order: str) -> list[str]:
    """What the results are of."""
    run = next(record for record in records if record["cell"].get("order") == order)
    seeds = sorted({record["cell"]["seed"] for record in records if record["cell"]["part"] == PART})
    return [
        f"Tasks in their order: {', '.join(run['tasks'])}.",
        f"SHA-256 of the base's weights: {run['base']}.",
        f"Seeds: {', '.join(map(str, seeds))}.",
    ]


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
