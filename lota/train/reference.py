"""Log-probabilities under the reference of a preference loss, in one of three ways that give the same.

swap: the policy itself, its trained entries at their starting values for the time of a forward pass; it costs
a compact copy of those values (with LoRA nothing: its matrices are left out).
model: a second model.
precomputed: log-probabilities that were computed before the first step and are stored on disk.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import Config
from lota.data.batches import Batch, Encoded, Example, batch_order, encoded_hash_and_lengths
from lota.distributed.processes import Processes
from lota.masks import Mask
from lota.models.hashing import config_key, remembered_hash
from lota.models.loading import dtype_of, mean_row
from lota.models.opening import embedding_rows
from lota.models.policy import model_folder
from lota.models.scope import load_config
from lota.optim.masked import MaskedOptimizer
from lota.storage import atomic_path, content_key, read_keyed, save_tensors
from lota.train import lora
from lota.train.interrupt import StopBetweenSteps
from lota.train.losses import response_logps
from lota.train.run_folder import Resumable
from lota.train.saved_model import Source

FOLDER = "reference_logps"  # of the cache folder: stored log-probabilities
WRITE_EVERY = 300.0  # seconds between two writes of log-probabilities that are being computed
logger = logging.getLogger(__name__)


class Reference(Protocol):
    """Log-probability of each row's response, (rows,) in nats, without a graph."""

    def __call__(self, batch: Batch) -> Tensor: ...


class Policy(Protocol):
    """What a reference needs of the objective: rows and batches of examples, log-probabilities of now."""

    def rows(self, example: Example) -> Sequence[Encoded]: ...
    def batch(self, examples: Sequence[Example]) -> Batch: ...
    def logps(self, batch: Batch) -> tuple[Tensor, Tensor]: ...


class TrainingData(Protocol):
    """What a reference needs of the trainer's `Prepared`; see there."""

    train: list[Example]
    held_out: list[Example]
    tokenizer: PreTrainedTokenizerBase
    skeleton: PreTrainedModel
    mask: Mask | None
    lengths: list[int] | None
    resumable: Resumable | None


class LoadedTrainer(Protocol):
    """What a reference needs of the trainer, whose model is loaded."""

    config: Config
    model: PreTrainedModel
    optimizer: MaskedOptimizer
    device: torch.device
    stop: StopBetweenSteps
    processes: Processes

    @property
    def data(self) -> TrainingData: ...
    def precision(self) -> contextlib.AbstractContextManager[object]: ...
    def base(self) -> Source: ...
    def load_model(
        self, archive: str | Path | None, dtype: torch.dtype, key: str = ...
    ) -> PreTrainedModel: ...


def make_reference(trainer: LoadedTrainer, policy: Policy) -> Reference:
    """What `model.reference` asks for; if it is null, swap with a mask or LoRA, else model."""
    settings = trainer.config.model
    compact = trainer.data.mask is not None or trainer.config.adapter.name == "lora"
    own = settings.reference_archive is None
    kind = settings.reference or ("swap" if own and compact else "model")
    logger.info("reference of the loss: %s", kind)
    if kind == "swap" and settings.reference is None and settings.reference_dtype is not None:
        logger.info(
            "not used here: model.reference_dtype=%s (the reference is the policy)", settings.reference_dtype
        )
    return REFERENCES[kind](trainer, policy)


# The policy at its start


class SwappedReference:
    """The policy set back to its start for the time of a forward pass: trained entries swapped, LoRA off."""

    def __init__(self, trainer: LoadedTrainer, policy: Policy):
        self.policy = policy
        if trainer.config.adapter.name == "lora":
            self.set_back = partial(lora.disabled, trainer.model)
        else:
            starts = starting_values(trainer.optimizer, trainer.base() if trainer.data.resumable else None)
            self.set_back = partial(swapped, trainer.optimizer, starts)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        with self.set_back():
            return self.policy.logps(batch)[0]


