"""Parts of the report on the masks of runs: density of each, overlap of those of one model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from lota.masks import Mask
from lota.masks.statistics import density, overlap
from lota.masks.views import density_table, draw_density, draw_overlap, overlap_table
from lota.report.page import Section, file_name
from lota.report.reading import Run
from lota.utils import short_names

OVERLAP_TEXT = (
    "Below the diagonal: entries that both masks keep, over those that either keeps (IoU). Above it, and as "
    "'by chance' in the table: random masks that keep as many entries of each tensor, +- their deviation."
)


def mask_sections(runs: Sequence[Run], notes: list[str]) -> Iterable[Section]:
    """Density of each mask of the runs, and how the masks of one model overlap."""
    masks = {str(run.mask_path): run.mask for run in runs if run.mask is not None}
    names = {p: n.removesuffix("_mask.pt") for p, n in zip(masks, short_names(list(masks)), strict=True)}
    for path, mask in masks.items():
        table = density(mask)
        title = f"Density of {names[path]}"
        text = f"{path}: {mask.n_kept:,} of {mask.n_total:,} entries kept ({100 * mask.density:.4g} %)."
        figure = draw_density(table, None, "")
        yield Section(title, text, figure, file_name("density", names[path]), density_table(table))
    models = _by_model(masks)
    if len(models) > 1:
        shown = "; ".join(", ".join(names[path] for path in group) for group in models)
        notes.append(f"masks of different models have no overlap: {shown}")
    for at, group in enumerate(group for group in models if len(group) > 1):
        pairs = {
            (i, j): overlap(masks[group[i]], masks[group[j]]) for i, j in combinations(range(len(group)), 2)
        }
        listed = [names[path] for path in group]
        figure = draw_overlap(listed, pairs, None)
        file = "overlap" if at == 0 else f"overlap_{at + 1}"
        yield Section("Overlap of masks", OVERLAP_TEXT, figure, file, overlap_table(listed, pairs))


def _by_model(masks: dict[str, Mask]) -> list[list[str]]:
    groups: list[list[str]] = []
    for path, mask in masks.items():
        home = next((group for group in groups if _same_model(masks[group[0]], mask)), None)
        if home is None:
            groups.append([path])
        else:
            home.append(path)
    return groups


def _same_model(first: Mask, second: Mask) -> bool:
    try:
        first.check_same_model(second)
    except ValueError:
        return False
    return True
