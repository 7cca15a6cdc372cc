"""What the study of merging compares: groups of tasks, kinds of task vectors, rules and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from lota.share.merge.rules import METHODS, MergeRule, make_rule
from lota.storage import content_key
from scripts.cells import Record
from scripts.methods import DENSE, SCOPE, Method
from scripts.workloads import GROUPS, SMOKE, WORKLOADS, Workload

FOLDER = "merging"  # of the results, inside the studies' folder
LOTA = Method("LoTA", 0.9, "task_vector", start=1e-2)
DISJOINT = "LoTA, disjoint"
KINDS = (DENSE.name, SCOPE.name, LOTA.name, DISJOINT)  # of task vectors
FACTORS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.4)
DENSITIES = (0.05, 0.1, 0.2, 0.5, 0.8)
WEIGHTED = "sum, a weight per task"
RULES = (*METHODS, WEIGHTED)


def members_of(group: str) -> dict[str, Workload]:
    """Workloads of a group by name, in the order in which masks are made."""
    if group == "smoke":
        return {f"smoke {task}": replace(SMOKE, task=task) for task in GROUPS["toy tasks"]}
    return {name: WORKLOADS[name] for name in GROUPS[group]}


def group_key(sizes: Sequence[str]) -> str:
    """A key of a group's members and of the grid. sizes: the members' keys."""
    return content_key([FACTORS, DENSITIES, *sizes])[:12]


@dataclass(frozen=True)
class Setting:
    """A rule and its numbers."""

    rule: str  # of RULES
    factor: float = 1.0
    density: float | None = None  # None: every entry stays
    weights: tuple[float, ...] | None = None  # one per task

    @property
    def key(self) -> Record:
        """As plain values, as they are read from a file."""
        return asdict(self) | {"weights": self.weights and list(self.weights)}

    def made(self, count: int, seed: int) -> MergeRule:
        """The library's rule for `count` vectors. seed: of draws."""
        method = "task_arithmetic" if self.rule == WEIGHTED else self.rule
        return make_rule(
            method,
            count,
            weights=self.weights,
            density=None if self.density is None else [self.density],
            scale=self.factor,
            seed=seed if METHODS[method].thin == "random" else None,
        )


def grid(rule: str) -> list[Setting]:
    """What is tried of a rule whose numbers are the same for all tasks."""
    if rule == "sum":
        return [Setting(rule)]
    densities = DENSITIES if METHODS[rule].thin else (None,)
    return [Setting(rule, factor, density) for factor, density in product(FACTORS, densities)]


def coordinate_search(start: Setting, count: int, loss: Callable[[Setting], float]) -> Setting:
    """One weight at a time over FACTORS, until no single one makes the loss less; from one factor for all."""
    best = Setting(WEIGHTED, weights=(start.factor,) * count)
    changed = True
    while changed:
        changed = False
        for i, factor in product(range(count), FACTORS):
            assert best.weights is not None
            tried = replace(best, weights=(*best.weights[:i], factor, *best.weights[i + 1 :]))
            if loss(tried) < loss(best):
                best, changed = tried, True
    return best
