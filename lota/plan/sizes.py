"""How many entries of each parameter a run trains, without knowing which."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from lota.config import Config
from lota.masks import Mask
from lota.masks.extract.units import DEFAULT_BLOCK, units_of
from lota.masks.mask import kept_count
from lota.masks.trainable import is_dense, mask_or_dense, trainable_mask
from lota.models.hub import MASK_FILE, local_copy
from lota.models.scope import find_scope, frozen_towers, layer_numbers
from lota.optim.kept import tile_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Sizes:
    """What a masked optimizer asks of a mask, but for the positions.

    counts: name -> kept entries. shapes: name -> shape of each parameter of the scope. tiles: name -> (lines,
    entries of each) of the tiles that whole rows, columns or blocks are kept in; single entries have none.
    """

    counts: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    tiles: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def check(self, shapes: object) -> None:
        """A mask is checked when its sizes are taken."""

    def kept(self, name: str) -> int:
        return self.counts.get(name, 0)

    @property
    def n_kept(self) -> int:
        return sum(self.counts.values())

    def alike(self, prefixes: Mapping[str, int]) -> Sizes:
        """Every block keeps the mean of what all blocks keep of the parameter, which one block can stand for.

        prefixes: of the blocks, to their numbers.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.counts:
            groups[_within_block(name, prefixes)].append(name)
        counts: dict[str, int] = {}
        for names in groups.values():
            mean = round(sum(self.counts[name] for name in names) / len(names))
            counts |= dict.fromkeys(names, mean)
        return Sizes(counts, self.shapes, self.tiles)


def _within_block(name: str, prefixes: Mapping[str, int]) -> str:
    return next((name[len(p) :] for p in prefixes if name.startswith(p + ".")), name)


def of_mask(mask: Mask) -> Sizes:
    """The sizes of a mask that is there."""
    counts = {name: mask.kept(name) for name in mask.names}
    tiles, seen = {}, {}
    for name, count in counts.items():
        shape = mask.shapes[name]
        if not 0 < count < mask.numel(name) or len(shape) not in (2, 3):
            continue
        kind = re.sub(r"\d+", "#", name), shape
        if kind not in seen:  # a mask keeps the same units in all layers
            seen[kind] = tile_shape(mask.dense(name).view(-1, *shape[-2:]))
        tile = seen[kind]
        if tile is not None:
            tiles[name] = tile
    return Sizes(counts, mask.shapes, tiles)


def at_sparsity(model: nn.Module, config: Config, sparsity: float) -> Sizes:
    """What a mask of that sparsity keeps on average: the same share of every weight in the scope.

    Rows, columns or blocks as snip_granularity says.
    """
    scope = find_scope(model, config.model.scope, config.model.block_name)
    shapes = {name: tensor.shape for name, tensor in scope.items()}
    counts = {name: kept_count(sparsity, tensor.numel) for name, tensor in scope.items()}
    if config.snip_granularity == "element" or not config.snip:
        return Sizes(counts, shapes)
    tiles = {}
    for name, tensor in scope.items():
        units = units_of(name, tensor, config.snip_granularity, config.snip_block or DEFAULT_BLOCK)
        tiles[name] = units.tall, units.wide
    return Sizes(counts, shapes, tiles)


def _of_layers(model: PreTrainedModel, config: Config) -> Sizes:
    """All that trains densely if every other layer is frozen, without making a mask as large as the model."""
    remainder = {"even": 0, "odd": 1}[config.freeze_layers or ""]
    numbers = layer_numbers(model, config.model.block_name)
    frozen = tuple(f"{prefix}." for prefix, number in numbers.items() if number % 2 == remainder)
    still = set(frozen_towers(model, config.model.scope))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    counts = {
        name: 0 if name in still or name.startswith(frozen) else p.numel()
        for name, p in model.named_parameters()
    }
    return Sizes(counts, shapes)


def _refuse_absent(config: Config) -> None:
    path = config.mask_path
    if path is not None and not is_dense(path) and not local_copy(path, MASK_FILE).exists():
        raise ValueError(
            f"mask_path={path} does not exist: sparsity=0.9 plans for a mask that is not there yet"
        )


def of_run(model: PreTrainedModel, config: Config, sparsity: float | None) -> Sizes | None:
    """What a run trains: as its mask file says, or at a sparsity. None: it trains densely, or LoRA.

    model: the skeleton. Raises ValueError for a mask that does not fit.
    """
    if config.adapter.name == "lora":
        return None
    if sparsity is not None:
        return at_sparsity(model, config, sparsity)
    if config.snip:
        return at_sparsity(model, config, config.snip_sparsity)
    if is_dense(config.mask_path) and not config.protect_masks:
        return None if config.freeze_layers is None else _of_layers(model, config)
    _refuse_absent(config)
    mask = trainable_mask(
        model,
        mask_or_dense(config.mask_path, mapped=True),
        flip=config.flip_mask,
        protect=[Mask.load(path) for path in config.protect_masks],
        freeze_layers=config.freeze_layers,
        scope=config.model.scope,
        block_name=config.model.block_name,
    )
    if mask is not None and mask.n_kept == 0:
        raise ValueError(f"mask_path={config.mask_path}: nothing would train: no kept entry is left")
    return None if mask is None else of_mask(mask)
