"""SQL statements compared without data: their tokens, and what sqlite3 makes of them on empty tables."""

from __future__ import annotations

import contextlib
import re
import sqlite3

_TOKEN = re.compile(
    r"(?P<text>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`)|(?P<word>\w+(?:\.\w+)*)|(?P<sign><>|[<>!=]=|\|\||\S)"
)
_TABLE = re.compile(
    r"CREATE\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?(?P<name>[^\s(]+)\s*\((?P<columns>.*)\)\s*\Z",
    re.IGNORECASE | re.DOTALL,
)
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_STEPS = 1_000_000  # of sqlite's virtual machine: a recursive query on empty tables can run for ever
_LARGEST = 1_000_000  # bytes of a value


def tokens(statement: str) -> list[str]:
    """The tokens of a statement: words in lower case, quoted text as it is but in one kind of quote marks."""
    found = []
    for match in _TOKEN.finditer(statement.strip().rstrip(";")):
        if match["text"]:
            found.append(f"'{match['text'][1:-1]}'")
        else:
            found.append("!=" if match[0] == "<>" else match[0].lower())
    return found


def result_columns(schema: str, statement: str) -> list[list[str]] | None:
    """Names of a query's result columns, as tokens, on the tables of a schema; None if it does not run.

    schema: CREATE TABLE statements, joined by ";"; a table that is created twice has the columns of both.
    The query may only read, and only for a moment.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        try:
            for created in schema.split(";"):
                _create(database, created.strip())
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST)
            database.set_authorizer(
                lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY
            )
            database.set_progress_handler(lambda: 1, _STEPS)
            cursor = database.execute(statement)
        # a statement may also be too long, hold a NUL or be two statements at once
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            return None
        return None if cursor.description is None else [tokens(column[0]) for column in cursor.description]


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
