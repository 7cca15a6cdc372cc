"""Whole checkpoints: the weights, what a resumed run needs, and the delta to its base.

<run>/config.yaml      resolved settings          <run>/metrics.jsonl   one line per log interval
<run>/versions.json    code, packages, device     <run>/epoch-1/        policy.pt and resume.pt

With save_format=folder a Hugging Face folder stands in the place of policy.pt; trainer=FSDPTrainer adds
optimizer/ (lota/distributed/global_state.py).
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from lota.config import Config
from lota.data.batches import ScheduledBatch
from lota.masks import Mask
from lota.models.policy import is_policy
from lota.optim.masked import MaskedOptimizer
from lota.storage import (
    CHECKSUMS,
    DAMAGED,
    atomic_path,
    read_checksums,
    save_tensors,
    verify_checksum,
    write_checksums,
)
from lota.train.saved_model import Source

POLICY, RESUME, DELTA = "policy.pt", "resume.pt", "delta.safetensors"
CHECKPOINT_NAME = re.compile(r"(epoch|step)-\d+")
logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0  # of the next batch to train on
    batch: int = 0  # that batch's number in its epoch
    step: int = 0  # optimizer steps made
    examples: int = 0  # examples seen
    finished: bool = False
    evaluation_owed: bool = False  # a stop came in the midst of it

    def advance(self, batch: ScheduledBatch, total_steps: int) -> None:
        """A step on that batch was made."""
        last = batch.last_of_epoch
        self.epoch, self.batch = (batch.epoch + 1, 0) if last else (batch.epoch, batch.batch + 1)
        self.step += 1
        self.examples += len(batch.rows)
        self.finished = self.step == total_steps

    def folder_name(self, by_epoch: bool) -> str:
        """epoch-N at the end of an epoch if checkpoints are counted in epochs, else step-<examples>."""
        whole = self.batch == 0 and self.epoch > 0
        return f"epoch-{self.epoch}" if by_epoch and whole else f"step-{self.examples}"


# Weights


def fill_masters(optimizer: MaskedOptimizer, base: Source) -> None:
    """Set the fp32 masters of kept entries to the base's values, which a narrower working copy has rounded.

    Rows that the base does not have (a vocabulary grown by a pad token) stay.
    """
    for p, name in optimizer.names.items():
        state = optimizer.state[p]
        if "master" not in state:
            continue
        values = base.read(name)
        if values.shape != p.shape:
            values = torch.cat([values, p.detach()[len(values) :].to("cpu", values.dtype)])
        state["master"].copy_(optimizer.kept[p].gather(values))


# Random numbers


def random_state() -> dict[str, Any]:
    """State of every generator that a run may draw from, as plain values and tensors."""
    version, numbers, gauss = random.getstate()
    drawn = np.random.get_state(legacy=False)
    keys, position = drawn["state"]["key"], drawn["state"]["pos"]
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            drawn["bit_generator"],
            torch.from_numpy(keys.astype(np.int64)),
            position,
            drawn["has_gauss"],
            drawn["gauss"],
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [torch.cuda.get_rng_state()]
    return state


def own_random_numbers(seed: int, rank: int) -> None:
    """Let each process draw numbers of its own, the first one those of a run in one process."""
    if rank:
        digest = hashlib.sha256(f"{seed}/{rank}".encode()).digest()
        set_seed(int.from_bytes(digest[:4], "little"))


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        states = state["cuda"]  # earlier releases saved those of all devices
        torch.cuda.set_rng_state(states[min(torch.cuda.current_device(), len(states) - 1)])


# Files


def weights_of(checkpoint: Path) -> Path:
    """What holds a checkpoint's weights: its policy.pt, or the folder itself as a Hugging Face folder."""
    policy = checkpoint / POLICY
    return policy if policy.is_file() else checkpoint


def restore(content: dict[str, Any], rank: int = 0) -> Progress:
    """Set random numbers to the content of a resume.pt; returns where the run stood.

    A process that the run did not have before keeps the random numbers that it has.
    """
    states = [content["random"], *content.get("random_of_others", [])]
    if rank < len(states):
        set_random_state(states[rank])
    return Progress(**content["progress"])


def save(
    folder: Path,
    *,
    write_state: Callable[[Path], tuple[dict[str, str], dict[str, Any]]],
    progress: Progress,
    seen: dict[str, str | None],
    random_states: list[dict[str, Any]],
    write_more: Callable[[Path], object],
) -> None:
    """Write weights and resume.pt into `folder`, which appears under its name only when it is whole.

    write_state, write_more: write into the folder, which has a temporary name then; the first one writes the
    weights and returns checksums that are known, and the optimizer's state. seen: hashes of the mask and of
    the data that the run trains on. random_states: of each process.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        sums, optimizer = write_state(temporary)
        resume = {
            "optimizer": optimizer,
            "progress": asdict(progress),
            "random": random_states[0],
            "random_of_others": random_states[1:],
            **seen,
        }
        sums[RESUME] = save_tensors(resume, temporary / RESUME)
        write_more(temporary)
        write_checksums(temporary, sums)


def save_delta(config: Config, mask: Mask | None, checkpoint: Path, name: Path) -> None:
    """Write the delta between the run's base and the weights of `checkpoint`.

    name: what the checkpoint's folder will be called. A base that is no longer what it was when the run
    started is no reason to lose the checkpoint: it is saved without a delta, and the log says why.
    """
    from lota.share.delta.extract import extract  # which needs zstandard; nothing else of training does

    base = config.model.archive or config.model.name_or_path
    try:
        extract(
            base,
            weights_of(checkpoint),
            checkpoint / DELTA,
            mask=mask,
            task=",".join(config.datasets),
            model=config.model.name_or_path if is_policy(base) else None,
            tuned_id=str(name / weights_of(checkpoint).relative_to(checkpoint)),
        )
    except ValueError as error:
        logger.error("%s was not written: %s", name / DELTA, error)


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, content of resume.pt) of the whole checkpoint with most steps; None if there is none.

    One that is damaged, or lacks a file, is passed over with a warning that names what is wrong.
    """
    found = []
    for folder in sorted(run_dir.glob("*-*")) if run_dir.is_dir() else []:
        if not CHECKPOINT_NAME.fullmatch(folder.name):
            continue
        try:
            resume = torch.load(folder / RESUME, map_location="cpu", weights_only=True, mmap=True)
            progress = Progress(**resume["progress"])
        except (FileNotFoundError, *DAMAGED) as error:  # any other OSError may be gone the next time
            _pass_over(folder, f"{RESUME} cannot be read: {str(error)[:200]}")
            continue
        found.append((progress.step, progress.finished, folder, resume))
    for _, _, folder, resume in sorted(found, key=lambda item: item[:2], reverse=True):
        try:
            verify(folder)
        except ValueError as error:
            _pass_over(folder, str(error))
            continue
        return folder, resume
    return None


def _pass_over(folder: Path, why: str) -> None:
    logger.warning("%s is passed over, and the newest whole checkpoint before it is used: %s", folder, why)


def verify(folder: Path) -> None:
    """Raise ValueError unless every file of a checkpoint is there as it was written.

    An older checkpoint has no checksums: it is whole if it has its files.
    """
    sums = read_checksums(folder)
    for name in sums or (POLICY, RESUME):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder / CHECKSUMS} names {name}, which is no file of a checkpoint")
        if name == DELTA and not (folder / name).is_file():
            continue  # nothing is made from it
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if name in sums:
            verify_checksum(folder / name, sums[name])
