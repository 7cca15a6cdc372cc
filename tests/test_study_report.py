"""What the studies show: tables agree in Markdown and on the page, and the page needs nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lota.report.page import Section, markdown, write_page
from scripts import budget_study, calibration_study, forgetting_study, granularity_study, sparsity_study
from scripts.study_report import Report
from scripts.terms import TERMS, terms_in
from scripts.workloads import SMOKE, sizes_key

HASH = "5ad" + "0" * 61
STUDIES = {"main": sparsity_study, "budget": budget_study, "curve": forgetting_study}

COUNTS = {  # of rows and of own text, as they are in the data
    "rows": {"train": 64, "validation": 8, "test": 7},
    "own_text": {"documents": 3, "bytes": 1234},
}


class Page(HTMLParser):
    """Tables as lines of cells, headings, list items, sources of pictures, and all tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        tag = self.inside
        if tag in ("th", "td"):
            self.tables[-1][-1][-1] += data
        self.texts.append((tag, data))


def tables_of(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown document."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    lines = [[line.strip("| ").split(" | ") for line in block.splitlines()] for block in blocks]
    return [[header, *rest] for header, _, *rest in lines]


def needs_nothing(page: Page, text: str) -> None:
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")


@pytest.fixture
def folder(tmp_path):
    """Results of three studies of one workload, alone in their folder."""
    sizes = sizes_key(SMOKE, HASH)
    losses = {"validation": 2.5, "nats": 2.125, "own": 1.0625, "score": 0.75, "trained": 71_270, "steps": 2}
    records = [{"cell": {"part": "base"}, **losses, "base": HASH, "trained": 1_234_567, **COUNTS}]
    for seed in (0, 1):
        for part in STUDIES:
            cell = {"part": part, "method": "LoTA", "sparsity": 0.9, "seed": seed, "lr": 0.01}
            records.append({"cell": cell, **losses, "nats": 2.0 + seed, "cpu_seconds": 900})
        other = {"part": "overlap", "method": "LoTA", "seed": seed, "with": ["LoTA", seed]}
        records.append({"cell": other, "iou": 1.0})
    rate = {"part": "rate", "method": "LoTA", "sparsity": 0.9, "seed": 100, "lr": 0.03}
    records.append({"cell": rate, "validation": 3.0})
    for record in records:
        record["cell"]["sizes"] = sizes
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.mark.parametrize("part", STUDIES)
def test_page(part, folder, capsys):
    study = STUDIES[part]
    study.main(["--report", "--out", str(folder)])
    name = study.REPORT.name
    assert {path.name for path in folder.iterdir()} == {
        "smoke.jsonl", f"{name}.md", f"{name}.png", f"{name}.html"
    }  # fmt: skip
    text, written = ((folder / f"{name}.{end}").read_text(encoding="utf-8") for end in ("html", "md"))
    page = Page(text)
    needs_nothing(page, text)
    assert written.strip() in capsys.readouterr().out
    assert page.tables and page.tables == tables_of(written)
    assert all(len(line) == len(table[0]) for table in page.tables for line in table)
    (lota,) = [line for line in page.tables[-1] if line[0] == "LoTA"]
    assert {"75.0 ± 0.0", "2.500 ± 0.500", "1.0625 ± 0.0000"} <= set(lota)
    # who reads it need not know the project
    shown = " ".join(data for _, data in page.texts)
    assert ("h2", "smoke") in page.texts and f"1,234,567 weights, SHA-256 of the weights {HASH}" in shown
    assert "2 steps of 8 rows" in shown and "7 test rows, the first 4 of them" in shown
    assert "own text: 3 documents, 1,234 bytes" in shown
    assert "Seeds of what is reported: 0, 1." in shown and "rates that were tried: 0.03." in shown
    assert "3 runs, 0.5 hours" in shown and "exact match" in shown
    assert {"LoTA", "mask", "sparsity", "nats per token", "own text", "exact match"} <= {
        data.partition(":")[0] for tag, data in page.texts if tag == "li"
    }
    study.main(["--report", "--out", str(folder)])  # a page of one's own is replaced


def test_sizes_of_another_version_are_not_told(folder):
    changed: Report = replace(sparsity_study.REPORT, workloads={})
    assert "2 steps of 8 rows" in changed.write(folder)
    file = folder / "smoke.jsonl"
    file.write_text(file.read_text().replace(sizes_key(SMOKE, HASH), "other"))
    text = changed.write(folder)
    assert "2 steps" not in text and "another version" in text and HASH in text


def test_a_folder_without_results_is_said(tmp_path):
    with pytest.raises(SystemExit, match="has no result of this study"):
        sparsity_study.main(["--report", "--out", str(tmp_path)])


def test_granularity_page(tmp_path):
    for task, workload in granularity_study.WORKLOADS.items():
        element = {"part": "main", "method": "element", "sparsity": 0.9, "seed": 0, "lr": 0.1}
        records = [
            {
                "cell": cell | {"sizes": sizes_key(workload, HASH)},
                "base": HASH,
                "trained": 9,
                "nats": 1.625,
                "mask": {"energy": 0.5},
                **COUNTS,
            }
            for cell in ({"part": "base"}, element)
        ]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    time = {"cell": {"part": "time", "sparsity": 0.9}, "seconds": {"full fine-tuning": 2.0}}
    time["seconds"] |= dict.fromkeys(granularity_study.KINDS, 1.5)
    (tmp_path / "times.jsonl").write_text(json.dumps(time) + "\n")
    granularity_study.main(["--report", "--out", str(tmp_path)])
    text = (tmp_path / "granularity.html").read_text(encoding="utf-8")
    page = Page(text)
    needs_nothing(page, text)
    assert page.tables == tables_of((tmp_path / "granularity.md").read_text(encoding="utf-8"))
    (element,) = [line for line in page.tables[0] if line[:2] == ["element", "0.9"]]
    assert element[2] == "0.75" and element.count("1.625") == 3
    assert {("h2", task) for task in granularity_study.WORKLOADS} <= set(page.texts)


def test_calibration_page(tmp_path):
    variants = list(calibration_study.VARIANTS)[1:]
    rows = {
        "base": HASH,
        "seeds": {"iou": [0.25], "nats": [1.5, 1.625]},
        "gradient": {"fp32 -> bf16": 0.9375},
    }
    rows |= {key: {"iou": [0.5 + i / 16], "nats": [2.0]} for i, key in enumerate(variants)}
    (tmp_path / "results.json").write_text(json.dumps({"toy_sort": rows}))
    calibration_study.main(["--report", "--out", str(tmp_path)])
    text = (tmp_path / "calibration.html").read_text(encoding="utf-8")
    page = Page(text)
    needs_nothing(page, text)
    assert page.tables == tables_of((tmp_path / "calibration.md").read_text(encoding="utf-8"))
    first, second = page.tables
    assert first[1] == ["fp32, another seed", "0.250", "1.500, 1.625"]
    assert [line[1] for line in first[2:]] == [f"{0.5 + i / 16:.3f}" for i in range(len(variants))]
    assert second[1:] == [["fp32 -> bf16", "0.938"]] and HASH in text


def test_terms_that_explain_terms_are_explained():
    found = [line.partition(":")[0] for line in terms_in(["What a frontier is"])]
    assert "own text" in found and "base" in found and "TIES" not in found
    assert found == [word for word in TERMS if word in found]
    assert terms_in(["nothing"]) == []


def test_a_page_in_its_own_words(tmp_path):
    """Markup in cells is shown as it is; sections without a title go on; paragraphs are apart."""
    table = [["a|b", "<i>"], ["1 < 2", "&"]]
    sections = [Section("T", "one\n\ntwo", table=table, level=3), Section("", items=["<b>"])]
    (path,) = write_page(tmp_path, "P", sections, name="p.html")
    page = Page(path.read_text())
    assert path.name == "p.html" and page.tables == [table]
    assert [data for tag, data in page.texts if tag in ("p", "h3", "li") and data.strip()] == [
        "T", "one", "two", "<b>"
    ]  # fmt: skip
    assert markdown(table).splitlines() == [r"| a\|b | <i> |", "| --- | --- |", "| 1 < 2 | & |"]
