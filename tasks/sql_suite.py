"""Whether two queries mean the same: by what they give on tables of made-up rows, filled several times.

This is test-suite accuracy (Zhong et al. 2020, arXiv 2010.02840), with fillings made for each pair:
- A cell of a column that a query compares with a literal often holds that literal or a near neighbour (one
  more, one less, a letter more), so that conditions hold for some rows and just fail for others. All others
  draw from few values that columns share, so that joins match, groups form and values repeat.
- A filling counts if the right query gives something other than 0 and NULL there, and the same whatever the
  order of the rows: not, for instance, the first of two that are equally old.
- Rows are compared as a multiset, in order if the right query orders them, columns in any one order, numbers
  to 9 digits. No cell is NULL, so that COUNT(*) and COUNT(column) are the same.
Fillings can tell queries apart, never prove them equal. They are drawn by a seed of schema and right query.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from tasks.sqlite import Tables, Value, results, table_columns, tokens

Columns = dict[str, dict[str, str]]  # {table: {column: declared type}}
Near = dict[str, list[Value]]  # by a column's name in lower case
Row = tuple[Value | None, ...]
Result = list[Row]

FILLINGS = 8  # that count, of each kind
TRIES = 48  # to find them
_FEWEST, _MOST = 12, 24  # rows of a table
_NUMBERS: list[Value] = [*range(100)]
_WORDS: list[Value] = [f"{syllable}{last}" for syllable in ("bo", "mi") for last in "bdfgklmnprst"]
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def same_results(schema: str, right: str, ours: str | None) -> bool | None:
    """Whether two queries give the same on every filling; None if no filling counts for the right one.

    Half of the fillings hold literals of the right query alone, the other half those of both.
    """
    columns = table_columns(schema) or {}
    rng, n_counted = random.Random(f"{schema}\n{right}"), 0
    ours = ours or ""  # which does not run
    for queries in ([right], [right, ours]):
        near = _near(columns, queries)
        tried = (_both(schema, _filling(columns, near, rng), right, ours) for _ in range(TRIES))
        for found, own in itertools.islice(filter(None, tried), FILLINGS):
            n_counted += 1
            if own is None or not _equal(found, own, _is_ordered(right)):
                return False
    return True if n_counted else None


def _both(schema: str, tables: Tables, right: str, ours: str) -> tuple[Result, Result | None] | None:
    """Results of both queries on one filling; None if it does not count."""
    found, own = results(schema, tables, [right, ours])
    if found is None or not any(value not in (None, 0) for row in found for value in row):
        return None
    (turned,) = results(schema, {name: rows[::-1] for name, rows in tables.items()}, [right])
    return (found, own) if turned is not None and _equal(found, turned, _is_ordered(right)) else None


# Results


def _is_ordered(query: str) -> bool:
    """Whether a query orders its rows, not only those of one in brackets."""
    found = tokens(query)
    depths = itertools.accumulate((word == "(") - (word == ")") for word in found)
    return any(word == "order" and depth == 0 for word, depth in zip(found, depths, strict=True))


def _equal(right: Result, ours: Result, ordered: bool) -> bool:
    """Whether results are the same, columns in any one order."""
    if len(right) != len(ours) or len(right[0]) != len(ours[0]):
        return False
    rows, own = [[tuple(map(_rounded, row)) for row in result] for result in (right, ours)]
    orders = _column_orders(list(zip(*rows, strict=True)), list(zip(*own, strict=True)))
    for order in itertools.islice(orders, 200):  # more only where many columns hold the same values
        moved = [tuple(row[i] for i in order) for row in own]
        if moved == rows if ordered else Counter(moved) == Counter(rows):
            return True
    return False


def _column_orders(right: Sequence[Row], ours: Sequence[Row]) -> Iterator[list[int]]:
    """Ways to order our columns so that each holds the same values as the right one at its place."""
    held = [Counter(column) for column in ours]
    fitting = [[i for i, values in enumerate(held) if values == Counter(column)] for column in right]

    def extend(order: list[int]) -> Iterator[list[int]]:
        if len(order) == len(fitting):
            yield order
            return
        for i in fitting[len(order)]:
            if i not in order:
                yield from extend([*order, i])

    return extend([])


def _rounded(value: Value | None) -> Value | None:
    return float(f"{value:.9g}") if isinstance(value, int | float) else value


# Fillings


def _near(columns: Columns, queries: Sequence[str]) -> Near:
    """Values for the columns that queries compare with a literal: it and its neighbours.

    A literal belongs to the last column named before it, or, at the start of a condition, to the next one.
    """
    known = {column.lower() for table in columns.values() for column in table}
    near: Near = {}
    for query in queries:
        column, waiting = None, []
        words = tokens(query)
        for before, word in zip(["", *words], words, strict=False):
            name = word.strip("'`").rpartition(".")[2].lower()
            if name in known:
                column = name
            elif word[0] == "'":
                waiting += _neighbours(word[1:-1], quoted=True)
            elif _NUMBER.fullmatch(word) and before not in ("limit", "offset"):
                waiting += _neighbours(f"-{word}" if before == "-" else word, quoted=False)
            if column is not None:
                near.setdefault(column, []).extend(waiting)
                waiting = []
    return {column: values for column, values in near.items() if values}


def _neighbours(literal: str, quoted: bool) -> list[Value]:
    """A literal, several times, and values beside it; of text also what it fits as a pattern of LIKE."""
    values: list[Value] = []
    if _NUMBER.fullmatch(literal.removeprefix("-")):
        number = float(literal)
        beside = [number - 1, number + 1, number - 2 - abs(number) // 2, 2 * abs(number) + 3]
        values = [int(value) if value % 1 == 0 else value for value in beside]
        if not quoted:
            return [*([int(number) if number % 1 == 0 else number] * 3), *values]
    text = literal.replace("''", "'")
    if "%" in text:
        values = [text.replace("%", filler).replace("_", "a") for filler in ("", "", "a", "bo ")]
    return [*([text] * 4), *(values or [f"{text}a", f"a{text}"])]


def _filling(columns: Columns, near: Near, rng: random.Random) -> Tables:
    """Rows for every table."""
    first = rng.choice((1, 1, 8, 75))
    numbers = _NUMBERS[first : first + _MOST]
    tables = {}
    for table, typed in columns.items():
        n_rows = rng.randint(_FEWEST, _MOST)
        cells = [_column(typed[name], near.get(name.lower()), n_rows, numbers, rng) for name in typed]
        tables[table] = list(zip(*cells, strict=True))
    return tables


def _column(
    declared: str, near: list[Value] | None, n_rows: int, numbers: list[Value], rng: random.Random
) -> list[Value]:
    """The cells of a column."""
    textual = not re.search("int|real|num|dec|floa|doub|bool", declared.lower())
    pool: list[Value] = rng.choice((numbers, _WORDS)) if textual else numbers
    if rng.random() < 0.4:  # no value twice, as in a key
        cells = rng.sample(pool, n_rows)
    else:
        cells = rng.choices(rng.sample(pool, rng.choice((2, 3, 5))), k=n_rows)
    if near:
        share = rng.choice((0.5, 0.8, 0.95))
        cells = [rng.choice(near) if rng.random() < share else cell for cell in cells]
    return cells
