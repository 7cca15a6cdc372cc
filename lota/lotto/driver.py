"""Task after task into one model, each in weights that no earlier one keeps (LoTTO, arXiv 2406.16797).

For each task: calibrate (dense, what earlier tasks keep frozen), extract a mask within what is free, adapt
from the result of the task before, evaluate on all tasks. The other methods leave out what they do not have.

    <run>/config.yaml            the settings            <run>/ledger.json, .txt      lota/lotto/ledger.py
    <run>/base/                  results of the base     <run>/forgetting.json, ...   lota/lotto/forgetting.py
    <run>/1_<task>/calibrate/    a training run          <run>/1_<task>/0.9_mask.pt     its mask
    <run>/1_<task>/adapt/        a training run          <run>/1_<task>/held_out.json   results after it
    <run>/2_<task>/importance.pt what matters to earlier tasks of what it trains (retain.ewc)
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from lota.config import Config
from lota.data.task import FindTask
from lota.distributed.processes import ALONE, Processes
from lota.lotto.check import Checked, check
from lota.lotto.config import LottoConfig
from lota.lotto.forgetting import table, write_results
from lota.lotto.held_out import Measured, measure_all
from lota.lotto.ledger import Entry, Ledger, values_hash
from lota.lotto.retain import Importance
from lota.lotto.together import Leader, Train
from lota.masks import Mask
from lota.masks.extract.select import extract
from lota.models.hashing import config_key, remembered_hash, tokenizer_key
from lota.models.hub import is_hub_reference
from lota.models.weights import open_weights
from lota.storage import content_key, set_aside
from lota.train.checkpoint import newest_checkpoint, weights_of
from lota.train.run_model import load_run_tokenizer

logger = logging.getLogger(__name__)
CALIBRATE, ADAPT = "calibrate", "adapt"


@dataclass(frozen=True)
class Stage:
    """One task of the sequence."""

    number: int  # from 1
    task: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.number}_{self.task}"


class Lotto:
    """A sequence of tasks: `Lotto(config, train, find_task).run()`, or `opened` and `learnt` without results.

    find_task: the task of a name. processes: of which this is the first one, and the others `follow`.
    Raises ValueError for an invalid sequence before anything is trained or written.
    """

    def __init__(self, config: LottoConfig, train: Train, find_task: FindTask, processes: Processes = ALONE):
        for line in config.unused():
            logger.info("not used here: %s", line)
        self.config, self.leader, self.find_task = config, Leader(config, train, processes), find_task
        self.stages = [Stage(at, task) for at, task in enumerate(config.sequence, start=1)]
        self.checked: Checked = check(config, find_task)
        self.folder = config.run_dir.absolute()

    def run(self) -> dict[str, Any]:
        """Learn what is not learnt yet; returns the content of forgetting.json."""
        with self.opened():
            base = self.measure(self.folder / "base", None)
            results = []
            for at, (stage, weights) in enumerate(self.learnt()):
                found = self.measure(self.folder / stage.name, weights)
                scores = {task: one.score.value for task, one in found.items() if one.score is not None}
                self.ledger.measured(at, scores, {task: one.loss.value for task, one in found.items()})
                results.append(found)
            self.ledger.write_table()
            content = write_results(self.folder, self.config.sequence, results, base)
        logger.info("\n%s\n\n%s", self.ledger.table(), table(content))
        return content

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The run folder, held; at the end the other processes may go."""
        with self.checked.folder:
            self.ledger = Ledger(self.folder)
            yield
        self.leader.end()

    def learnt(self) -> Iterator[tuple[Stage, Path]]:
        """Every stage and its policy.pt, once it is learnt, in the run folder that is `opened`. Nothing is
        measured.
        """
        for at, stage in enumerate(self.stages):
            if at == len(self.ledger.entries):
                logger.info("\n%d of %d: %s", stage.number, len(self.stages), stage.task)
                self.learn(stage)
                self.checked.folder.keep()
            yield stage, self.weights(stage)

    # One stage

    def learn(self, stage: Stage) -> None:
        """Calibrate, extract, adapt; the ledger's new entry ends the stage."""
        before = self.weights(self.stages[stage.number - 2]) if stage.number > 1 else None
        importance = self.importance(stage, before)
        mask_path = self.mask(stage, before, importance)
        run = self.config.adaptation(
            stage.task,
            **self.place(stage, ADAPT, before),
            mask_path=None if mask_path is None else str(mask_path),
            protect_masks=self.protected(stage),
        )
        if run.ewc and importance is not None:
            importance.store(run, None if mask_path is None else Mask.load(mask_path))
        del importance  # fp32 of the whole scope
        self.start(run)
        self.ledger.add(self.entry(stage, mask_path, before))

    def importance(self, stage: Stage, before: Path | None) -> Importance | None:
        """What matters to the tasks before a stage, if anything asks for it; not computed yet."""
        config, model = self.config, self.checked.model
        if before is None or not config.retain.by_importance:
            return None
        names = list(dict(model.named_parameters()))
        if config.learning.saliency is not None:
            own = self.checked.custom.get(stage.task)
            mask = self.checked.everything if own is None else Mask.load(own)
            names = [n for n in names if n in self.checked.everything or (n in mask and mask.kept(n))]
        device = self.leader.processes.device
        return Importance(config, self.find_task, stage.task, before, model, names, device)

    def mask(self, stage: Stage, before: Path | None, importance: Importance | None) -> Path | None:
        """Returns the task's mask file, given or extracted from what no other task keeps; None: no mask."""
        config, method = self.config, self.config.learning
        if method.saliency is None:
            return None
        if stage.task in self.checked.custom:
            return Path(config.own(stage.task, "mask_path"))
        sparsity = config.own(stage.task, "sparsity")
        path = self.folder / stage.name / f"{sparsity:g}_mask.pt"
        start = before or config.model.archive or config.model.name_or_path
        if path.is_file():
            made_of = Mask.load(path, mapped=True).meta.get("base_hash")
            if made_of is None or made_of == remembered_hash(start, self.checked.model):
                return path
            logger.warning("%s was made of another model and is now %s", path, set_aside(path).name)
        tuned = None
        if method.calibrated:
            place = self.place(stage, CALIBRATE, before)
            run = config.calibration(stage.task, **place, protect_masks=self.protected(stage))
            tuned = weights_of(self.start(run))
        mask = extract(
            start,
            tuned,
            [sparsity],
            scope=config.model.scope,
            score=method.saliency,
            seed=config.seed,
            protect=self.protected(stage),
            granularity=config.granularity,
            block=config.block,
            avoid=importance.whole if importance is not None and config.retain.avoid else None,
            avoid_strength=config.retain.avoid,
            model=config.model.name_or_path,
        )[sparsity]
        mask.save(path)
        logger.info("%s: %s of %s entries kept", path, f"{mask.n_kept:,}", f"{mask.n_total:,}")
        return path

    def start(self, config: Config) -> Path:
        """Train to the end; returns the last checkpoint."""
        folder = self.leader.train(config)
        assert folder is not None  # of a debug run only, which a sequence refuses
        return folder

    def place(self, stage: Stage, part: str, before: Path | None) -> dict[str, Any]:
        """Settings of a stage's run: its folder, and the weights that it starts from."""
        config = self.config
        place = {"exp_name": f"{config.exp_name}/{stage.name}/{part}", "local_dirs": [str(config.cache_dir)]}
        return place | ({"model": {"archive": str(before)}} if before else {})

    def protected(self, stage: Stage) -> list[str]:
        """Mask files whose entries a stage may not touch: yours, those of earlier tasks, and those given for
        later ones.
        """
        found = list(self.config.protect_masks)
        if self.config.learning.protects:
            found += [self.mask_file(entry.mask) for entry in self.ledger.entries if entry.mask]
            found += [str(path) for task, path in self.checked.custom.items() if task != stage.task]
        return list(dict.fromkeys(found))

    # What stands in the ledger

    def entry(self, stage: Stage, mask_path: Path | None, before: Path | None) -> Entry:
        """Of a stage that has been adapted, without its results."""
        mask = self.mask_of(mask_path)
        earlier = {entry.name: self.mask_of(entry.mask) for entry in self.ledger.entries}

        def hashes(policy: Path | None) -> dict[str, str]:
            if policy is None or not earlier:
                return {}
            source = open_weights(policy, self.checked.model)
            return {task: values_hash(source, kept) for task, kept in earlier.items()}

        return Entry(
            name=stage.task,
            mask=None if mask_path is None else _relative(mask_path, self.folder),
            kept=mask.n_kept,
            free_after=reduce(Mask.minus, [mask, *earlier.values()], self.checked.everything).n_kept,
            overlap={task: mask.overlap(kept) for task, kept in earlier.items()},
            hash_before=hashes(before),
            hash_after=hashes(self.weights(stage)),
            scores={},
            losses={},
        )

    def mask_of(self, path: Path | str | None) -> Mask:
        """What a task may change; without a mask file, all that dense training may."""
        return self.checked.everything if path is None else Mask.load(self.mask_file(path))

    def mask_file(self, path: Path | str) -> str:
        """What the ledger's name of a mask means: a file of this folder, another one, or one of the hub."""
        return str(path) if is_hub_reference(path) else str(self.folder / path)

    # Models

    def weights(self, stage: Stage) -> Path:
        """Of a stage's last checkpoint."""
        run = self.folder / stage.name / ADAPT
        found = newest_checkpoint(run)
        if found is None or not found[1]["progress"]["finished"]:
            raise ValueError(
                f"{run} has lost its last checkpoint, which the stages after it need: put it back, or start "
                "anew with overwrite=true"
            )
        return weights_of(found[0])

    def measure(self, folder: Path, policy: Path | None) -> dict[str, Measured]:
        """Results on every task of the model in a policy.pt; None: of the base."""
        model = self.config.model
        weights = remembered_hash(policy or model.archive or model.name_or_path, self.checked.model)
        key = content_key([weights, model.policy_dtype, model.pad_token, self.prompting])
        return measure_all(self.checked.held_out, lambda: self.leader.opened(policy), folder, key)

    @functools.cached_property
    def prompting(self) -> list[str]:
        """Hashes of what decides a completion besides the weights."""
        tokenizer = load_run_tokenizer(self.config)
        template = content_key(tokenizer.chat_template)
        return [tokenizer_key(tokenizer), template, config_key(self.checked.model.config)]


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
