"""Scores -> masks: which entries of a model to keep, exactly and without loading it.

    masks = lota.extract("base/", "run/epoch-1/policy.pt", [0.5, 0.9, 0.99])
    masks[0.9].save("masks/gsm8k/0.9_mask.pt")

Files are read in chunks, at most twice (see lota/topk.py); memory is N/8 bytes per sparsity and buffers.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lota.masks import Mask, kept_count
from lota.masks.extract import neurons as units
from lota.masks.extract import topk
from lota.masks.extract.gradients import Collected
from lota.masks.extract.neurons import GRANULARITIES, Units
from lota.masks.extract.saliency import SALIENCIES, SaliencyStream
from lota.models import chunks as streaming
from lota.models.hashing import StreamingHash
from lota.models.pair import ModelPair, open_pair

logger = logging.getLogger(__name__)
DEFAULT_SCOPE = "attention and MLP weights"
PER = ("global", "tensor", "layer")


@dataclass(frozen=True)
class Rule:
    """How entries are chosen. per: one threshold for all (`global`), or one per `tensor` or `layer`;
    smallest: the smallest nonzero scores instead of the largest; protect: masks whose kept entries are not
    available; granularity: single entries (`element`), or whole output (`row`) or input (`column`) neurons.
    """

    score: str = "task_vector"
    per: str = "global"
    smallest: bool = False
    seed: int = 0
    protect: Sequence[Mask] = ()
    granularity: str = "element"

    def __post_init__(self) -> None:
        problems = []
        for key, choices in (("score", SALIENCIES), ("per", PER), ("granularity", GRANULARITIES)):
            value = getattr(self, key)
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, 1, 0)
                hint = f" (did you mean {near[0]}?)" if near else ""
                problems.append(f"{key}={value!r}: choose one of {', '.join(choices)}{hint}")
        if problems:
            raise ValueError("\n".join(problems))


def extract(
    base: str | os.PathLike,
    tuned: str | os.PathLike | None = None,
    sparsities: Iterable[float] = (0.9,),
    *,
    scope: str | None = None,
    score: str = "task_vector",
    per: str = "global",
    smallest: bool = False,
    seed: int = 0,
    protect: Sequence[Mask | str | os.PathLike] = (),
    granularity: str = "element",
    collected: Collected | None = None,
    model: str | os.PathLike | None = None,
) -> dict[float, Mask]:
    """One mask per sparsity from a base and a fine-tuned model on disk.

    base, tuned: Hugging Face folders, hub ids or policy.pt files; tuned is read by task_vector only.
    scope: regular expression over parameter names, by default attention and MLP weights.
    model: folder whose config gives the structure, needed where neither side is a folder.
    protect: masks (or files) whose kept entries are left alone; the sparsity still counts the whole scope.
    score, per, smallest, granularity: see `Rule` and lota/scores.py. Whole rows or columns hardly ever add up
    to round((1-s)N) entries: as many are kept as fit into that number.
    collected: gradients of the base (`lota.collect_gradients`), read by gradient, fisher and snip.
    Raises ValueError for what does not exist, does not belong together, or cannot hold the share asked for.
    """
    wanted = check_sparsities(sparsities)
    masks = [m if isinstance(m, Mask) else Mask.load(m) for m in protect]
    rule = Rule(score, per, smallest, seed, masks, granularity)
    pair = open_pair(base, tuned, scope=scope, model=model, needs=SALIENCIES[score].needs)
    return select(pair, wanted, rule, collected=collected)


def check_sparsities(sparsities: Iterable[float]) -> list[float]:
    """The distinct sparsities as floats. Raises ValueError for one that is no number in [0, 1)."""
    wanted = []
    for sparsity in sparsities:
        try:
            wanted.append(float(sparsity))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sparsity {sparsity!r} is not a number") from error
        kept_count(wanted[-1], 0)
    if not wanted:
        raise ValueError("no sparsity given")
    return list(dict.fromkeys(wanted))


def select(
    pair: ModelPair,
    sparsities: Sequence[float],
    rule: Rule,
    progress: topk.Progress | None = None,
    with_hash: bool = True,
    collected: Collected | None = None,
) -> dict[float, Mask]:
    """One mask per sparsity over `pair.scope`.

    progress: see `topk.top_bits`; with_hash: of the base; collected: what a data-driven score reads.
    """
    plan = Plan(pair, sparsities, rule)
    if SALIENCIES[rule.score].collects:
        if collected is None:
            raise ValueError(
                f"score={rule.score} reads gradients: pass collected=lota.collect_gradients(...)"
            )
        collected.check(pair, SALIENCIES[rule.score].collects)
        pair.sources["collected"] = collected
    stream = SaliencyStream(pair, rule.score, rule.smallest, rule.seed, taken=plan.taken)
    if with_hash:
        shared = plan.sizes if "base" in SALIENCIES[rule.score].needs else ()
        stream.digest = StreamingHash(pair.sources["base"], shared, streaming.CHUNK)
    bits: list[dict[str, np.ndarray]] = [{} for _ in sparsities]
    cuts: list[dict[str, topk.Cut | units.UnitCut]] = [{} for _ in sparsities]
    for label, names in plan.groups.items():
        found, group_cuts = plan.choose(stream, names, progress)
        for i, cut in enumerate(group_cuts):
            bits[i].update(found[i])
            cuts[i][label] = cut
    base_hash = stream.digest.finish() if stream.digest else None
    shapes = {name: tensor.shape for name, tensor in pair.scope.items()}
    masks = {}
    for i, sparsity in enumerate(sparsities):
        meta = _meta(pair, rule, sparsity, cuts[i], stream) | {"base_hash": base_hash}
        mask = Mask({name: torch.from_numpy(bits[i][name]) for name in plan.sizes}, shapes, meta)
        mask.meta["kept"] = mask.n_kept
        masks[sparsity] = mask
    return masks


class Plan:
    """What is chosen among what, and how much of it. Raises ValueError where that cannot be had, before any
    weight is read.

    sizes: name -> entries. groups: label -> names that share a threshold. taken: name -> packed bits of the
    entries that are not available, whole rows or columns where those are chosen.
    """

    def __init__(self, pair: ModelPair, sparsities: Sequence[float], rule: Rule):
        self.sparsities = sparsities
        self.sizes = {name: int(np.prod(t.shape, dtype=np.int64)) for name, t in pair.scope.items()}
        self.groups = _groups(pair, rule.per)
        self.units: dict[str, Units] = {}
        if rule.granularity != "element":
            self.units = {name: units.units_of(name, t, rule.granularity) for name, t in pair.scope.items()}
        self.taken = _taken(rule.protect, pair)
        for name, each in self.units.items():
            if name in self.taken:
                self.taken[name] = each.packed(each.touched(self.taken[name]))
        for label, names in self.groups.items():
            _check_capacity(label, names, self.sizes, self.taken, self.counts(names))

    def counts(self, names: Sequence[str]) -> dict[float, int]:
        """Sparsity -> entries to keep among those of the names."""
        total = sum(self.sizes[name] for name in names)
        return {sparsity: kept_count(sparsity, total) for sparsity in self.sparsities}

    def choose(
        self, stream: SaliencyStream, names: Sequence[str], progress: topk.Progress | None
    ) -> tuple[list[dict[str, np.ndarray]], list[topk.Cut | units.UnitCut]]:
        """For each sparsity: packed bits of what is kept of the names, and where the cut lies."""
        counts = list(self.counts(names).values())
        if self.units:
            members = {name: self.units[name] for name in names}
            return units.top_units(stream, members, counts, sorted(names), progress)
        found, cuts = topk.top_bits(
            stream, {name: self.sizes[name] for name in names}, counts, sorted(names), progress
        )
        return found, [cut._replace(threshold=stream.score_of(cut.threshold)) for cut in cuts]


def _groups(pair: ModelPair, per: str) -> dict[str, list[str]]:
    """Names that share a threshold, each in the order that decides ties; groups in the order of sorted names,
    in which the base's hash is taken.
    """
    label = {"global": lambda name: "the scope", "tensor": lambda name: name, "layer": pair.layer_label}[per]
    groups: dict[str, list[str]] = {}
    for name in pair.scope:
        groups.setdefault(label(name), []).append(name)
    return dict(sorted(groups.items(), key=lambda group: min(group[1])))


def _meta(
    pair: ModelPair,
    rule: Rule,
    sparsity: float,
    cuts: Mapping[str, topk.Cut | units.UnitCut],
    stream: SaliencyStream,
) -> dict[str, Any]:
    shortfall = sum(cut.shortfall for cut in cuts.values())
    by_size = rule.granularity != "element" and all(cut.by_size for cut in cuts.values() if cut.shortfall)
    if shortfall and by_size:
        logger.info(
            "sparsity %s: %d entries fewer than asked for are kept, because no whole %s fits into them",
            sparsity,
            shortfall,
            rule.granularity,
        )
    elif shortfall:
        logger.warning(
            "sparsity %s: %d entries fewer than asked for are kept, because their score is 0 "
            "or they are protected",
            sparsity,
            shortfall,
        )
    thresholds = {label: cut.threshold for label, cut in cuts.items()}
    collected = pair.sources.get("collected")
    return {
        "scope": pair.pattern or DEFAULT_SCOPE,
        "sparsity": sparsity,
        "score": rule.score,
        "per": rule.per,
        "granularity": rule.granularity,
        "smallest": rule.smallest,
        "seed": rule.seed if rule.score == "random" else None,
        "data": dict(collected.meta) if collected is not None else None,
        "protected": sum(int(np.bitwise_count(t).sum(dtype=np.int64)) for t in stream.taken.values()),
        "threshold": next(iter(thresholds.values())) if rule.per == "global" else thresholds,
        "shortfall": shortfall,
        "base": pair.sources["base"].id,
        "tuned": pair.sources["tuned"].id if "tuned" in pair.sources else None,
    }


def _taken(protect: Sequence[Mask], pair: ModelPair) -> dict[str, np.ndarray]:
    """Packed bits of the entries that the protect masks keep, inside the scope."""
    taken: dict[str, np.ndarray] = {}
    shapes = {**pair.shapes, **{name: tensor.shape for name, tensor in pair.scope.items()}}
    for mask in protect:
        mask.check(shapes)
        for name in pair.scope:
            if name in mask and mask.kept(name):
                bits = mask.bits[name].numpy()
                taken[name] = taken[name] | bits if name in taken else bits
    return taken


def _check_capacity(
    label: str,
    names: Sequence[str],
    sizes: Mapping[str, int],
    taken: Mapping[str, np.ndarray],
    wanted: Mapping[float, int],
) -> None:
    total = sum(sizes[name] for name in names)
    used = sum(int(np.bitwise_count(taken[name]).sum(dtype=np.int64)) for name in names if name in taken)
    for sparsity, k in wanted.items():
        if k > total - used:
            raise ValueError(
                f"sparsity {sparsity} keeps {k:,} of the {total:,} entries of {label}, but the protected "
                f"masks leave {total - used:,} free: choose a sparsity of at least {used / total:.4g}"
            )
