"""Measure the structure of the code: sizes, import floors, circles and arrows against the order of layers.

    python -m scripts.house [--root FOLDER] [--json FILE] [--compare REF]

The order of layers stands in scripts/layers.py. Sizes of functions and shares of comments are those of all
Python files outside tests/; a file of a working tree counts whether git tracks it or not.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import subprocess
import tempfile
import tokenize
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts import layers

ROOT = Path(__file__).resolve().parent.parent
LONG_FUNCTION, LONG_FILE = 50, 300  # lines
SIZE = ": modules / lines"  # ends the labels of sizes


def python_files(root: Path) -> dict[str, list[Path]]:
    """Python files by area: `lota` (modules directly in it), `lota/masks` and so on, `root`, and the rest."""
    areas: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((root / "lota").rglob("*.py")):
        package = path.relative_to(root).parts[1:-1]
        areas[f"lota/{package[0]}" if package else "lota"].append(path)
    areas["root"] = sorted(root.glob("*.py"))
    for name in layers.OUTSIDE:
        areas[name] = sorted((root / name).rglob("*.py"))
    return {area: files for area, files in areas.items() if files}


def text_of(files: Iterable[Path], root: Path) -> dict[str, Any]:
    """Lengths of files and functions, and shares of comment and docstring lines."""
    lines = commented = documented = 0
    lengths: dict[str, int] = {}
    long_files = {}
    for path in files:
        source = path.read_text(encoding="utf-8")
        n, where = len(source.splitlines()), path.relative_to(root).as_posix()
        lines += n
        if n > LONG_FILE:
            long_files[where] = n
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        commented += sum(t.type == tokenize.COMMENT and t.line.lstrip().startswith("#") for t in tokens)
        for node in ast.walk(ast.parse(source)):
            documented += _docstring_lines(node)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{where}:{node.lineno} {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    return {
        "functions": len(lengths),
        "function_median": statistics.median(lengths.values()) if lengths else 0,
        "function_mean": round(statistics.fmean(lengths.values()), 1) if lengths else 0,
        "long_functions": {name: n for name, n in lengths.items() if n > LONG_FUNCTION},
        "long_files": long_files,
        "comment_percent": round(100 * commented / max(lines, 1), 1),
        "docstring_percent": round(100 * documented / max(lines, 1), 1),
    }


def _docstring_lines(node: ast.AST) -> int:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return 0
    if ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


def uses_of_any(files: Iterable[Path]) -> int:
    """How often annotations and expressions name `typing.Any`."""
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return sum(getattr(node, "id", getattr(node, "attr", None)) == "Any" for node in nodes)


# The whole


def measure(root: Path) -> dict[str, Any]:
    """All numbers of a tree, as plain values."""
    areas = python_files(root)
    in_lota = [path for area, files in areas.items() if area.split("/")[0] == "lota" for path in files]
    code = [path for area, files in areas.items() if area != "tests" for path in files]
    readme = root / "README.md"
    house = layers.read_house(root)
    sizes = {area: _size(files) for area, files in areas.items()}
    return {
        "sizes": {**sizes, "all of lota": _size(in_lota), "all but tests": _size(code)},
        "readme_lines": len(readme.read_text(encoding="utf-8").splitlines()) if readme.exists() else 0,
        "arrows": {when: sum(a.when == when for a in house.arrows) for when in layers.WHEN},
        **_shape(house, "module", packages=False),
        **_shape(house, "package", packages=True),
        "back_arrows": [asdict(a) | {"text": str(a)} for a in layers.back_arrows(house)],
        "facade_arrows": [asdict(a) | {"text": str(a)} for a in house.facade],
        "outward_arrows": [asdict(a) | {"text": str(a)} for a in house.outward],
        "homeless": layers.homeless(house),
        **text_of(code, root),
        "any": uses_of_any(in_lota),
    }


def _size(files: list[Path]) -> dict[str, int]:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    return {"modules": len(files), "lines": lines}


def _shape(house: layers.House, level: str, packages: bool) -> dict[str, Any]:
    """Floors and circles at one level; `_at_import` counts only imports that run when a module is loaded."""
    everything = layers.graph(house.arrows, packages)
    at_import = layers.graph((a for a in house.arrows if a.when == "import"), packages)
    return {
        f"{level}_floors": layers.floors(everything),
        f"{level}_circles": layers.circles(everything),
        f"{level}_circles_at_import": layers.circles(at_import),
    }


def summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    """One number per line of a report."""
    sizes, arrows = measured["sizes"], measured["arrows"]
    size = {name: "{modules} / {lines:,}".format(**sizes[name]) for name in sizes}
    total = sum(arrows.values())
    return {
        **{f"{name}{SIZE}": text for name, text in size.items()},
        "README lines": measured["readme_lines"],
        "arrows (in functions, for types)": f"{total} ({arrows['function']}, {arrows['types']})",
        "import floors of modules / packages": f"{measured['module_floors']} / {measured['package_floors']}",
        **{
            f"circles of {level}s (at import)": f"{len(measured[f'{level}_circles'])} "
            f"({len(measured[f'{level}_circles_at_import'])})"
            for level in ("module", "package")
        },
        "back-arrows": len(measured["back_arrows"]),
        "imports of an entry point": len(measured["facade_arrows"]),
        "imports of tasks/ and scripts by lota/": len(measured["outward_arrows"]),
        "modules in no layer": len(measured["homeless"]),
        "functions: number, median / mean lines": f"{measured['functions']}, "
        f"{measured['function_median']:g} / {measured['function_mean']:g}",
        f"functions > {LONG_FUNCTION} lines": len(measured["long_functions"]),
        f"files > {LONG_FILE} lines": len(measured["long_files"]),
        "comments of whole lines / docstrings, percent": f"{measured['comment_percent']} / "
        f"{measured['docstring_percent']}",
        "uses of Any in lota/": measured["any"],
    }


def details(measured: Mapping[str, Any]) -> Iterator[str]:
    """What stands behind the counts, one finding per line."""
    for level in ("module", "package"):
        for circle in measured[f"{level}_circles"]:
            yield f"circle of {level}s: {', '.join(circle)}"
        for circle in measured[f"{level}_circles_at_import"]:
            yield f"circle of {level}s at import: {', '.join(circle)}"
    names = {"back_arrows": "back", "facade_arrows": "entry point", "outward_arrows": "outward"}
    for key, label in names.items():
        yield from (f"{label}: {arrow['text']}" for arrow in measured[key])
    if measured["homeless"]:
        yield f"in no layer: {', '.join(measured['homeless'])}"
    for key in ("long_functions", "long_files"):
        yield from (f"{n} lines: {name}" for name, n in measured[key].items())


def measure_ref(root: Path, ref: str) -> dict[str, Any]:
    """The numbers of a git ref, read from a temporary copy."""
    command = ["git", "-C", str(root), "archive", "--format=zip", ref]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
        return measure(Path(folder))


def compared(ref: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a Markdown table: the sizes of all areas that one side has, then what both have."""
    areas = sorted(label for label in {**before, **after} if label.endswith(SIZE))
    yield from (f"| | {ref} | now |", "|---|---|---|")
    for label in [*areas, *(label for label in after if label not in areas)]:
        yield f"| {label} | {before.get(label, '-')} | {after.get(label, '-')} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--compare", metavar="REF", help="git ref; prints a Markdown table, before and after")
    args = parser.parse_args(arguments)
    measured = measure(args.root)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    after = summary(measured)
    if args.compare:
        print(*compared(args.compare, summary(measure_ref(args.root, args.compare)), after), sep="\n")
        return
    width = max(len(label) for label in after) + 2
    for label, value in after.items():
        print(f"{label:<{width}}{value}")
    print(*details(measured), sep="\n")


if __name__ == "__main__":
    main()
