r"""Questions to SQL, given the tables (b-mc2/sql-create-context: WikiSQL and Spider, CC BY 4.0).

A row:
    {"question": "How many staff have the first name Ludie?", "context": "CREATE TABLE Staff (first_name
     VARCHAR)", "answer": "SELECT COUNT(*) FROM Staff WHERE first_name = \"Ludie\""}

Metrics: rouge1; exact_match of the statements' tokens, case, quote marks and blanks aside; execution_match:
sqlite3 runs the statement on the row's tables, which are empty, and its result columns are those of the right
one. The last is left out if sqlite3 does not accept the right statement itself.
The hub set has one split; there, 2 % of the rows, chosen by their hash, are the test split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tasks.base import HubSet, Row, text_of
from tasks.rouge import RougeTask
from tasks.sqlite import result_columns, tokens

_FENCE = re.compile(r"```(?:sql|sqlite)?\s*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_START = re.compile(r"\b(?:SELECT|WITH)\b", re.IGNORECASE)
_STATEMENT = re.compile(r"(?:'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|[^;])*")  # up to a ";" outside quotes


class SQL(RougeTask):
    name = "sql"
    more_metrics = ("exact_match", "execution_match")
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
        if right is not None:
            ours = None if extracted is None else result_columns(row["context"], extracted)
            found["execution_match"] = float(ours == right)
        return found

    def unpack(self, entry: Row) -> Iterator[Row]:
        fields = ("question", "context", "answer")
        row = {field: text_of(entry, field, empty=False).strip() for field in fields}
        yield {**row, "answer": row["answer"].rstrip("; \n")}


TASK = SQL()
