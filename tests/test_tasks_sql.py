"""SQL answers: their tokens, the safety of running them, and what their execution tells apart."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tasks import get_task
from tasks.sql_suite import same_results
from tasks.sqlite import result_columns, results, table_columns, tokens


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ('SELECT a FROM b WHERE c = "x"', "select  A\nfrom B where C='x';", True),
        ("SELECT COUNT(*) FROM b", "SELECT COUNT( * ) FROM b", True),
        ("SELECT a FROM b WHERE c <> 1", "SELECT a FROM b WHERE c != 1", True),
        ("SELECT a FROM b WHERE c = 'X'", "SELECT a FROM b WHERE c = 'x'", False),
        ("SELECT a FROM b WHERE c = 'x  y'", "SELECT a FROM b WHERE c = 'x y'", False),
        ("SELECT a FROM b WHERE c >= 1", "SELECT a FROM b WHERE c > 1", False),
        ("SELECT a FROM b", "SELECT a, c FROM b", False),
    ],
)
def test_statements_are_compared_by_tokens(a: str, b: str, same: bool):
    assert (tokens(a) == tokens(b)) is same


SCHEMA = "CREATE TABLE staff (name VARCHAR, age INTEGER); CREATE TABLE shop (id VARCHAR)"


@pytest.mark.parametrize(
    ("statement", "columns"),
    [
        ("SELECT name, age FROM staff", [["name"], ["age"]]),
        ("SELECT Name AS n FROM staff", [["n"]]),
        ("SELECT COUNT( * ) FROM staff", [["count", "(", "*", ")"]]),
        ('SELECT name FROM staff WHERE name = "Ludie"', [["name"]]),
        ("SELECT * FROM shop", [["id"]]),
        ("SELECT salary FROM staff", None),
        ("SELECT name FROM nowhere", None),
        ("SELECT name FROM", None),
        ("SELECT 1; SELECT 2", None),
        ("SELECT name\0 FROM staff", None),
        ("DROP TABLE staff", None),
        ("INSERT INTO staff VALUES ('a', 1)", None),
        ("ATTACH DATABASE '{folder}/x.db' AS x", None),
        ("VACUUM INTO '{folder}/x.db'", None),
        ("PRAGMA table_info(staff)", None),
        ("CREATE TABLE x (a)", None),
        ("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT sum(n) FROM r", None),
        ("SELECT randomblob(1000000000)", None),
    ],
)
def test_result_columns(statement: str, columns: list | None, tmp_path):
    assert result_columns(SCHEMA, statement.format(folder=tmp_path)) == columns
    assert not list(tmp_path.glob("x*"))  # nothing that a model writes reaches the disk


def test_a_table_created_twice_has_all_columns():
    schema = "CREATE TABLE trip (a VARCHAR, id VARCHAR); CREATE TABLE Trip (b VARCHAR, id VARCHAR)"
    assert result_columns(schema, "SELECT a, b, id FROM trip") == [["a"], ["b"], ["id"]]


SQL = get_task("sql")
ROW = {"question": "Who?", "context": SCHEMA, "answer": "SELECT name FROM staff WHERE age = 3"}


@pytest.mark.parametrize(
    ("completion", "rouge1", "exact", "execution", "columns"),
    [
        ("SELECT name FROM staff WHERE age = 3", 1.0, 1.0, 1.0, 1.0),
        ("select name from staff where age=3;", 1.0, 1.0, 1.0, 1.0),
        ("SELECT s.name FROM staff AS s WHERE NOT s.age != 3", 9 / 13, 0.0, 1.0, 1.0),
        ("SELECT name AS n FROM staff WHERE age = 3", 14 / 16, 0.0, 1.0, 0.0),
        ("SELECT name FROM staff", 8 / 11, 0.0, 0.0, 1.0),  # right by its columns alone
        ("SELECT name FROM staff WHERE age = 4", 6 / 7, 0.0, 0.0, 1.0),
        ("SELECT age FROM staff WHERE age = 3", 6 / 7, 0.0, 0.0, 0.0),
        ("SELECT wage FROM staff", 6 / 11, 0.0, 0.0, 0.0),
        ("I do not know", 0.0, 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_sql_metrics(completion: str, rouge1: float, exact: float, execution: float, columns: float):
    metrics = SQL.metrics(ROW, completion)
    assert list(metrics) == [SQL.metric, *SQL.more_metrics]
    expected = {"exact_match": exact, "execution_match": execution, "column_match": columns}
    assert metrics == {"rouge1": pytest.approx(rouge1, abs=0.05), **expected}


def test_execution_is_left_out_if_the_right_statement_does_not_run():
    row = {**ROW, "answer": "SELECT MAX(3 AS rd) FROM staff"}
    assert list(SQL.metrics(row, row["answer"])) == ["rouge1", "exact_match"]
    row["answer"] = "SELECT name FROM staff WHERE 1999 = 'x'"  # it finds nothing, whatever the rows
    assert list(SQL.metrics(row, row["answer"])) == ["rouge1", "exact_match", "column_match"]


# What execution tells apart. A query: others that mean the same, and others that do not.

CLUB = (
    "CREATE TABLE member (id INTEGER, name VARCHAR, age INTEGER, city VARCHAR);"
    "CREATE TABLE visit (member_id INTEGER, place VARCHAR, year INTEGER)"
)
SUITE: dict[str, tuple[list[str], list[str]]] = {
    "SELECT name FROM member WHERE city = 'Rome' AND age > 30": (
        [
            "SELECT m.name FROM member m WHERE m.age > 30 AND m.city = 'Rome'",
            "SELECT name FROM member WHERE city = 'Rome' AND NOT age <= 30",
            'SELECT name AS "who" FROM member WHERE city IN ("Rome") AND 30 < age',
            "WITH r AS (SELECT * FROM member WHERE city = 'Rome') SELECT name FROM r WHERE age >= 31",
        ],
        [
            "SELECT name FROM member WHERE city = 'Rome' AND age >= 30",
            "SELECT name FROM member WHERE city = 'Rome' OR age > 30",
            "SELECT name FROM member WHERE city = 'Rome'",
            "SELECT name FROM member WHERE age > 30",
            "SELECT name FROM member WHERE city = 'Roma' AND age > 30",
            "SELECT name FROM member WHERE city = 'rome' AND age > 30",
            "SELECT name FROM member WHERE city = 'Rome' AND age > 31",
            "SELECT name FROM member WHERE city = 'Rome' AND age < 30",
            "SELECT DISTINCT name FROM member WHERE city = 'Rome' AND age > 30",
            "SELECT city FROM member WHERE city = 'Rome' AND age > 30",
            "SELECT name, age FROM member WHERE city = 'Rome' AND age > 30",
            "SELECT name FROM member WHERE city = 'Rome' AND age > 30 LIMIT 1",
            "SELECT name FROM member WHERE city = 'Rome' AND age > 30 OR city = 'Bonn'",
            "SELECT name FROM member WHERE city = 'Rome' AND age > 30 AND id <> 77",
        ],
    ),
    "SELECT COUNT(*) FROM member WHERE city = 'Rome'": (
        ["SELECT COUNT(name) FROM member WHERE city = 'Rome'", "SELECT SUM(city = 'Rome') FROM member"],
        [
            "SELECT COUNT(DISTINCT name) FROM member WHERE city = 'Rome'",
            "SELECT COUNT(*) FROM member",
            "SELECT name FROM member WHERE city = 'Rome'",
            "SELECT 3",
        ],
    ),
    "SELECT AVG(age), MAX(age) FROM member": (
        ["SELECT MAX(age), SUM(age) * 1.0 / COUNT(*) FROM member"],
        ["SELECT AVG(age), MIN(age) FROM member", "SELECT AVG(id), MAX(age) FROM member"],
    ),
    "SELECT name FROM member ORDER BY age DESC LIMIT 1": (
        ["SELECT name FROM (SELECT * FROM member ORDER BY age) ORDER BY -age LIMIT 1"],
        [
            "SELECT name FROM member ORDER BY age LIMIT 1",
            "SELECT name FROM member ORDER BY id DESC LIMIT 1",
            "SELECT name FROM member WHERE age = (SELECT MAX(age) FROM member)",  # all of those equally old
        ],
    ),
    "SELECT name FROM member ORDER BY age": (
        ["SELECT name FROM member ORDER BY age ASC"],
        ["SELECT name FROM member", "SELECT name FROM member ORDER BY name"],
    ),
    "SELECT name FROM member WHERE name LIKE '%an%'": (
        ["SELECT name FROM member WHERE instr(lower(name), 'an')"],
        ["SELECT name FROM member WHERE name LIKE 'an%'", "SELECT name FROM member WHERE name = 'an'"],
    ),
    "SELECT T1.name FROM member AS T1 JOIN visit AS T2 ON T1.id = T2.member_id WHERE T2.place = 'zoo'": (
        [
            "SELECT name FROM visit, member WHERE place = 'zoo' AND id = member_id",
            "SELECT b.name FROM visit a INNER JOIN member b ON a.member_id = b.id AND a.place = 'zoo'",
        ],
        [
            "SELECT name FROM member WHERE id IN (SELECT member_id FROM visit WHERE place = 'zoo')",
            "SELECT T1.name FROM member AS T1 JOIN visit AS T2 ON T1.id = T2.year WHERE T2.place = 'zoo'",
            "SELECT T1.name FROM member AS T1, visit AS T2 WHERE T2.place = 'zoo'",
        ],
    ),
    "SELECT city FROM member GROUP BY city HAVING COUNT(*) >= 3": (
        ["SELECT city FROM (SELECT city, COUNT(id) AS n FROM member GROUP BY city) WHERE n > 2"],
        [
            "SELECT city FROM member GROUP BY city HAVING COUNT(*) > 3",
            "SELECT city FROM member GROUP BY city",
            "SELECT DISTINCT city FROM member WHERE age >= 3",
        ],
    ),
    "SELECT name FROM member EXCEPT SELECT place FROM visit": (
        ["SELECT DISTINCT name FROM member WHERE name NOT IN (SELECT place FROM visit)"],
        ["SELECT name FROM member UNION SELECT place FROM visit", "SELECT DISTINCT name FROM member"],
    ),
}
PAIRS = [(right, ours, same) for right, both in SUITE.items() for same in (1, 0) for ours in both[1 - same]]


@pytest.mark.parametrize(("right", "ours", "same"), PAIRS)
def test_execution_tells_queries_apart_by_their_meaning(right: str, ours: str, same: int):
    metrics = SQL.metrics({"question": "?", "context": CLUB, "answer": right}, ours)
    assert metrics["execution_match"] == same


def test_fillings_are_the_same_every_time_and_need_no_order_of_rows(monkeypatch):
    right = "SELECT name FROM member ORDER BY age LIMIT 2"
    drawn: list[list] = []
    monkeypatch.setattr(
        "tasks.sql_suite.results", lambda *given: drawn[-1].append(given[1]) or results(*given)
    )
    for _ in range(2):
        drawn.append([])
        assert same_results(CLUB, right, "SELECT name FROM member ORDER BY age, name LIMIT 2")
    assert drawn[0] == drawn[1]
    rows = [row for tables in drawn[0] for row in tables["member"]]
    assert len({row[1] for row in rows}) > 10 and not any(value is None for row in rows for value in row)


def test_what_depends_on_the_order_of_rows_is_not_compared():
    schema, first = "CREATE TABLE keys (a, b, c, d, e, f, g, h)", "SELECT * FROM keys LIMIT 1"
    assert same_results(schema, first, first) is None
    assert same_results(schema, "SELECT a FROM keys ORDER BY a LIMIT 1", "SELECT MIN(a) FROM keys") is True


@pytest.mark.parametrize(
    "statement",
    [
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT sum(n) FROM r",
        "WITH RECURSIVE r(t) AS (SELECT 'aa' UNION ALL SELECT t || t FROM r) SELECT t FROM r ORDER BY t",
        "SELECT a.name FROM " + ", ".join(f"member {name}" for name in "abcdefgh"),
        "SELECT randomblob(1000000000)",
        "ATTACH DATABASE '{folder}/x.db' AS x",
        "VACUUM INTO '{folder}/x.db'",
        "DELETE FROM member",
        "UPDATE member SET age = 1",
        "SELECT name FROM member; SELECT 1",
        "SELECT load_extension('{folder}/x')",
        "SELECT \ud800 FROM member",
        "",
    ],
)
def test_a_query_can_neither_write_nor_go_on(statement: str, tmp_path):
    """Nor does it harm the one that runs after it on the same tables."""
    tables, fine = {"member": [(1, "a", 30, "Rome")] * 20}, "SELECT COUNT(*), MIN(age) FROM member"
    start = time.monotonic()
    assert results(CLUB, tables, [statement.format(folder=tmp_path), fine]) == [None, [(20, 30)]]
    assert time.monotonic() - start < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "declared",
    ["a INTEGER UNIQUE, b", "a INTEGER PRIMARY KEY, b REAL NOT NULL", "a, b", "a DATE, b TEXT CHECK (b > 3)"],
)
def test_tables_with_types_and_constraints_can_be_filled(declared: str):
    schema = f"CREATE TABLE things ({declared})"
    assert (
        same_results(schema, "SELECT a FROM things WHERE b > 4", "SELECT a FROM things WHERE b > 5") is False
    )
    assert same_results(schema, "SELECT a FROM things", "SELECT x.a FROM things x") is True


# The published rows, and the same with one thing changed

_WORD = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|\w+(?:\.\w+)*|<>|[<>!=]=|\S""")
_CONDITION = r"""\S+\s*(?:<>|[<>!=]=|[=<>])\s*(?:'[^']*'|"[^"]*"|[\d.]+)"""
OTHERS = {
    "=": ("!=",), ">": ("<", ">="), "<": (">", "<="), ">=": (">",), "<=": ("<",), "and": ("OR",),
    "or": ("AND",), "max": ("MIN",), "min": ("MAX",), "sum": ("AVG",), "avg": ("SUM",), "count": ("MAX",),
    "distinct": ("",), "desc": ("ASC",), "asc": ("DESC",), "intersect": ("EXCEPT",),
    "except": ("INTERSECT",), "not": ("",),
}  # fmt: skip


