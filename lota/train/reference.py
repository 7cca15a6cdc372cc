"""Log-probabilities under the reference of a preference loss, had in one of three ways that give the same.

swap: the policy itself, its trained entries at their starting values for the time of a forward pass; it costs
a compact copy of those values (with LoRA nothing: its matrices are left out).
model: a second model.
precomputed: log-probabilities that were computed before the first step and are stored on disk.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lota.config import Config
from lota.data.batches import Batch, Encoded, Example, batch_order, encoded_hash_and_lengths
from lota.models.hashing import config_key, content_hash
from lota.models.loading import dtype_of, embedding_rows, load_config, load_model, mean_row
from lota.models.policy import model_folder
from lota.models.weights import WeightSource, open_weights
from lota.optim.masked import MaskedOptimizer
from lota.train import lora as adapter
from lota.train.interrupt import StopBetweenSteps
from lota.train.losses import response_logps
from lota.train.reference_cache import FOLDER, LogpsFile

if TYPE_CHECKING:  # which plans masks by an objective's gradients, and so imports this
    from lota.train.prepared import Prepared


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


class Run(Protocol):
    """What a reference needs of the run, whose model is loaded (the trainer is one).

    base: the weights that it started from, on disk. precision: gives the context of a forward pass.
    """

    config: Config
    data: Prepared
    optimizer: MaskedOptimizer
    device: torch.device
    stop: StopBetweenSteps

    def precision(self) -> contextlib.AbstractContextManager: ...

    def base(self) -> WeightSource: ...


def make_reference(run: Run, policy: Policy) -> Reference:
    """What `model.reference` asks for; where it is null, swap with a mask or LoRA, else model."""
    settings = run.config.model
    compact = run.data.mask is not None or run.config.adapter.name == "lora"
    own = settings.reference_archive is None
    kind = settings.reference or ("swap" if own and compact else "model")
    logger.info("reference of the loss: %s", kind)
    if kind == "swap" and settings.reference is None and settings.reference_dtype is not None:
        logger.info(
            "not used here: model.reference_dtype=%s (the reference is the policy)", settings.reference_dtype
        )
    return REFERENCES[kind](run, policy)


class SwappedReference:
    """The policy set back to its start for the time of a forward pass: trained entries swapped, LoRA off."""

    def __init__(self, run: Run, policy: Policy):
        self.policy = policy
        if run.config.adapter.name == "lora":
            self.set_back = partial(adapter.disabled, run.optimizer.model)
        else:
            starts = starting_values(run.optimizer, run.base() if run.data.resumable else None)
            self.set_back = partial(swapped, run.optimizer, starts)

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
                present[p] = _copy_of_kept(optimizer, p)
                optimizer.write(p, other)
        yield
    finally:
        with torch.no_grad():
            for p, before in present.items():
                optimizer.write(p, before)


class ModelReference:
    """A second model, by default in the dtype of the policy: in a narrower one its rounding is a reward."""

    def __init__(self, run: Run, policy: Policy):
        settings = run.config.model
        self.precision = run.precision
        self.model = load_model(
            settings.name_or_path,
            archive=settings.reference_archive or settings.archive,
            dtype=_model_dtype(run),
            device=run.device,
            pad_token=settings.pad_token,
            tokenizer=run.data.tokenizer,
        ).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return response_logps(self.model, batch, self.precision())[0]


class PrecomputedReference:
    """Log-probabilities of every pair that the run sees, from disk or computed before the first step.

    They are computed by the policy as it was at its start, or, with model.reference_archive, by a model that
    is loaded for that and then gone.
    """

    def __init__(self, run: Run, policy: Policy):
        self.run, self.policy = run, policy
        self.by: Reference | None = None
        config, data = run.config, run.data
        planned = {i for *_, rows in batch_order(config, len(data.train), data.lengths) for i in rows}
        model = self._model_key()
        self.logps: dict[Example, list[float]] = {}
        for what, examples in (
            ("training", [data.train[i] for i in sorted(planned)]),
            ("held-out", data.held_out),
        ):
            values = self._read_or_compute(what, examples, model) if examples else torch.empty(0)
            self.logps |= zip(examples, values.tolist(), strict=True)
        self.by = None  # a model that was loaded for it can go

    def __call__(self, batch: Batch) -> Tensor:
        values = torch.tensor([self.logps[example] for example in batch.examples])
        return values.t().flatten().to(batch.input_ids.device)

    def _model_key(self) -> dict[str, Any]:
        """Weights and config on disk, rows of the vocabulary, and what the forward pass computes in."""
        settings, model = self.run.config.model, self.run.optimizer.model
        own = settings.reference_archive is None
        archive = settings.archive if own else settings.reference_archive
        source = self.run.base() if own else open_weights(archive)
        folder = model_folder(settings.name_or_path, archive)
        return {
            "model": content_hash(source),
            "model_config": config_key(load_config(folder)),
            "vocabulary": embedding_rows(model),
            "dtype": str(model.dtype if own else _model_dtype(self.run)),
            "mixed_precision": settings.fsdp_policy_mp,
        }

    def _read_or_compute(self, what: str, examples: Sequence[Example], model: dict[str, Any]) -> Tensor:
        config = self.run.config
        data, lengths = encoded_hash_and_lengths(map(self.policy.rows, examples))
        cut = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
        file = LogpsFile(config.cache_dir / FOLDER, {"data": data, **cut, **model})
        logps = file.read(len(examples))
        missing = logps.isnan().any(dim=1).nonzero().flatten().tolist()
        if len(missing) < len(examples):
            n = len(examples) - len(missing)
            logger.info("reference: %d of %d %s pairs read from %s", n, len(examples), what, file.path)
        if missing:
            missing.sort(key=lambda i: -lengths[i])  # similar lengths: little padding
            try:
                self._compute(what, examples, missing, logps, file)
            finally:  # a run that was stopped here goes on from there
                file.write(logps)
            logger.info("reference: %d %s pairs stored in %s", len(missing), what, file.path)
        return logps

    def _compute(
        self, what: str, examples: Sequence[Example], missing: list[int], logps: Tensor, file: LogpsFile
    ) -> None:
        self.by = self.by or self._computed_by()
        size, written = self.run.config.eval_batch_size, time.monotonic()
        with tqdm(total=len(missing), unit="pair", desc=f"reference, {what}", dynamic_ncols=True) as bar:
            for first in range(0, len(missing), size):
                chosen = missing[first : first + size]
                values = self.by(self.policy.batch([examples[i] for i in chosen])).float().cpu()
                if not values.isfinite().all():
                    raise ValueError(
                        "the reference gives log-probabilities that are not finite: is it whole?"
                    )
                logps[chosen] = values.view(2, -1).t()
                bar.update(len(chosen))
                self.run.stop.check()
                if time.monotonic() - written > WRITE_EVERY:
                    file.write(logps)
                    written = time.monotonic()

    def _computed_by(self) -> Reference:
        if self.run.config.model.reference_archive is not None:
            return ModelReference(self.run, self.policy)
        if self.run.data.resumable is not None:
            return SwappedReference(self.run, self.policy)
        return torch.no_grad()(lambda batch: self.policy.logps(batch)[0])


REFERENCES: dict[str, Callable[[Run, Policy], Reference]] = {
    "swap": SwappedReference,
    "model": ModelReference,
    "precomputed": PrecomputedReference,
}


def _model_dtype(run: Run) -> torch.dtype:
    """Of a reference that is a model of its own."""
    name = run.config.model.reference_dtype
    return run.optimizer.model.dtype if name is None else dtype_of(name)


@torch.no_grad()
def starting_values(
    optimizer: MaskedOptimizer, base: WeightSource | None = None
) -> dict[nn.Parameter, Tensor]:
    """Values that each parameter's trained entries started from, (kept,) in the parameter's dtype.

    base: where they are read for a run that is continued; without it they are those of now.
    """
    if base is None:
        return {p: _copy_of_kept(optimizer, p) for p in optimizer.names}
    starts = {}
    for p, name in optimizer.names.items():
        whole = base.read(name).to(p.dtype)
        if whole.shape[0] < p.shape[0]:  # a vocabulary grown by a pad token
            added = mean_row(whole).expand(p.shape[0] - whole.shape[0], *whole.shape[1:])
            whole = torch.cat([whole, added])
        whole = whole.flatten().to(p.device)
        positions = optimizer.positions(p)
        starts[p] = whole if positions is None else whole.index_select(0, positions)
    return starts


def _copy_of_kept(optimizer: MaskedOptimizer, p: nn.Parameter) -> Tensor:
    values = optimizer.working_values(p)
    return values.clone() if optimizer.positions(p) is None else values
