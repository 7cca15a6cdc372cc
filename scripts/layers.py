"""Read the imports of lota/ from its source and hold them against the order of layers.

Used by scripts/house.py, which prints the numbers, and by tests/test_layers.py, which fails on a circle or on
an arrow against the order. Files are parsed and never imported. An arrow is an import of one module of lota/
by another, counted once per pair; imports inside functions and under TYPE_CHECKING are arrows too. That a
module of a package also loads the package's `__init__` is no arrow.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# A package may import every package of the layers above its own line, and in its own line those before it.
LAYERS = (
    ("utils", "places", "storage", "system", "rounding", "settings", "config", "config_checks"),
    ("models", "plots"),
    ("masks", "data"),
    ("optim", "share"),
    ("distributed",),
    ("evaluate",),
    ("train",),
    ("lotto",),
    ("report",),
    ("plan",),
)
ONLY = {"plots": ("utils", "places", "storage")}  # package -> the only packages it may import
APART = (("optim", "share"),)  # neighbours in a layer, neither of which may import the other
# These modules belong to no layer. They hand names of the whole library to its users, each imported on first
# use by a name in a string, or are a command of several layers; so they stand above all of them. No module of
# lota/ may import them, except for `lota.__version__`, so they cannot hide an arrow.
ENTRY_POINTS = ("lota", "lota.delta", "lota.masks.__main__")

OUTSIDE = ("tasks", "tests", "scripts", "benchmarks", "examples")  # folders that lota/ may not import
WHEN = ("import", "function", "types")  # when an import happens; of several per pair the first one counts


@dataclass(frozen=True)
class Arrow:
    """`source` imports `target`, at `line` of the source's file; `when` is one of WHEN."""

    source: str
    target: str
    line: int
    when: str

    def __str__(self) -> str:
        note = {"import": "", "function": " (in a function)", "types": " (for types)"}[self.when]
        return f"{self.source}:{self.line} -> {self.target}{note}"


@dataclass
class House:
    """The imports of lota/ under one root."""

    modules: dict[str, Path] = field(default_factory=dict)  # dotted name -> file
    arrows: list[Arrow] = field(default_factory=list)  # between modules that stand in layers
    facade: list[Arrow] = field(default_factory=list)  # to an entry point
    outward: list[Arrow] = field(default_factory=list)  # to tasks/, a root script and the like


class _Imports(ast.NodeVisitor):
    """Collect (module, imported name or None, line, when) of every import statement of a file."""

    def __init__(self, module: str, is_package: bool):
        self.package = module.split(".") if is_package else module.split(".")[:-1]
        self.when = "import"
        self.found: list[tuple[str, str | None, int, str]] = []

    def _add(self, module: str, name: str | None, node: ast.AST) -> None:
        self.found.append((module, name, getattr(node, "lineno", 0), self.when))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, None, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        above = self.package[: len(self.package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            self._add(base, alias.name, node)

    def visit_Call(self, node: ast.Call) -> None:
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        first = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
            self._add(str(first.value), None, node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        name = getattr(node.test, "attr", getattr(node.test, "id", None))
        self._visit_as("types" if name == "TYPE_CHECKING" else self.when, node.body)
        self._visit_as(self.when, node.orelse)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_as("types" if self.when == "types" else "function", node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def _visit_as(self, when: str, nodes: Iterable[ast.AST]) -> None:
        before, self.when = self.when, when
        for node in nodes:
            self.visit(node)
        self.when = before


# Reading a tree


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file: a package's is that of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_house(root: Path) -> House:
    """All imports of lota/, sorted into arrows between layers, to entry points and to the outside."""
    paths = sorted((root / "lota").rglob("*.py"))
    house = House({module_name(path, root): path for path in paths})
    foreign = {*OUTSIDE, *(path.stem for path in root.glob("*.py"))}
    found: dict[tuple[str, str], Arrow] = {}
    for source, path in house.modules.items():
        visitor = _Imports(source, path.name == "__init__.py")
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        for module, name, line, when in visitor.found:
            if module.split(".")[0] in foreign:
                house.outward.append(Arrow(source, module, line, when))
            target = _resolved(module, name, house.modules)
            if target in (None, source) or source in ENTRY_POINTS:
                continue
            arrow = Arrow(source, str(target), line, when)
            if target in ENTRY_POINTS:
                house.facade += [arrow] if name != "__version__" else []
                continue
            known = found.get((source, arrow.target))
            if known is None or WHEN.index(when) < WHEN.index(known.when):
                found[source, arrow.target] = arrow
    house.arrows = list(found.values())
    return house


def _resolved(module: str, name: str | None, modules: Mapping[str, Path]) -> str | None:
    """The module of lota/ that an import statement names, or the nearest package above it; else None."""
    parts = [*module.split("."), *([name] if name else [])]
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in modules:
            return ".".join(parts[:n])
    return None


# Layers, circles and floors


def package_of(module: str) -> str:
    """What of lota/ a module belongs to: `lota.masks.mask` -> `masks`, `lota.config` -> `config`."""
    return module.split(".")[1] if "." in module else module


def homeless(house: House) -> list[str]:
    """Modules whose package stands in no layer."""
    placed = {package for layer in LAYERS for package in layer}
    return [m for m in house.modules if m not in ENTRY_POINTS and package_of(m) not in placed]


def may_import(source: str, target: str) -> bool:
    """Whether the order of layers lets one package import another."""
    place = {package: (i, j) for i, layer in enumerate(LAYERS) for j, package in enumerate(layer)}
    if source == target or source not in place or target not in place:
        return True  # `homeless` tells of those without a place
    if source in ONLY and target not in ONLY[source]:
        return False
    apart = any({source, target} == set(pair) for pair in APART)
    return not apart and place[target] < place[source]


def back_arrows(house: House) -> list[Arrow]:
    """Arrows against the order of layers."""
    return [a for a in house.arrows if not may_import(package_of(a.source), package_of(a.target))]


def graph(arrows: Iterable[Arrow], packages: bool = False) -> dict[str, set[str]]:
    """Node -> nodes that it imports, for modules or for packages; every node is a key."""
    found: dict[str, set[str]] = defaultdict(set)
    for arrow in arrows:
        pair = (arrow.source, arrow.target)
        source, target = (package_of(pair[0]), package_of(pair[1])) if packages else pair
        found[target]  # becomes a key
        if source != target:
            found[source].add(target)
    return dict(found)


def _reachable(imports: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in imports[waiting.pop()] - seen:
            seen.add(node)
            waiting.append(node)
    return seen


def _groups(imports: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    """Node -> its strongly connected component."""
    reach = {node: _reachable(imports, node) for node in imports}
    return {node: frozenset({node, *(m for m in reach[node] if node in reach[m])}) for node in imports}


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of two or more nodes, largest first."""
    found = {group for group in _groups(imports).values() if len(group) > 1}
    return sorted((sorted(group) for group in found), key=lambda group: (-len(group), group))


def floors(imports: Mapping[str, set[str]]) -> int:
    """Nodes on the longest path of imports, each circle counted as one node."""
    group = _groups(imports)
    below: dict[frozenset[str], set[frozenset[str]]] = {g: set() for g in group.values()}
    for node, targets in imports.items():
        below[group[node]] |= {group[target] for target in targets} - {group[node]}
    heights: dict[frozenset[str], int] = {}

    def height(g: frozenset[str]) -> int:
        if g not in heights:
            heights[g] = 1 + max((height(lower) for lower in below[g]), default=0)
        return heights[g]

    return max((height(g) for g in below), default=0)
