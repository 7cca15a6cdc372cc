"""Three tasks merged into one model: full fine-tuning's vectors against LoTA's, every rule tuned alike.

    OMP_NUM_THREADS=1 python -m scripts.merge_study --groups "real tasks" "toy tasks"

Each task is learnt alone by full fine-tuning, by full fine-tuning of attention and MLP, by LoTA, and by LoTA
under masks that leave out what the masks of earlier tasks keep, each at the rate that validation rows choose.
The numbers of every rule (factor, density, a weight per task) are those of one grid (scripts/merge_grid.py)
that have the least loss on validation rows, for the models of a seed that is not reported. With them the
models of the other seeds are merged and measured on test rows and on the base's own text. Merges are those of
merge_models.py, bit for bit, but in memory. Goes on where it was interrupted; shares rates, masks and
calibrations with the other studies of its folder. Writes merging.md, merging.png and merging.html.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from lota.evaluate.loglik import Request
from lota.masks import Mask
from lota.models.loading import load_model
from lota.places import holding
from lota.share.hf_weights import in_order, open_folder
from lota.share.merge.aligned import align
from lota.share.merge.inputs import open_vectors
from lota.share.merge.rules import MergeRule, make_rule
from lota.share.merge.statistics import VectorStatistics
from scripts import merge_report
from scripts.cells import Cells, Record
from scripts.merge_grid import (
    FOLDER,
    KINDS,
    LOTA,
    RULES,
    WEIGHTED,
    Setting,
    coordinate_search,
    grid,
    group_key,
    members_of,
)
from scripts.methods import DENSE, SCOPE, Method
from scripts.study import RATE_SEED, Study, nats_per_token
from scripts.study_command import run_study, study_parser
from scripts.workloads import GROUPS, Workload


class Tuned(NamedTuple):
    """A task learnt alone."""

    folder: Path  # of its checkpoint
    lr: float


Models = Mapping[tuple[str, int], Sequence[Tuned]]  # kind and seed -> a model per task


# Tasks learnt alone


def method_of(kind: str, earlier: Sequence[Study], seed: int) -> Method:
    """How a kind of vector is learnt after those of earlier tasks; full fine-tuning is a calibration."""
    if kind == SCOPE.name:
        return SCOPE
    if kind == LOTA.name or not earlier:
        return LOTA
    masks = [study.mask(method_of(kind, earlier[:i], seed), seed) for i, study in enumerate(earlier)]
    others = " and ".join(f"{study.name} {study.sizes}" for study in earlier)
    return replace(LOTA, name=f"LoTA without {others}", rule={"protect": [Mask.load(mask) for mask in masks]})


def learn(study: Study, earlier: Sequence[Study], kind: str, seed: int) -> Tuned:
    """The model of one task, at the rate that validation rows have chosen."""
    if kind == DENSE.name:
        return Tuned(study.calibration(seed), study.rate(DENSE))
    method = method_of(kind, earlier, seed)
    lr = study.rate(method_of(kind, earlier, RATE_SEED))
    name = re.sub(r"\W+", "_", f"{method.name} {seed}")
    cell = {"part": "kept", **method.key, "seed": seed, "lr": lr}
    return Tuned(study.kept(name, lambda: study.config(method, seed, lr), **cell), lr)


# Merges in memory


class Vectors:
    """Task vectors of one base, in memory, to be merged into one model again and again."""

    def __init__(self, base: Path, tuned: Sequence[Path], model: PreTrainedModel):
        source, _ = open_folder(base)
        vectors, _ = open_vectors(tuned, source)
        self.model, self.statistics = model, VectorStatistics([vector.id for vector in vectors])
        self.tensors = {}
        for name in (name for unit in in_order(source) for name in unit.parameters):
            value = source.read(name)
            aligned = align([vector.entries(name, value) for vector in vectors], value.numel())
            self.statistics.add(aligned.vectors, value.numel())
            self.tensors[name] = value, aligned

    @torch.no_grad()
    def merge(self, rule: MergeRule) -> None:
        """Give the model the merged weights, as if it had loaded what merge_models.py writes."""
        generator = rule.generator()
        for name, (value, aligned) in self.tensors.items():
            merged = value.clone()
            aligned.merge_(merged, rule, generator)
            self.model.get_parameter(name).copy_(merged)


class Merging:
    """All merges of one group of tasks."""

    def __init__(self, out: Path, name: str, members: Sequence[Study], models: Models):
        self.members, self.models, self.first = members, models, members[0]
        self.cells = Cells(out / FOLDER / f"{name}.jsonl")
        self.sizes = group_key([study.sizes for study in members])
        self.model = load_model(self.first.folder, tokenizer=self.first.tokenizer).eval()
        self.requests: dict[tuple[str, str], list[Request]] = {}
        self.loaded: tuple[Sequence[Tuned], Vectors] | None = None

    def vectors(self, tuned: Sequence[Tuned]) -> Vectors:
        """The last ones stay in memory."""
        if self.loaded is None or self.loaded[0] != tuned:
            self.loaded = None
            self.loaded = tuned, Vectors(self.first.folder, [one.folder for one in tuned], self.model)
        return self.loaded[1]

    def nats(self, study: Study, split: str) -> float:
        """Loss of the model as it is on one task's rows, which are tokenised once."""
        key = study.name, split
        if key not in self.requests:
            self.requests[key] = study.requests(study.tokenizer, study.rows(split))
        return nats_per_token(self.model, self.requests[key])

    def tested(self, members: Sequence[Study]) -> Record:
        """Task -> test loss and score of the model as it is; its loss on the base's own text."""
        nats = {study.name: self.nats(study, "test") for study in members}
        scored = [study for study in members if study.workload.n_scored]
        scores = {study.name: study.score(self.model, study.tokenizer) for study in scored}
        return {"nats": nats, "scores": scores, "own": self.first.own(self.model, self.first.tokenizer)}

    def _once(self, result: Callable[[], Record], **cell: Any) -> Record:
        """A result by what it is of, with its seconds."""
        cell["sizes"] = self.sizes
        start = time.perf_counter()
        return self.cells.get(**cell) or self.cells.add(
            {**result(), "seconds": time.perf_counter() - start}, **cell
        )

    def loss(self, kind: str, setting: Setting) -> float:
        """On validation rows, in nats per token, mean of the tasks, of the models that choose."""

        def result() -> Record:
            tuned = self.models[kind, RATE_SEED]
            self.vectors(tuned).merge(setting.made(len(tuned), RATE_SEED))
            nats = {study.name: self.nats(study, "validation") for study in self.members}
            return {"nats": nats, "loss": fmean(nats.values())}

        return self._once(result, part="tuning", vectors=kind, **setting.key)["loss"]

    def choose(self, kind: str, rule: str) -> Setting:
        """The numbers with the least loss on validation rows."""
        loss = partial(self.loss, kind)
        if rule == WEIGHTED:
            return coordinate_search(self.choose(kind, "task_arithmetic"), len(self.members), loss)
        return min(grid(rule), key=loss)

    def merged(self, kind: str, setting: Setting, seed: int) -> Record:
        """A merge on test rows and on the base's own text."""

        def result() -> Record:
            tuned = self.models[kind, seed]
            self.vectors(tuned).merge(setting.made(len(tuned), seed))
            return self.tested(self.members)

        return self._once(result, part="merged", vectors=kind, **setting.key, seed=seed)

    def alone(self, kind: str, number: int, seed: int) -> Record:
        """One task's model on this task, its weights rounded to the base's dtype as those of merges are."""
        member, tuned = self.members[number], self.models[kind, seed][number]

        def result() -> Record:
            Vectors(self.first.folder, [tuned.folder], self.model).merge(make_rule("sum", 1))
            return {**self.tested([member]), "lr": tuned.lr}

        return self._once(result, part="alone", vectors=kind, task=member.name, seed=seed)

    def base(self) -> Record:
        """The base itself, as it has been loaded."""

        def result() -> Record:
            model = load_model(self.first.folder, tokenizer=self.first.tokenizer)
            self.model.load_state_dict(model.state_dict())
            about = {"base": self.first.base_hash, "weights": sum(p.numel() for p in model.parameters())}
            return {**self.tested(self.members), **about}

        return self._once(result, part="base")

    def common(self, kind: str, seed: int) -> Record:
        """What the vectors share, pair by pair, and their lengths."""

        def result() -> Record:
            found = self.vectors(self.models[kind, seed]).statistics.to_dict()
            return {"pairs": found["pairs"], "norms": [vector["norm"] for vector in found["vectors"]]}

        return self._once(result, part="common", vectors=kind, seed=seed)


