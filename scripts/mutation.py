"""Which faults `scripts/mutants.py` puts into a module: cosmic-ray's operators and some of our own.

Not mutated: what decides no result (docstrings, annotations, names of types, texts of errors, of logs and in
f-strings, `__repr__`, the arguments of a dataclass's decorator), `assert`, which checks ourselves, methods
that only raise NotImplementedError, and calls that flush to disk, which nothing but a power cut shows: those
are scripts/faults.py's.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection, Iterator
from typing import NamedTuple

import cosmic_ray.mutating
import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast

# Of the replacements of one operator, those that differ most: the other ones are noticed by the same tests.
BINARY = {
    "Add": ("Sub", "Mul"),
    "Sub": ("Add",),
    "Mul": ("Div", "Add"),
    "Div": ("Mul",),
    "FloorDiv": ("Mul", "Add"),
    "Mod": ("FloorDiv", "Mul"),
    "Pow": ("Mul",),
    "LShift": ("RShift",),
    "RShift": ("LShift",),
    "BitAnd": ("BitOr", "BitXor"),
    "BitOr": ("BitAnd", "BitXor"),
    "BitXor": ("BitAnd", "BitOr"),
}
COMPARISONS = {
    "Eq": ("NotEq",),
    "NotEq": ("Eq",),
    "Lt": ("LtE", "GtE"),
    "LtE": ("Lt", "Gt"),
    "Gt": ("GtE", "LtE"),
    "GtE": ("Gt", "Lt"),
    "Is": ("IsNot",),
    "IsNot": ("Is",),
}
OPERATORS = (
    *(f"ReplaceBinaryOperator_{a}_{b}" for a, to in BINARY.items() for b in to),
    *(f"ReplaceComparisonOperator_{a}_{b}" for a, to in COMPARISONS.items() for b in to),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("USub", "Invert", "Not")),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer"),
    *("RemoveDecorator", "ZeroIterationForLoop"),
)
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}
# a static method without its decorator works the same on the class, and so does all that calls it there
SILENT_DECORATORS = {"dataclass", "overload", "abstractmethod", "staticmethod"}
LOGGERS = {"log", "logger", "logging", "warnings"}
CHECKS = {"strict", "check_invariants"}  # arguments of zip and of sparse tensors: checks of ourselves
FLUSHES = {"fsync", "flush_to_disk"}

Place = tuple[int, int]  # line from 1, column from 0, in characters


class Mutant(NamedTuple):
    """One fault: the whole source with it, and the lines of the statement that holds it."""

    operator: str
    first: int
    last: int
    source: str


def mutants_of(source: str, functions: Collection[str] = ()) -> list[Mutant]:
    """All mutants of a module, or of these functions in it, that are programs and differ from it and from
    each other.
    """
    tree = ast.parse(source)
    silent = list(_without_effect(tree, source))
    seen, found = {ast.dump(tree)}, []
    for operator, start, text in [*_of_cosmic_ray(source, silent), *_own(tree, source, silent)]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                shape = ast.dump(ast.parse(text))
                compile(text, "mutant", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            continue
        if shape not in seen:
            seen.add(shape)
            found.append(Mutant(operator, *_statement(tree, start[0]), text))
    inside = [_lines(node) for node in ast.walk(tree) if getattr(node, "name", None) in functions]
    chosen = [m for m in found if not functions or any(m.first in lines for lines in inside)]
    return sorted(chosen, key=lambda mutant: mutant.first)


def _lines(node: ast.AST) -> range:
    assert isinstance(node, ast.stmt) and node.end_lineno is not None
    return range(node.lineno, node.end_lineno + 1)


def _of_cosmic_ray(source: str, silent: list[tuple[Place, Place]]) -> Iterator[tuple[str, Place, str]]:
    nodes = list(ast_nodes(get_ast(source)))
    for name in OPERATORS:
        operator, occurrence = cosmic_ray.plugins.get_operator(f"core/{name}")(), 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                # the bare * of a parameter list is no product
                if not _inside(start, silent) and getattr(node.parent, "type", "") != "parameters":
                    yield name, start, cosmic_ray.mutating.mutate_code(source, operator, occurrence)
                occurrence += 1


def _own(
    tree: ast.Module, source: str, silent: list[tuple[Place, Place]]
) -> Iterator[tuple[str, Place, str]]:
    """Statements left out; `in`, min and max, any and all; conditions of comprehensions; what is caught."""
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            for name, at, text in _replacements(node, parent, source):
                start, end = _range(at, source)
                if not _inside(start, silent):
                    yield name, start, _replaced(source, start, end, text)


def _replacements(
    node: ast.AST, parent: ast.AST, source: str
) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    if isinstance(node, ast.stmt) and _can_go(node, parent):
        yield "DeleteStatement", node, "pass"
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn) and len(node.ops) == 1:
        left, right = (ast.get_source_segment(source, part) for part in (node.left, node.comparators[0]))
        yield "ReplaceIn", node, f"({left} {'not in' if isinstance(node.ops[0], ast.In) else 'in'} {right})"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SWAPPED:
        yield "ReplaceExtreme", node.func, SWAPPED[node.func.id]
    elif isinstance(node, ast.ExceptHandler) and node.type is not None:
        yield "ReplaceException", node.type, "ZeroDivisionError"
    elif isinstance(node, ast.comprehension):
        for condition in node.ifs:
            yield "NegateCondition", condition, f"(not ({ast.get_source_segment(source, condition)}))"


def _can_go(node: ast.stmt, parent: ast.AST) -> bool:
    """Whether the function still is one without this statement, so that a test may or may not notice."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom)
    if isinstance(node, ast.Assign):
        names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        return all(
            isinstance(t, ast.Attribute | ast.Subscript) or (isinstance(t, ast.Name) and t.id in names)
            for t in node.targets
        )
    if isinstance(node, ast.Return):  # one that ends a function early
        return node.value is None and isinstance(parent, ast.If)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Delete)


