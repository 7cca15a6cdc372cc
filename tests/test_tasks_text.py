"""Tasks whose answers are texts: samsum, sql and its metrics, wikitext."""

from __future__ import annotations

import pytest

from tasks import get_task
from tasks.rouge import rouge_1
from tasks.sqlite import result_columns, tokens

SQL = get_task("sql")
SAMSUM = get_task("samsum")


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat", "the cat sat down", 2 / 3),  # precision 1, recall 1/2
        ("Running DOGS!", "a dog runs", 0.8),  # stems; precision 1, recall 2/3
        ("the the the", "the cat", 0.4),  # a word counts as often as in the reference
        ("", "the cat", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_rouge_1(text: str, reference: str, expected: float):
    assert rouge_1(text, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Ann left.", "Ann left."),
        ("\n Ann left.\nBo stayed.\n", "Ann left. Bo stayed."),
        ("Ann left.\n\nDialogue:\nBo: hi", "Ann left."),
        ("Summary: Ann left.", "Summary: Ann left."),
        ("1,000", "1,000"),
        ("", None),
        (" \n\n ", None),
    ],
)
def test_samsum_extraction(completion: str, expected: str | None):
    assert SAMSUM.extract(completion) == expected


def test_samsum_row():
    (row,) = SAMSUM.unpack({"id": "1", "dialogue": "Ann: hi\r\nBo: bye\r\n", "summary": "Bo  leaves. "})
    assert SAMSUM.prompt(row) == "Dialogue:\nAnn: hi\nBo: bye\n\nSummary:\n"
    assert SAMSUM.target(row) == SAMSUM.gold(row) == "Bo leaves."
    assert SAMSUM.metrics(row, "Bo left") == {"rouge1": pytest.approx(0.5)}  # "leaves" and "left" differ
    assert SAMSUM.metrics(row, "") == {"rouge1": 0.0}
    with pytest.raises(ValueError, match="'summary' is empty"):
        list(SAMSUM.unpack({"dialogue": "a", "summary": " "}))


def test_samsum_real_rows(shared):
    for split, n in (("train", 2048), ("test", 100)):
        rows = SAMSUM.load(split, shared / "data")
        assert len(rows) == n
        assert not any("\r" in row["dialogue"] for row in rows)
        assert all(SAMSUM.extract(SAMSUM.target(row)) == SAMSUM.gold(row) for row in rows)


QUERY = "SELECT name FROM staff WHERE age > 3"

STATEMENTS = [
    (QUERY, QUERY),
    (f"{QUERY};", QUERY),
    (f"{QUERY}; SELECT 2", QUERY),  # the first of two
    (f"```sql\n{QUERY}\n```\nThis selects", QUERY),
    (f"```\n{QUERY}", QUERY),
    (f"The query is: {QUERY};", QUERY),
    ("WITH a AS (SELECT 1) SELECT * FROM a", "WITH a AS (SELECT 1) SELECT * FROM a"),
    ("SELECT name FROM staff WHERE a = 'x;y'; more", "SELECT name FROM staff WHERE a = 'x;y'"),
    ("SELECT a\nFROM b", "SELECT a\nFROM b"),
    ("I can't say", "I can't say"),
    ("", None),
    (";", None),
    ("```sql\n```", None),
]


@pytest.mark.parametrize(("completion", "expected"), STATEMENTS)
def test_sql_extraction(completion: str, expected: str | None):
    assert SQL.extract(completion) == expected


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


ROW = {"question": "Who?", "context": SCHEMA, "answer": "SELECT name FROM staff WHERE age = 3"}


@pytest.mark.parametrize(
    ("completion", "rouge1", "exact", "runs"),
    [
        ("SELECT name FROM staff WHERE age = 3", 1.0, 1.0, 1.0),
        ("select name from staff where age=3;", 1.0, 1.0, 1.0),
        ("SELECT name FROM staff", 8 / 11, 0.0, 1.0),
        ("SELECT age FROM staff WHERE age = 3", 6 / 7, 0.0, 0.0),
        ("SELECT wage FROM staff", 6 / 11, 0.0, 0.0),
        ("I do not know", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_sql_metrics(completion: str, rouge1: float, exact: float, runs: float):
    metrics = SQL.metrics(ROW, completion)
    assert list(metrics) == ["rouge1", "exact_match", "execution_match"]
    assert list(metrics) == [SQL.metric, *SQL.more_metrics]
    assert (metrics["exact_match"], metrics["execution_match"]) == (exact, runs)
    assert metrics["rouge1"] == pytest.approx(rouge1)


def test_execution_is_left_out_where_the_right_statement_does_not_run():
    row = {**ROW, "answer": "SELECT MAX(3 AS rd) FROM staff"}
    assert list(SQL.metrics(row, row["answer"])) == ["rouge1", "exact_match"]


def test_sql_real_rows(shared):
    for split, n in (("train", 7000), ("test", 500)):
        rows = SQL.load(split, shared / "data")
        assert len(rows) == n
        for row in rows:
            assert SQL.extract(SQL.target(row)) == SQL.gold(row)
    ran = [SQL.metrics(row, SQL.target(row)) for row in rows]
    assert sum("execution_match" in metrics for metrics in ran) == 485  # of 500; the others are no SQLite
    assert all(set(metrics.values()) == {1.0} for metrics in ran)


def test_wikitext_real_rows(shared):
    task = get_task("wikitext")
    rows = task.load("validation", shared / "data")
    whole = (shared / "data/tasks/wikitext/validation.txt").read_text(encoding="utf-8")
    assert "".join(row["text"] for row in rows).rstrip("\n") == whole.rstrip("\n")
    assert len(rows) == 60  # articles
    assert all(row["text"].lstrip().startswith("= ") for row in rows)
    # the published size of this split in words, an end of line being one
    assert sum(task.n_words(row) for row in rows) == 217646
    assert (task.prompt(rows[0]), task.target(rows[0])) == ("", rows[0]["text"])
    assert (task.scoring, task.metric) == (("perplexity",), "word_perplexity")


def test_wikitext_hub_lines(tmp_path, monkeypatch):
    import datasets

    lines = [
        "",
        " = One = \n",
        "",
        " Text . \n",
        " = = Part = = \n",
        "",
        " = Two = \n",
        "",
        " = 1 = in a text \n",
    ]
    rows = [{"text": line} for line in lines]
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: rows)
    articles = get_task("wikitext").load("test", tmp_path)
    assert [row["text"] for row in articles] == [
        "\n = One = \n\n Text . \n = = Part = = \n\n",
        " = Two = \n\n = 1 = in a text \n",
    ]