def changed(schema: str, query: str) -> Iterator[tuple[str, str]]:
    """(what is changed, the query with one such change)."""
    tables = [[column.lower() for column in table] for table in table_columns(schema).values()]
    found = list(_WORD.finditer(query))
    words = ["", "", *(match[0].lower() for match in found)]
    for i, match in enumerate(found):
        before, after = query[: match.start()], query[match.end() :]
        *previous, word = words[i : i + 3]
        name = word.rpartition(".")[2]
        others = [other for table in tables if name in table for other in table if other != name]
        if word[0] in "'\"" and not any(word[1:-1] in table for table in tables):
            yield "a literal", f"{before}{match[0][:-1]}s{word[-1]}{after}"
        elif re.fullmatch(r"\d+", word):
            yield "a literal", f"{before}{int(word) + 1}{after}"
        elif previous != ["count", "("] and previous[1] not in ("as", "from", "join"):
            yield from (("a column", before + word.removesuffix(name) + other + after) for other in others)
        if not (word == "and" and "between" in words):
            yield from (("an operator", before + other + after) for other in OTHERS.get(word, ()))
    if "BETWEEN" not in query and (last := re.search(rf"\s+(?:WHERE|AND|OR)\s+{_CONDITION}\s*\Z", query)):
        yield "a condition left out", query[: last.start()]


