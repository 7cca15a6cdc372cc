"""The run folder: whole checkpoints, what a resumed run needs, and the weights as `policy.pt`.

<run>/config.yaml      resolved settings          <run>/metrics.jsonl   one line per log interval
<run>/versions.json    code, packages, device     <run>/epoch-1/        policy.pt and resume.pt
"""

from __future__ import annotations

import logging
import pickle
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lota.optim.masked import MaskedOptimizer
from lota.utils import atomic_path, save_tensors

POLICY, RESUME = "policy.pt", "resume.pt"
CHECKPOINT_NAME = re.compile(r"(epoch|step)-\d+")
logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands. epoch and batch: the next batch to train on; step: optimizer steps made."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    examples: int = 0
    finished: bool = False

    def advance(self, epoch: int, batch: int, last_of_epoch: bool, examples: int) -> None:
        """A step on that batch was made."""
        self.epoch, self.batch = (epoch + 1, 0) if last_of_epoch else (epoch, batch + 1)
        self.step += 1
        self.examples += examples

    def folder_name(self, by_epoch: bool) -> str:
        """epoch-N at the end of an epoch where checkpoints are counted so, else step-<examples>."""
        whole = self.batch == 0 and self.epoch > 0
        return f"epoch-{self.epoch}" if by_epoch and whole else f"step-{self.examples}"


def policy_state(
    model: nn.Module, optimizer: MaskedOptimizer, dtype: torch.dtype, base: Any | None = None
) -> dict[str, Tensor]:
    """The keys of `model.state_dict()` on the CPU, floating-point tensors in `dtype`.

    Trained entries come from the optimizer's fp32 values. base: a weight source (`lota.weights.open_weights`)
    from which frozen values are read where the model holds them in less precision than `dtype`.
    Weights that share memory in the model share it in the result.
    """
    trained = {name: (positions, values) for name, positions, values in optimizer.kept_values()}

    def fill(name: str, value: Tensor) -> None:
        if name not in trained:
            return
        positions, values = trained[name]
        kept = values.detach().to("cpu", dtype)
        if positions is None:
            value.view(-1).copy_(kept)
        else:
            value.view(-1)[positions.long().cpu()] = kept

    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    return saved_state(model.state_dict(), names, dtype, fill, base)


def saved_state(
    state: Mapping[str, Tensor],
    names: Mapping[int, str],
    dtype: torch.dtype,
    fill: Callable[[str, Tensor], None],
    base: Any | None = None,
) -> dict[str, Tensor]:
    """CPU copies of `state`, parameters in `dtype`, ties kept.

    names: data pointer -> name of each parameter. fill: writes what training changed into the copy of a
    parameter. base: as in `policy_state`.
    """
    done: dict[int, Tensor] = {}
    saved = {}
    for key, tensor in state.items():
        pointer = tensor.data_ptr()
        if pointer not in done or pointer not in names:
            done[pointer] = _saved_tensor(tensor, names.get(pointer), dtype, fill, base)
        saved[key] = done[pointer]
    return saved


def _saved_tensor(
    tensor: Tensor,
    name: str | None,
    dtype: torch.dtype,
    fill: Callable[[str, Tensor], None],
    base: Any | None,
) -> Tensor:
    if not tensor.is_floating_point() or name is None:
        return tensor.detach().cpu().clone()
    value = tensor.detach().to("cpu", dtype, copy=True)
    if base is not None and tensor.element_size() < value.element_size():
        rows = base.read(name).to(dtype)
        value[: rows.shape[0]] = rows  # a vocabulary grown by a pad token has more rows than the base
    fill(name, value)
    return value


def fill_masters(optimizer: MaskedOptimizer, base: Any) -> None:
    """Set the fp32 masters of kept entries to the base's values, which a narrower working copy has rounded.

    base: a weight source. Rows that the base does not have (a vocabulary grown by a pad token) stay.
    """
    for p, name in optimizer.names.items():
        state = optimizer.state[p]
        if "master" not in state:
            continue
        values = base.read(name).flatten()
        positions = state.get("positions", torch.arange(p.numel(), device=p.device)).long().cpu()
        known = positions < values.numel()
        state["master"][known.to(p.device)] = values[positions[known]].to(p.device, torch.float32)


def random_state() -> dict[str, Any]:
    """State of every generator that a run may draw from, as plain values and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(
    folder: Path,
    *,
    state: dict[str, Tensor],
    optimizer: MaskedOptimizer,
    progress: Progress,
    metrics: dict[str, float],
    seen: dict[str, str | None],
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write policy.pt and resume.pt into `folder`, which appears under its name only when it is whole.

    seen: hashes of the mask and of the data that the run trains on. more: writes further files into a folder.
    """
    policy = {
        "step_idx": progress.step,
        "state": state,
        "metrics": {k: _plain(v) for k, v in metrics.items()},
    }
    resume = {
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "random": random_state(),
        **seen,
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        save_tensors(policy, temporary / POLICY)
        save_tensors(resume, temporary / RESUME)
        if more is not None:
            more(temporary)


def _plain(value: Any) -> Any:
    """A Python number: a NumPy scalar would make a file that `weights_only=True` refuses."""
    return value.item() if hasattr(value, "item") else value


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, content of resume.pt) of the whole checkpoint with most steps; None where there is none.

    A checkpoint whose resume.pt cannot be read is passed over with a warning.
    """
    best: tuple[Path, dict[str, Any]] | None = None
    for folder in sorted(run_dir.glob("*-*")) if run_dir.is_dir() else []:
        if not CHECKPOINT_NAME.fullmatch(folder.name) or not (folder / RESUME).is_file():
            continue
        try:
            resume = torch.load(folder / RESUME, map_location="cpu", weights_only=True, mmap=True)
            rank = (resume["progress"]["step"], resume["progress"]["finished"])
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read and is passed over: %s", folder / RESUME, str(error)[:200])
            continue
        if best is None or rank > (best[1]["progress"]["step"], best[1]["progress"]["finished"]):
            best = (folder, resume)
    return best
