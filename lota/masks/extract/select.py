"""Saliencies -> masks: which entries of a model to keep, exactly and without loading it.

    masks = lota.extract("base/", "run/epoch-1/policy.pt", [0.5, 0.9, 0.99])
    masks[0.9].save("masks/gsm8k/0.9_mask.pt")

Files are read in chunks, at most twice (see topk.py); memory is N/8 bytes per sparsity and buffers.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lota.masks import Mask, kept_count
from lota.masks.extract import topk, units
from lota.masks.extract.gradients import Collected
from lota.masks.extract.importance import Avoid
from lota.masks.extract.saliency import SALIENCIES, SaliencyStream, Source
from lota.masks.extract.units import (
    AGGREGATES,
    BLOCK_SIZES,
    DEFAULT_AGGREGATE,
    DEFAULT_BLOCK,
    GRANULARITIES,
    Cutoff,
    Units,
)
from lota.models import chunks
from lota.models.hashing import StreamingHash
from lota.models.pair import ModelPair, open_pair

logger = logging.getLogger(__name__)
DEFAULT_SCOPE = "attention and MLP weights"
PER = ("global", "tensor", "layer")
OUTSIDE = "outside"  # label of the scope's parameters outside of the transformer blocks


@dataclass(frozen=True)
class Rule:
    """How entries are chosen."""

    saliency: str = "task_vector"  # what rates an entry: a name of SALIENCIES
    per: str = "global"  # one threshold for all, or one for each `tensor` or `layer`
    smallest: bool = False  # keep the smallest nonzero saliencies instead of the largest
    seed: int = 0  # of `random`
    protect: Sequence[Mask] = ()  # masks whose kept entries are not available
    granularity: str = (
        "element"  # single entries, or whole output neurons (`row`), inputs (`column`), `block`s
    )
    block: int = DEFAULT_BLOCK  # side of a block
    aggregate: str = DEFAULT_AGGREGATE  # of a unit's saliencies, a name of AGGREGATES

    def __post_init__(self) -> None:
        problems = []
        for key, value, choices in (
            ("score", self.saliency, SALIENCIES),
            ("per", self.per, PER),
            ("granularity", self.granularity, GRANULARITIES),
            ("aggregate", self.aggregate, AGGREGATES),
        ):
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, 1, 0)
                hint = f" (did you mean {near[0]}?)" if near else ""
                problems.append(f"{key}={value!r}: choose one of {', '.join(choices)}{hint}")
        least, most = BLOCK_SIZES
        if not least <= self.block <= most:
            problems.append(f"block={self.block}: the side of a block is {least} to {most} entries")
        if problems:
            raise ValueError("\n".join(problems))


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str] | None = None,
    sparsities: Iterable[float] = (0.9,),
    *,
    scope: str | None = None,
    score: str = "task_vector",
    per: str = "global",
    smallest: bool = False,
    seed: int = 0,
    protect: Sequence[Mask | str | os.PathLike[str]] = (),
    granularity: str = "element",
    block: int = DEFAULT_BLOCK,
    collected: Collected | None = None,
    avoid: Collected | None = None,
    avoid_strength: float = 1.0,
    model: str | os.PathLike[str] | None = None,
) -> dict[float, Mask]:
    """Returns one mask per sparsity from a base and a fine-tuned model on disk.

    base, tuned: Hugging Face folders, hub ids or policy.pt files; only task_vector reads tuned.
    scope: regular expression over parameter names, by default attention and MLP weights.
    model: folder whose config gives the structure, needed if neither side is a folder.
    protect: masks (or files) whose kept entries are left alone; the sparsity still counts the whole scope.
    score: what rates an entry, a name of `SALIENCIES`. per, smallest, granularity, block: see `Rule`.
    Whole rows, columns or blocks hardly ever add up to round((1-s)N) entries: as many are kept as fit.
    collected: gradients of the base (`lota.collect_gradients`), read by gradient, fisher and snip.
    avoid: what matters elsewhere (`lota.importance_of`): each saliency is divided by
    sqrt(1 + avoid_strength * importance).
    Raises ValueError for what does not exist, does not belong together, or cannot hold the share asked for.
    """
    wanted = check_sparsities(sparsities)
    masks = [m if isinstance(m, Mask) else Mask.load(m) for m in protect]
    rule = Rule(score, per, smallest, seed, masks, granularity, block)
    pair = open_pair(base, tuned, scope=scope, model=model, needs=SALIENCIES[score].needs)
    avoided = None if avoid is None else Avoid(avoid, avoid_strength)
    return select(Quota(pair, wanted, rule), collected=collected, avoid=avoided)


def check_sparsities(sparsities: Iterable[float | str]) -> list[float]:
    """Returns the distinct sparsities as floats. Raises ValueError for one that is no number in [0, 1)."""
    wanted = []
    for sparsity in sparsities:
        try:
            wanted.append(float(sparsity))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sparsity {sparsity!r} is not a number") from error
        kept_count(wanted[-1], 0)
        if str(wanted[-1]).startswith("-"):  # a file would be called -0.0_mask.pt
            raise ValueError(f"sparsity {sparsity!r}: write 0.0")
    if not wanted:
        raise ValueError("no sparsity given")
    return list(dict.fromkeys(wanted))


class Quota:
    """How many entries a rule keeps at each sparsity, and of which parameters of a pair.

    Raises ValueError if the pair cannot give that many, before any weight is read.
    """

    def __init__(self, pair: ModelPair, sparsities: Sequence[float], rule: Rule):
        self.pair, self.sparsities, self.rule = pair, sparsities, rule
        # name -> entries, in the order that decides ties
        self.sizes = {name: math.prod(tensor.shape) for name, tensor in pair.scope.items()}
        # name -> its rows, columns or blocks; empty if single entries are chosen
        self.units: dict[str, Units] = units.units_of_scope(pair.scope, rule.granularity, rule.block)
        # name -> packed bits of the entries that are not available: all of a unit if one entry is
        self.taken = _taken(rule.protect, pair)
        for name, each in self.units.items():
            if name in self.taken:
                self.taken[name] = each.packed(each.touched(self.taken[name]))
        # label -> names that share a threshold
        self.pools = _pools(pair, rule.per)
        for label, names in self.pools.items():
            self._check_room(label, names)

    def counts(self, names: Sequence[str]) -> list[int]:
        """Returns, for each sparsity, how many entries of these parameters to keep."""
        total = sum(self.sizes[name] for name in names)
        return [kept_count(sparsity, total) for sparsity in self.sparsities]

    def _check_room(self, label: str, names: Sequence[str]) -> None:
        total = sum(self.sizes[name] for name in names)
        used = sum(_count_bits(self.taken[name]) for name in names if name in self.taken)
        for sparsity, k in zip(self.sparsities, self.counts(names), strict=True):
            if k > total - used == 0:
                raise ValueError(f"the protected masks leave no entry of {label} free: protect fewer")
            if k > total - used:
                raise ValueError(
                    f"sparsity {sparsity} keeps {k:,} of the {total:,} entries of {label}, but the protected "
                    f"masks leave {total - used:,} free: choose a sparsity of at least {used / total:.4g}"
                )


def select(
    quota: Quota,
    progress: topk.Progress | None = None,
    with_hash: bool = True,
    collected: Collected | None = None,
    avoid: Avoid | None = None,
) -> dict[float, Mask]:
    """Returns one mask per sparsity over the scope of the quota's pair.

    progress: see `topk.top_bits`. with_hash: whether to hash the base on the way. collected: what a
    data-driven saliency reads.
    """
    pair, rule = quota.pair, quota.rule
    sources = _sources(quota, collected)
    stream = SaliencyStream(sources, rule.saliency, rule.smallest, rule.seed, taken=quota.taken)
    if avoid is not None:
        avoid.check({name: tensor.shape for name, tensor in pair.scope.items()}, rule.smallest)
        stream.avoid, stream.sources = avoid.strength, {**sources, "avoid": avoid.importance}
    if with_hash:
        shared = quota.sizes if "base" in SALIENCIES[rule.saliency].needs else ()
        stream.digest = StreamingHash(pair.sources["base"], shared, chunks.CHUNK)
    # for each sparsity: name -> packed bits, and label of the pool -> where its cut lies
    bits: list[dict[str, np.ndarray]] = [{} for _ in quota.sparsities]
    cuts: list[dict[str, Cutoff]] = [{} for _ in quota.sparsities]
    for label, names in quota.pools.items():
        for i, (found, cut) in enumerate(_choose(quota, names, stream, progress)):
            bits[i].update(found)
            cuts[i][label] = cut
    base_hash = stream.digest.finish() if stream.digest else None
    shapes = {name: tensor.shape for name, tensor in pair.scope.items()}
    masks = {}
    for i, sparsity in enumerate(quota.sparsities):
        meta = _meta(quota, sparsity, cuts[i], collected) | {"base_hash": base_hash}
        mask = Mask({name: torch.from_numpy(bits[i][name]) for name in quota.sizes}, shapes, meta)
        mask.meta["kept"] = mask.n_kept
        if avoid is not None:
            mask.meta["avoid"] = {"strength": avoid.strength, **avoid.importance.meta}
        masks[sparsity] = mask
    _refuse_empty(quota, masks, any(cut.by_size for each in cuts for cut in each.values()))
    return masks


def _refuse_empty(quota: Quota, masks: Mapping[float, Mask], by_size: bool) -> None:
    """Raise ValueError if there was nothing to keep, so that no mask would let anything train.

    by_size: there was something, but no whole unit fitted.
    """
    asked = sum(sum(quota.counts(names)) for names in quota.pools.values())
    if not asked or any(mask.n_kept for mask in masks.values()):
        return
    if by_size:
        kind, per = quota.rule.granularity, quota.rule.per
        raise ValueError(
            f"no whole {kind} fits into what a mask with granularity={kind}, per={per} keeps at sparsities="
            f"{[*masks]}: choose a lower one, per=global or smaller blocks"
        )
    base, tuned = quota.pair.sources["base"].id, quota.pair.sources.get("tuned")
    outside = " that the protected masks leave" if quota.rule.protect else ""
    if tuned is None:
        raise ValueError(
            f"score={quota.rule.saliency} is 0 for every entry of {base}{outside}: choose another"
        )
    raise ValueError(
        f"tuned={tuned.id} has the weights of base={base} in every entry of the scope{outside}, so there is "
        "nothing to keep: give the fine-tuned model"
    )


def kept_by_layer(pair: ModelPair, mask: Mask) -> dict[str, dict[str, int]]:
    """Returns layer index, or "outside" of the blocks -> kept entries and all entries."""
    layers: dict[str, dict[str, int]] = {}
    for name in pair.scope:
        row = layers.setdefault(_layer_label(pair, name), {"kept": 0, "entries": 0})
        row["kept"] += mask.kept(name)
        row["entries"] += mask.numel(name)
    return layers


def _choose(
    quota: Quota, names: Sequence[str], stream: SaliencyStream, progress: topk.Progress | None
) -> list[tuple[dict[str, np.ndarray], Cutoff]]:
    """For each sparsity: packed bits of what is kept of the names, and where the cut lies."""
    counts, read_order = quota.counts(names), sorted(names)  # sorted: the order in which the base is hashed
    if quota.units:
        chosen = {name: quota.units[name] for name in names}
        return units.top_units(stream, chosen, counts, read_order, progress, quota.rule.aggregate)
    sizes = {name: quota.sizes[name] for name in names}
    bits, cuts = topk.top_bits(stream.keys, sizes, counts, read_order, progress)
    cutoffs = [Cutoff(stream.saliency_of(cut.threshold), cut.shortfall) for cut in cuts]
    return list(zip(bits, cutoffs, strict=True))


def _sources(quota: Quota, collected: Collected | None) -> dict[str, Source]:
    """Role -> what the saliency reads. Raises ValueError if it needs gradients that were not collected."""
    sources: dict[str, Source] = {**quota.pair.sources}
    kind = SALIENCIES[quota.rule.saliency].collects
    if not kind:
        return sources
    if collected is None:
        raise ValueError(
            f"score={quota.rule.saliency} reads gradients: pass collected=lota.collect_gradients(...)"
        )
    collected.check({name: tensor.shape for name, tensor in quota.pair.scope.items()}, kind)
    return sources | {"collected": collected}


def _pools(pair: ModelPair, per: str) -> dict[str, list[str]]:
    """Names that share a threshold, each in the order that decides ties; pools in the order of sorted names,
    in which the base's hash is taken.
    """
    pools: dict[str, list[str]] = {}
    for name in pair.scope:
        label = {"global": "the scope", "tensor": name, "layer": _layer_label(pair, name)}[per]
        pools.setdefault(label, []).append(name)
    return dict(sorted(pools.items(), key=lambda pool: min(pool[1])))


def _layer_label(pair: ModelPair, name: str) -> str:
    layer = pair.scope[name].layer
    return OUTSIDE if layer is None else str(layer)


def _taken(protect: Sequence[Mask], pair: ModelPair) -> dict[str, np.ndarray]:
    """Packed bits of the entries that the protect masks keep, inside the scope."""
    taken: dict[str, np.ndarray] = {}
    for mask in protect:
        mask.check(pair.shapes)
        for name in pair.scope:
            if name in mask and mask.kept(name):
                bits = mask.bits[name].numpy()
                taken[name] = taken[name] | bits if name in taken else bits
    return taken


def _count_bits(packed: np.ndarray) -> int:
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


def _meta(
    quota: Quota, sparsity: float, cuts: Mapping[str, Cutoff], collected: Collected | None
) -> dict[str, Any]:
    """How the mask came about (masks/README.md explains each key)."""
    pair, rule = quota.pair, quota.rule
    gradients = collected if SALIENCIES[rule.saliency].collects else None
    thresholds = {label: cut.threshold for label, cut in cuts.items()}
    shortfall = sum(cut.shortfall for cut in cuts.values())
    if shortfall:
        _log_shortfall(sparsity, shortfall, rule, all(cut.by_size for cut in cuts.values() if cut.shortfall))
    return {
        "scope": pair.pattern or DEFAULT_SCOPE,
        "scope_share": pair.share.share,
        "left_out": pair.share.largest,
        "sparsity": sparsity,
        "score": rule.saliency,
        "per": rule.per,
        "granularity": rule.granularity,
        "block": rule.block if rule.granularity == "block" else None,
        "smallest": rule.smallest,
        "seed": rule.seed if rule.saliency == "random" else None,
        "data": dict(gradients.meta) if gradients is not None else None,
        "protected": sum(_count_bits(bits) for bits in quota.taken.values()),
        "threshold": next(iter(thresholds.values())) if rule.per == "global" else thresholds,
        "shortfall": shortfall,
        "base": pair.sources["base"].id,
        "tuned": pair.sources["tuned"].id if "tuned" in pair.sources else None,
    }


def _log_shortfall(sparsity: float, shortfall: int, rule: Rule, by_size: bool) -> None:
    level, reason = logging.WARNING, "their saliency is 0 or they are protected"
    if by_size:
        level, reason = logging.INFO, f"no whole {rule.granularity} fits into them"
    text = "sparsity %s: %d entries fewer than asked for are kept, because %s"
    logger.log(level, text, sparsity, shortfall, reason)