def told_apart(rows: list[dict[str, str]], seed: int = 0) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """How many rows are scored, and per kind of change how many queries are told apart by which check."""
    rng, scored = random.Random(seed), Counter({"rows": len(rows)})
    found = {kind: Counter() for kind in ("a literal", "a column", "an operator", "a condition left out")}
    for row in rows:
        schema, right = row["context"], row["answer"]
        columns = result_columns(schema, right)
        scored["run"] += columns is not None
        same = same_results(schema, right, right) if columns is not None else None
        assert same is not False
        scored["execution_match"] += same is not None
        for kind, counts in found.items() if same else ():
            made = [ours for what, ours in changed(schema, right) if what == kind]
            made = [ours for ours in made if ours.lower() != right.lower() and result_columns(schema, ours)]
            if made:
                ours = rng.choice(made)
                counts["queries"] += 1
                counts["execution_match"] += same_results(schema, right, ours) is False
                counts["column_match"] += result_columns(schema, ours) != columns
    return scored, found


def test_published_queries_are_told_from_changed_ones(shared):
    """The table of docs/TASKS.md is this one over all rows of the test split."""
    rows = SQL.load("test", shared / "data")
    scored, found = told_apart(random.Random(1).sample(rows, 100))
    assert scored["execution_match"] >= 0.95 * scored["run"] >= 0.9 * scored["rows"]
    for kind, counts in found.items():
        assert counts["queries"] > 70
        assert counts["execution_match"] >= 0.96 * counts["queries"], kind
        assert counts["column_match"] <= 0.5 * counts["queries"]


def test_published_queries_written_in_another_way_are_right(shared):
    for row in random.Random(2).sample(SQL.load("test", shared / "data"), 100):
        if not re.fullmatch(r"SELECT [^()]+ FROM \w+ WHERE .+", row["answer"]) or "LIMIT" in row["answer"]:
            continue
        nested = row["answer"].replace(" WHERE ", " WHERE NOT NOT (", 1) + ")"
        metrics = SQL.metrics(row, f"SELECT * FROM ({nested})")
        assert metrics.get("execution_match", 1.0) == 1.0, nested
