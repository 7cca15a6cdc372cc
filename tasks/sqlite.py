"""SQL statements by their tokens, and run by sqlite3: in memory, only to read, and only for a moment."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
Value = str | float  # of a table's cell
Result = list[tuple[Value | None, ...]]
Tables = Mapping[str, Sequence[Sequence[Value]]]  # rows by the table's name

_WORD = r"(?:[\w$]|[^\x00-\x7f])+"  # to sqlite3 every character beyond ASCII is a letter
_TOKEN = re.compile(
    r"(?P<text>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`)"
    rf"|(?P<word>{_WORD}(?:\.{_WORD})*)|(?P<sign><>|[<>!=]=|\|\||\S)"
)
_TABLE = re.compile(
    r"CREATE\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?(?P<name>[^\s(]+)\s*\((?P<columns>.*)\)\s*\Z",
    re.IGNORECASE | re.DOTALL,
)
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
# A query may join without a condition, or be recursive and never end. Steps of sqlite's machine give the same
# verdict on every computer; seconds only stop what makes few and slow steps.
_STEPS, _LOOK = 500_000, 10_000  # the most, and between two looks at the clock
_SECONDS = 2.0
_LONGEST = 10_000  # bytes of a value or row
_ROWS = 10_000  # of a result


def tokens(statement: str) -> list[str]:
    """The tokens of a statement: words in lower case, quoted text as it is but in one kind of quote marks."""
    found = []
    for match in _TOKEN.finditer(statement.strip().rstrip(";")):
        if match["text"]:
            found.append(f"'{match['text'][1:-1]}'")
        else:
            found.append("!=" if match[0] == "<>" else match[0].lower())
    return found


def table_columns(schema: str) -> dict[str, dict[str, str]] | None:
    """{table: {column: declared type}} as sqlite3 reads a schema; None if it does not."""

    def read(database: sqlite3.Connection) -> dict[str, dict[str, str]]:
        listed = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        typed = "SELECT name, type FROM pragma_table_info(?)"
        return {name: dict(database.execute(typed, (name,)).fetchall()) for (name,) in listed}

    return _with_database(schema, {}, read)


def result_columns(schema: str, statement: str) -> list[list[str]] | None:
    """Names of a query's result columns, as tokens, on the schema's empty tables; None if it does not run."""

    def names(database: sqlite3.Connection) -> list[list[str]] | None:
        described = _guarded(database).execute(statement).description
        return None if described is None else [tokens(column[0]) for column in described]

    return _with_database(schema, {}, names)


def results(schema: str, tables: Tables, statements: Sequence[str]) -> list[Result | None]:
    """The rows that each query gives on filled tables; None for one that does not run, or gives too many."""

    def rows(database: sqlite3.Connection) -> list[Result | None]:
        _guarded(database)
        return [_rows(database, statement) for statement in statements]

    return _with_database(schema, tables, rows) or [None] * len(statements)


def _rows(database: sqlite3.Connection, statement: str) -> Result | None:
    _limit_time(database)
    try:
        cursor = database.execute(statement)
        found = cursor.fetchmany(_ROWS + 1)
    except _REFUSED:
        return None
    finally:
        database.set_progress_handler(None, 0)
    return None if cursor.description is None or len(found) > _ROWS else found


# a statement may also be too long, hold a NUL or half a character, or be two statements at once
_REFUSED = (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError)


def _with_database(schema: str, tables: Tables, use: Callable[[sqlite3.Connection], T]) -> T | None:
    """What `use` makes of a database in memory; None if schema, rows or use are refused by sqlite3.

    schema: CREATE TABLE statements, joined by ";"; a table that is created twice has the columns of both.
    """
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        try:
            for created in schema.split(";"):
                _create(database, created.strip())
            for name, rows in tables.items():
                marks = ", ".join("?" * len(rows[0]))
                # a row that breaks a constraint, such as UNIQUE, is left out
                database.executemany(f'INSERT OR IGNORE INTO "{name}" VALUES ({marks})', rows)
            return use(database)
        except _REFUSED:
            return None


def _guarded(database: sqlite3.Connection) -> sqlite3.Connection:
    """The database, from now on only to be read, without files and within bounds of time and memory."""
    database.execute("PRAGMA temp_store = MEMORY")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
    database.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY
    )
    _limit_time(database)
    return database


def _limit_time(database: sqlite3.Connection) -> None:
    """Let the next statement take so many steps and seconds."""
    looks, end = iter(range(_STEPS // _LOOK)), time.monotonic() + _SECONDS
    database.set_progress_handler(lambda: next(looks, None) is None or time.monotonic() > end, _LOOK)


def _create(database: sqlite3.Connection, statement: str) -> None:
    """Create a table; of one that exists already, add the columns that it lacks."""
    found = _TABLE.match(statement)
    if found is None:
        return
    name = found["name"].strip("`\"'[]").lower()
    tables = database.execute("SELECT lower(name) FROM sqlite_master WHERE type = 'table'").fetchall()
    if (name,) not in tables:
        database.execute(statement)
        return
    for column in found["columns"].split(","):
        with contextlib.suppress(sqlite3.OperationalError):  # it has that column
            database.execute(f"ALTER TABLE {found['name']} ADD COLUMN {column}")
