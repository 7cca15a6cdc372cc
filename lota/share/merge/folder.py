"""Merge task vectors into their base: a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lota.models.hashing import content_hash
from lota.models.provenance import MERGE_RECORD
from lota.models.weights import WeightSource, all_finite, refuse_not_finite
from lota.share.hf_weights import check_shard_size, open_folder, write_like
from lota.share.merge.aligned import align
from lota.share.merge.inputs import TaskVector, open_vectors, prompt_settings
from lota.share.merge.rules import MergeRule
from lota.share.merge.statistics import VectorStatistics
from lota.storage import atomic_path, refuse_filled, write_json
from lota.system import versions
from lota.utils import Problems


@dataclass
class MergeResult:
    """What was written."""

    folder: Path
    statistics: VectorStatistics
    shared: int  # entries that several vectors change
    exact: bool  # the method is `sum`, and no entry is shared: the result is what applying each gives
    prompts: dict[str, list[Any]]  # settings by which the inputs' runs wrote prompts -> the values they had


@dataclass
class PreparedMerge:
    """A merge whose inputs fit together; made by `prepare_merge`, which reads no weights."""

    base: str
    out: Path
    rule: MergeRule
    source: WeightSource  # the base's weights
    model: PreTrainedModel  # the base's structure, on the meta device
    vectors: list[TaskVector]
    base_hash: str | None  # content hash of the base, if one of the vectors is a delta
    max_shard_size: str

    def run(self, progress: Callable[[int], object] = lambda entries: None) -> MergeResult:
        """Write the folder, whole or not at all, and `merge.json` in it.

        progress: called with numbers of entries, `source.n_entries` in all. Raises ValueError if the deltas'
        base has other weights than this one, OSError if the disk is full; `out` then stays as it was.
        """
        if self.base_hash is not None and (found := content_hash(self.source)) != self.base_hash:
            raise ValueError(
                f"base={self.base} is not what the deltas were taken from: its weights hash to {found[:9]}"
                f" and theirs to {self.base_hash[:9]}"
            )
        values = _MergedValues(self, progress)
        with atomic_path(self.out) as folder:
            folder.mkdir()
            write_like(self.base, self.source, self.model, folder, values.merged, self.max_shard_size)
            exact = self.rule.method == "sum" and values.shared == 0
            prompts = prompt_settings(self.vectors)
            result = MergeResult(self.out, values.statistics, values.shared, exact, prompts)
            write_json(folder / MERGE_RECORD, self._record(result))
            refuse_filled("out", self.out)  # by a command that began after this one
        return result

    def _record(self, result: MergeResult) -> dict[str, Any]:
        return {
            "base": self.base,
            "base_hash": self.base_hash,
            "rule": asdict(self.rule),
            "shared": result.shared,
            "exact": result.exact,
            # evaluation renders and cuts prompts as the runs did, if they did alike
            **{name: found[0] if len(found) == 1 else None for name, found in result.prompts.items()},
            **result.statistics.to_dict(),
            "versions": versions(torch.device("cpu")),
        }


def prepare_merge(
    base: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    rule: MergeRule,
    out: str | os.PathLike[str],
    max_shard_size: str = "2GB",
) -> PreparedMerge:
    """Open everything and check that it fits together; no weights are read, nothing is written.

    base: Hugging Face folder or hub id. paths: delta files, folders, hub ids or policy.pt's, one per weight
    of the rule. Raises one ValueError with everything that does not fit.
    """
    folder = Path(out).expanduser().resolve()
    problems = Problems()
    problems.attempt(refuse_filled, "out", folder)
    problems.attempt(check_shard_size, max_shard_size)
    opened = problems.attempt(_open_base, base)
    vectors = opened and problems.attempt(open_vectors, paths, opened[0])
    problems.refuse()
    assert opened is not None and vectors is not None
    return PreparedMerge(str(base), folder, rule, *opened, *vectors, max_shard_size)


def _open_base(base: str | os.PathLike[str]) -> tuple[WeightSource, PreTrainedModel]:
    source, model = open_folder(base)
    absent = [name for name, _ in model.named_parameters() if name not in source]
    quantized = [name for name in source.names() if not source.dtype(name).is_floating_point]
    if absent:
        raise ValueError(f"base={base} is incomplete: it lacks {len(absent)} weights, {absent[0]} first")
    if quantized:
        raise ValueError(
            f"base={base}: {quantized[0]} is {source.dtype(quantized[0])}; give unquantized weights"
        )
    return source, model


class _MergedValues:
    """Parameter by parameter: read, count, merge."""

    def __init__(self, merge: PreparedMerge, progress: Callable[[int], object]):
        self.merge, self.progress = merge, progress
        self.statistics = VectorStatistics([vector.id for vector in merge.vectors])
        self.generator = merge.rule.generator()
        self.shared = 0

    def merged(self, name: str) -> Tensor:
        """The merged parameter, in the base's dtype."""
        base, rule = self.merge.source.read(name), self.merge.rule
        refuse_not_finite(base, name, self.merge.source.file_of(name))
        parts = [vector.entries(name, base) for vector in self.merge.vectors]
        for vector, part in zip(self.merge.vectors, parts, strict=True):
            if part is not None:
                refuse_not_finite(part.tuned, name, vector.id)
        self.progress(base.numel())
        aligned = align(parts, base.numel())
        self.statistics.add(aligned.vectors, base.numel())
        self.shared += int((aligned.touches > 1).sum())
        aligned.merge_(base, rule, self.generator)
        if not all_finite(base):
            raise ValueError(f"the merged {name} has values that {base.dtype} cannot hold: lower the weights")
        return base