def _without_effect(tree: ast.Module, source: str) -> Iterator[tuple[Place, Place]]:
    """Ranges of the source in which nothing is mutated."""
    for node in ast.walk(tree):
        nodes: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            nodes += [node.returns, *(a.annotation for a in every)]
            nodes += [a.annotation for a in (arguments.vararg, arguments.kwarg) if a]
            if node.name == "__repr__" or _is_abstract(node):
                nodes.append(node)
        elif isinstance(node, ast.AnnAssign):
            nodes.append(node.annotation)
        elif isinstance(node, ast.Raise):
            nodes += [node.exc, node.cause]
        elif isinstance(node, ast.Call) and _name(node.func) in ("reshape", "view"):
            nodes += [size for size in node.args if isinstance(size, ast.UnaryOp)]  # -1: any negative is one
        elif isinstance(node, ast.keyword) and node.arg in CHECKS:
            nodes.append(node.value)
        elif isinstance(node, ast.Assert | ast.JoinedStr) or _is_silent_call(node) or _is_alias(node, tree):
            nodes.append(node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            nodes += [d for d in node.decorator_list if _name(d) in SILENT_DECORATORS]
        for part in nodes:
            if isinstance(part, ast.expr | ast.stmt):
                start, end = _range(part, source)
                # a decorator begins at its @
                decorates = isinstance(node, ast.ClassDef | ast.FunctionDef) and part in node.decorator_list
                yield (start[0], start[1] - decorates), end


def _is_abstract(node: ast.FunctionDef) -> bool:
    last = node.body[-1]
    return isinstance(last, ast.Raise) and last.exc is not None and _name(last.exc) == "NotImplementedError"


def _is_silent_call(node: ast.AST) -> bool:
    """Whether it writes to a log or flushes to disk."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    called = node.value.func
    if isinstance(called, ast.Name) and called.id in FLUSHES:
        return True
    while isinstance(called, ast.Attribute):
        called = called.value
    return isinstance(called, ast.Name) and called.id in LOGGERS


def _is_alias(node: ast.AST, tree: ast.Module) -> bool:
    """A name of a type, as in `Parameters = nn.Module | Iterable[...]`."""
    if not (isinstance(node, ast.Assign) and node in tree.body and isinstance(node.targets[0], ast.Name)):
        return False
    name = node.targets[0].id.lstrip("_")
    return name[:1].isupper() and not name.isupper()


def _name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _statement(tree: ast.Module, line: int) -> tuple[int, int]:
    """First and last line of the smallest statement at a line; of compound ones, of the head alone."""
    found = (line, line)
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or node.end_lineno is None:
            continue
        first, last = node.lineno, node.end_lineno
        if isinstance(body := getattr(node, "body", None), list):
            first = min([first, *(d.lineno for d in getattr(node, "decorator_list", []))])
            last = max(first, body[0].lineno - 1)
        if first <= line <= last:
            found = (first, last)  # ast.walk comes to the inner ones later
    return found


def _range(node: ast.expr | ast.stmt, source: str) -> tuple[Place, Place]:
    lines = source.splitlines()
    assert node.end_lineno is not None and node.end_col_offset is not None

    def column(line: int, offset: int) -> int:  # ast counts bytes
        return len(lines[line - 1].encode()[:offset].decode())

    return (
        (node.lineno, column(node.lineno, node.col_offset)),
        (node.end_lineno, column(node.end_lineno, node.end_col_offset)),
    )


def _inside(place: Place, ranges: list[tuple[Place, Place]]) -> bool:
    return any(start <= place < end for start, end in ranges)


def _replaced(source: str, start: Place, end: Place, text: str) -> str:
    lines = source.splitlines(keepends=True)
    before = "".join(lines[: start[0] - 1]) + lines[start[0] - 1][: start[1]]
    after = lines[end[0] - 1][end[1] :] + "".join(lines[end[0] :])
    return before + text + after
