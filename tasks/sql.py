r"""Questions to SQL, given the tables (b-mc2/sql-create-context: WikiSQL and Spider, CC BY 4.0).

A row:
    {"question": "How many staff have the first name Ludie?", "context": "CREATE TABLE Staff (first_name
     VARCHAR)", "answer": "SELECT COUNT(*) FROM Staff WHERE first_name = \"Ludie\""}

Metrics: rouge1; exact_match of the statements' tokens, case, quote marks and blanks aside; execution_match:
sqlite3 gives the same for the statement as for the right one, on the row's tables filled with made-up rows
(`tasks/sql_suite.py`); column_match: their result columns have the same names, whatever their conditions.
A statement that does not run scores 0 in the last two. Both are left out if the right one does not run, and
execution_match also if the right one finds nothing on any filling.
The hub set has one split; there, 2 % of the rows, chosen by their hash, are the test split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tasks.base import HubSet, Row, text_of
from tasks.rouge import RougeTask
from tasks.sql_suite import same_results
from tasks.sqlite import result_columns, tokens

_FENCE = re.compile(r"```(?:sql|sqlite)?\s*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# "With the tables above, ..." is prose
_START = re.compile(r"\bSELECT\b|\bWITH\s+(?:RECURSIVE\s+)?\w+\s*(?:\([^()]*\)\s*)?AS\b", re.IGNORECASE)
_STATEMENT = re.compile(r"(?:'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|[^;])*")  # up to a ";" outside quotes


class SQL(RougeTask):
    name = "sql"
    version = 2  # 1: execution_match ran on empty tables, and compared what is column_match now
    more_metrics = ("exact_match", "execution_match", "column_match")
    hub = HubSet(
        path="b-mc2/sql-create-context",
        revision="9d80a6a118b838d9defc3798d659a54a2ac2ff37",
        splits={"train": "train", "test": "train"},
        cut=0.02,
    )
    closing = "\n\nSQL:\n"
    stop = ("\n\n", "\nQuestion:", "\nTables:")
    max_new_tokens = 160

    def prompt(self, row: Row) -> str:
        return f"Tables:\n{row['context']}\n\nQuestion: {row['question']}{self.closing}"

    def target(self, row: Row) -> str:
        return row["answer"]

    def gold(self, row: Row) -> str | None:
        return row["answer"]

    def extract(self, completion: str) -> str | None:
        """The statement: of a code block if there is one, from SELECT or WITH if there is one, up to ";"."""
        fenced = _FENCE.search(completion)
        text = fenced[1] if fenced else completion
        if start := _START.search(text):
            text = text[start.start() :]
        statement = _STATEMENT.match(text.strip())
        return statement[0].strip() or None if statement else None

    def metrics(self, row: Row, completion: str) -> dict[str, float]:
        extracted, found = self.extract(completion), super().metrics(row, completion)
        found["exact_match"] = float(extracted is not None and tokens(extracted) == tokens(row["answer"]))
        right = result_columns(row["context"], row["answer"])
        if right is None:
            return found
        same = same_results(row["context"], row["answer"], extracted)
        if same is not None:
            found["execution_match"] = float(same)
        names = None if extracted is None else result_columns(row["context"], extracted)
        found["column_match"] = float(names == right)
        return found

    def unpack(self, entry: Row) -> Iterator[Row]:
        fields = ("question", "context", "answer")
        row = {field: text_of(entry, field, empty=False).strip() for field in fields}
        yield {**row, "answer": row["answer"].rstrip("; \n")}


TASK = SQL()