@contextlib.contextmanager
def swapped(optimizer: MaskedOptimizer, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Other values in the trained entries inside the block, and afterwards, whatever happens, the very bits
    of before.

    values: (kept,) per parameter, in its dtype. Parameters are swapped, not fp32 masters. Only a compact copy
    of what was there is held.
    """
    present: dict[nn.Parameter, Tensor] = {}
    try:
        with torch.no_grad():
            for p, other in values.items():
                present[p] = _copy_of_kept(
                    optimizer, p
                )  # before the write: an error in between loses nothing
                optimizer.write(p, other)
        yield
    finally:
        with torch.no_grad():
            for p, before in present.items():
                optimizer.write(p, before)


@torch.no_grad()
def starting_values(optimizer: MaskedOptimizer, base: Source | None = None) -> dict[nn.Parameter, Tensor]:
    """Values that each parameter's trained entries started from, (kept,) in the parameter's dtype.

    base: the weights to read them from for a run that is continued; None: they are those of now.
    """
    if base is None:
        return {p: _copy_of_kept(optimizer, p) for p in optimizer.names}
    starts = {}
    for p, name in optimizer.names.items():
        whole = base.read(name).to(p.dtype)
        if whole.shape[0] < p.shape[0]:  # a vocabulary grown by a pad token
            added = mean_row(whole).expand(p.shape[0] - whole.shape[0], *whole.shape[1:])
            whole = torch.cat([whole, added])
        starts[p] = optimizer.kept[p].gather(whole.to(p.device))
    return starts


def _copy_of_kept(optimizer: MaskedOptimizer, p: nn.Parameter) -> Tensor:
    values = optimizer.working_values(p)
    return values.clone() if values.data_ptr() == p.data_ptr() else values


# A second model


class ModelReference:
    """A second model, by default in the dtype of the policy: in a narrower one its rounding is a reward."""

    def __init__(self, trainer: LoadedTrainer, policy: Policy):
        config = trainer.config
        archive = config.model.reference_archive or config.model.archive
        dtype = _model_dtype(trainer)
        key = "reference_archive" if config.model.reference_archive else "archive"
        self.model = trainer.load_model(archive, dtype, key)
        self.model.requires_grad_(False)
        self.precision = trainer.precision

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return response_logps(self.model, batch, self.precision())[0]


def _model_dtype(trainer: LoadedTrainer) -> torch.dtype:
    name = trainer.config.model.reference_dtype
    return trainer.model.dtype if name is None else dtype_of(name)


# Stored values


class PrecomputedReference:
    """Log-probabilities of every preference that the run sees, from disk or computed before the first step.

    They are computed by the policy as it was at its start, or, with model.reference_archive, by a model that
    is loaded for that and then gone.
    """

    def __init__(self, trainer: LoadedTrainer, policy: Policy):
        self.trainer, self.policy = trainer, policy
        self.computes: Reference | None = None
        data = trainer.data
        order = batch_order(trainer.config, len(data.train), data.lengths)
        seen = sorted({i for batch in order for i in batch.rows})
        model = self._model_key()
        self.logps: dict[Example, list[float]] = {}  # chosen, rejected
        for what, examples in ("training", [data.train[i] for i in seen]), ("held-out", data.held_out):
            if examples:
                values = self._read_or_compute(what, examples, model)
                self.logps |= zip(examples, values.tolist(), strict=True)
        self.computes = None  # a model that was loaded for it can go

    def __call__(self, batch: Batch) -> Tensor:
        values = torch.tensor([self.logps[example] for example in batch.examples])  # (preferences, 2)
        return values.t().flatten().to(batch.input_ids.device)  # all chosen, then all rejected

    def _model_key(self) -> dict[str, Any]:
        """Weights and config on disk, rows of the vocabulary, and what the forward pass computes in."""
        settings, model = self.trainer.config.model, self.trainer.model
        given, start = settings.reference_archive, settings.archive or settings.name_or_path
        folder = model_folder(settings.name_or_path, given or settings.archive)
        return {
            "model": remembered_hash(given or start, None if given else self.trainer.data.skeleton),
            "model_config": config_key(load_config(folder)),
            "vocabulary": embedding_rows(model),
            "dtype": str(model.dtype if given is None else _model_dtype(self.trainer)),
            "mixed_precision": settings.fsdp_policy_mp,
        }

    def _read_or_compute(self, what: str, examples: Sequence[Example], model: dict[str, Any]) -> Tensor:
        """Returns (preferences, 2) fp32, chosen and rejected."""
        config = self.trainer.config
        data, lengths = encoded_hash_and_lengths(map(self.policy.rows, examples))
        cut = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
        file = LogpsFile(config.cache_dir / FOLDER, {"data": data, **cut, **model})
        together = self.trainer.processes
        logps = together.broadcast(file.read(len(examples)) if together.first else torch.empty(0))
        missing = logps.isnan().any(dim=1).nonzero().flatten().tolist()
        if len(missing) < len(examples):
            n = len(examples) - len(missing)
            logger.info("reference: %d of %d %s pairs read from %s", n, len(examples), what, file.path)
        if missing:
            missing.sort(key=lambda i: -lengths[i])  # similar lengths: little padding
            try:
                self._compute(what, examples, missing, logps, file)
            finally:  # a run that was stopped here goes on from there
                self._write(file, logps)
            logger.info("reference: %d %s pairs stored in %s", len(missing), what, file.path)
        return logps

    def _compute(
        self, what: str, examples: Sequence[Example], missing: list[int], logps: Tensor, file: LogpsFile
    ) -> None:
        """Fill in the rows of `logps` that are missing, writing the file now and then."""
        self.computes = self.computes or self._load()
        together, written = self.trainer.processes, time.monotonic()
        stretch = self.trainer.config.eval_batch_size * together.count
        name, hidden = f"reference, {what}", not together.first
        with tqdm(total=len(missing), unit="pair", desc=name, dynamic_ncols=True, disable=hidden) as bar:
            for first in range(0, len(missing), stretch):
                chosen = missing[first : first + stretch]
                own = together.share(chosen)
                # one without a share computes what it does not need, as parts of the model may be its
                values = self._values([examples[i] for i in own or chosen[:1]])[: len(own)]
                for indices, found in together.gather((own, values)):
                    logps[indices] = found
                bar.update(len(chosen))
                self.trainer.stop.check()
                if time.monotonic() - written > WRITE_EVERY:
                    self._write(file, logps)
                    written = time.monotonic()

    def _values(self, examples: Sequence[Example]) -> Tensor:
        """(preferences, 2) fp32, chosen and rejected."""
        assert self.computes is not None
        values = self.computes(self.policy.batch(examples)).float().cpu()
        if not values.isfinite().all():
            raise ValueError(
                "the reference gives log-probabilities that are not finite; check that its checkpoint is "
                "complete"
            )
        return values.view(2, -1).t()

    def _write(self, file: LogpsFile, logps: Tensor) -> None:
        if self.trainer.processes.first:
            file.write(logps)

    def _load(self) -> Reference:
        if self.trainer.config.model.reference_archive is not None:
            return ModelReference(self.trainer, self.policy)
        if self.trainer.data.resumable is not None:
            return SwappedReference(self.trainer, self.policy)
        return torch.no_grad()(lambda batch: self.policy.logps(batch)[0])


class LogpsFile:
    """Log-probabilities in a file of `folder` that is read only under the key that it was written with."""

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        self.key = dict(key)
        self.path = folder / f"{content_key(self.key)[:24]}.pt"

    def read(self, n: int) -> Tensor:
        """(n, 2) fp32, chosen and rejected, nan where nothing is stored; what does not fit is set aside."""

        def stored(path: Path) -> tuple[Any, Tensor]:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["logps"].shape != (n, 2):
                raise ValueError(f"it does not hold two numbers for each of {n} pairs")
            return content["key"], content["logps"]

        found = read_keyed(self.path, self.key, stored)
        return torch.full((n, 2), math.nan) if found is None else found

    def write(self, logps: Tensor) -> None:
        with atomic_path(self.path) as temporary:
            save_tensors({"key": self.key, "logps": logps}, temporary)


REFERENCES: dict[str, Callable[[LoadedTrainer, Policy], Reference]] = {
    "swap": SwappedReference,
    "model": ModelReference,
    "precomputed": PrecomputedReference,
}