def run(merging: Merging, seeds: Sequence[int]) -> None:
    """Choose, then measure."""
    merging.base()
    for kind in KINDS:
        chosen = [merging.choose(kind, rule) for rule in RULES]
        for seed in seeds:
            for number in range(len(merging.members)):
                merging.alone(kind, number, seed)
            merging.common(kind, seed)
            for setting in chosen:
                merging.merged(kind, setting, seed)


def study_group(args: argparse.Namespace, name: str, members: Mapping[str, Workload]) -> None:
    """Learn the tasks of a group, merge and measure. The files of single tasks are held while they learn."""
    studies: list[Study] = []
    models: dict[tuple[str, int], list[Tuned]] = {}

    def learn_all(study: Study, args: argparse.Namespace) -> None:
        for kind, seed in product(KINDS, (RATE_SEED, *args.seeds)):
            models.setdefault((kind, seed), []).append(learn(study, studies, kind, seed))
        studies.append(study)

    args.workloads = list(members)
    run_study(args, learn_all, workloads=members, smoke=members)
    out = args.out.resolve()
    (out / FOLDER).mkdir(exist_ok=True)
    with holding(out / FOLDER / f"{name}.jsonl"):
        run(Merging(out, name, studies, models), args.seeds)


def main(arguments: list[str] | None = None) -> None:
    args = study_parser(__doc__, GROUPS, list(GROUPS), option="--groups").parse_args(arguments)
    if not args.report:
        for name in ["smoke"] if args.smoke else args.groups:
            study_group(args, name, members_of(name))
    print(merge_report.write(args.out))


if __name__ == "__main__":
    main()
