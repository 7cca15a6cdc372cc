"""The packages of lota/ import each other in one direction, and the measurer of that finds what it should."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

import lota
from scripts import house, layers

ROOT = Path(__file__).resolve().parent.parent


def tree(root: Path, files: Mapping[str, str]) -> Path:
    """Write modules of lota/ under the root, `masks/files` as lota/masks/files.py, and make packages."""
    for name, source in {"__init__": "", **files}.items():
        path = root / "lota" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source, encoding="utf-8")
    return root


def pairs(arrows: list[layers.Arrow]) -> set[tuple[str, str, str]]:
    return {(arrow.source, arrow.target, arrow.when) for arrow in arrows}


def module_circles(root: Path) -> list[list[str]]:
    return layers.circles(layers.graph(layers.read_house(root).arrows))


# The checkout


@pytest.fixture(scope="module")
def checkout() -> layers.House:
    return layers.read_house(ROOT)


def test_no_modules_import_each_other_in_a_circle(checkout):
    assert layers.circles(layers.graph(checkout.arrows)) == []


def test_no_packages_import_each_other_in_a_circle(checkout):
    assert layers.circles(layers.graph(checkout.arrows, packages=True)) == []


def test_every_import_follows_the_order_of_layers(checkout):
    assert [str(arrow) for arrow in layers.back_arrows(checkout)] == []


def test_every_module_belongs_to_a_layer(checkout):
    assert layers.homeless(checkout) == []


def test_the_library_imports_neither_tasks_nor_scripts(checkout):
    assert [str(arrow) for arrow in checkout.outward] == []


def test_the_library_does_not_import_its_entry_points(checkout):
    assert [str(arrow) for arrow in checkout.facade] == []


def test_editors_see_the_names_that_the_package_gives():
    tree = ast.parse((ROOT / "lota" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name: node.module for node in block.body for alias in node.names} == lota._HOMES


# The measurer


def test_kinds_of_imports_are_told_apart(tmp_path):
    source = """
from typing import TYPE_CHECKING
from lota import system
import lota.models.policy
if TYPE_CHECKING:
    from lota.masks.mask import Mask
else:
    from .masks import files
def f():
    from lota.masks.mask import Mask
    from lota.data import batches
class C:
    async def g(self):
        import importlib
        importlib.import_module("lota.optim")
"""
    modules = ("system", "models/policy", "masks/mask", "masks/files", "data/batches", "optim/__init__")
    found = layers.read_house(tree(tmp_path, {"train": source, **dict.fromkeys(modules, "")}))
    assert pairs(found.arrows) == {
        ("lota.train", "lota.system", "import"),
        ("lota.train", "lota.models.policy", "import"),
        ("lota.train", "lota.masks.files", "import"),
        ("lota.train", "lota.masks.mask", "function"),  # also for types, which counts less
        ("lota.train", "lota.data.batches", "function"),
        ("lota.train", "lota.optim", "function"),
    }


def test_a_name_of_a_package_leads_to_the_package_and_a_module_to_the_module(tmp_path):
    files = {
        "masks/__init__": "from .mask import Mask",
        "masks/mask": "from . import files",
        "masks/files": "",
        "optim": "from lota.masks import Mask, files",
    }
    found = layers.read_house(tree(tmp_path, files))
    assert pairs(found.arrows) == {
        ("lota.optim", "lota.masks", "import"),
        ("lota.optim", "lota.masks.files", "import"),
        ("lota.masks", "lota.masks.mask", "import"),
        ("lota.masks.mask", "lota.masks.files", "import"),
    }


def test_a_circle_of_modules_is_found_through_functions_and_types(tmp_path):
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lota.data.c import x"
    a, b, c = "def f():\n    from lota.data.b import x", types, "from lota.data.a import x"
    root = tree(tmp_path, {"data/a": a, "data/b": b, "data/c": c, "data/d": "from lota.data.a import x"})
    circle = ["lota.data.a", "lota.data.b", "lota.data.c"]
    assert module_circles(root) == [circle]
    measured = house.measure(root)
    assert measured["module_circles"] == [circle]
    assert measured["module_circles_at_import"] == []
    assert measured["package_circles"] == []


def test_separate_circles_stay_separate(tmp_path):
    to = "from lota.data.{} import x".format
    files = {"a": to("b"), "b": to("a") + "\n" + to("c"), "c": to("d"), "d": to("c"), "e": to("a")}
    root = tree(tmp_path, {f"data/{name}": source for name, source in files.items()})
    assert module_circles(root) == [["lota.data.a", "lota.data.b"], ["lota.data.c", "lota.data.d"]]
    assert layers.floors(layers.graph(layers.read_house(root).arrows)) == 3


def test_packages_can_form_a_circle_where_modules_do_not(tmp_path):
    files = {
        "masks/a": "from lota.train.b import x",
        "masks/d": "",
        "train/b": "",
        "train/c": "from lota.masks.d import x",
    }
    root = tree(tmp_path, files)
    assert module_circles(root) == []
    found = layers.read_house(root)
    assert layers.circles(layers.graph(found.arrows, packages=True)) == [["masks", "train"]]
    assert pairs(layers.back_arrows(found)) == {("lota.masks.a", "lota.train.b", "import")}


def test_an_arrow_back_that_is_only_for_types_is_found(tmp_path):
    source = "import typing\nif typing.TYPE_CHECKING:\n    from lota.report.page import Page"
    found = layers.read_house(tree(tmp_path, {"masks/views": source, "report/page": ""}))
    assert [str(arrow) for arrow in layers.back_arrows(found)] == [
        "lota.masks.views:3 -> lota.report.page (for types)"
    ]


def test_floors_are_the_longest_path(tmp_path):
    files = {
        "report": "from lota import train, utils",
        "train": "from lota import models",
        "models": "from lota import utils",
        "utils": "",
        "data": "from lota import utils",
    }
    arrows = layers.read_house(tree(tmp_path, files)).arrows
    assert layers.floors(layers.graph(arrows)) == 4
    assert layers.floors(layers.graph(arrows[:0])) == 0


@pytest.mark.parametrize(
    "source, target, allowed",
    [
        ("config", "utils", True),
        ("config_checks", "config", True),
        ("config", "config_checks", False),
        ("utils", "system", False),
        ("data", "masks", True),
        ("masks", "data", False),
        ("share", "optim", False),
        ("optim", "share", False),
        ("report", "utils", True),
        ("plots", "utils", True),
        ("plots", "config", False),
        ("plots", "models", False),
        ("models", "plots", False),
        ("masks", "plots", True),
        ("evaluate", "train", False),
        ("train", "distributed", True),
        ("lotto", "report", False),
        ("masks", "masks", True),
    ],
)
def test_the_order_of_layers(source, target, allowed):
    assert layers.may_import(source, target) is allowed


def test_a_module_without_a_layer_is_named(tmp_path):
    root = tree(tmp_path, {"delta": "", "helpers": "", "misc/more": ""})
    assert layers.homeless(layers.read_house(root)) == ["lota.helpers", "lota.misc", "lota.misc.more"]


def test_imports_of_tasks_and_scripts_are_found(tmp_path):
    (tmp_path / "trainers.py").touch()
    source = "import os\nimport trainers\ndef f():\n    from tasks.base import Task"
    found = layers.read_house(tree(tmp_path, {"train": source, "__init__": "from scripts import demo"}))
    assert pairs(found.outward) == {
        ("lota.train", "trainers", "import"),
        ("lota.train", "tasks.base", "function"),
        ("lota", "scripts", "import"),
    }


def test_entry_points_stand_outside_and_may_not_be_imported(tmp_path):
    lazily = (
        "import typing\nif typing.TYPE_CHECKING:\n    from lota.train import T\n    from lota.delta import d"
    )
    train = "from lota import __version__, Mask\nfrom lota.delta import extract\nimport lota"
    files = {"__init__": lazily, "delta": "from lota.train import T", "train": train}
    found = layers.read_house(tree(tmp_path, files))
    assert found.arrows == []
    assert [(arrow.target, arrow.line) for arrow in found.facade] == [
        ("lota", 1),
        ("lota.delta", 2),
        ("lota", 3),
    ]


def test_text_is_counted(tmp_path):
    long = "def f():\n" + "    x = 1\n" * 60
    source = (
        f'"""One line."""\n# A comment.\nfrom typing import Any\nx: Any = 1  # no line of its own\n{long}'
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("x = 1\n" * 400)
    (tmp_path / "trainers.py").write_text("x = 1\n" * 35)
    measured = house.measure(tree(tmp_path, {"config": source}))
    assert measured["sizes"]["lota"] == {"modules": 2, "lines": 65}
    assert measured["sizes"]["all but tests"] == {"modules": 3, "lines": 100}
    assert measured["long_functions"] == {"lota/config.py:5 f": 61}
    assert measured["long_files"] == {}
    assert (measured["comment_percent"], measured["docstring_percent"]) == (1.0, 1.0)
    assert (measured["any"], measured["functions"], measured["function_median"]) == (1, 1, 61)


def test_the_command_measures_and_compares_with_a_git_ref(tmp_path, capsys):
    tree(tmp_path, {"utils": "", "models": "from lota import utils"})
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (tmp_path / "lota" / "utils.py").write_text("from lota import models\n", encoding="utf-8")
    numbers = tmp_path / "numbers.json"
    house.main(["--root", str(tmp_path), "--json", str(numbers)])
    shown = capsys.readouterr().out
    assert "circle of modules: lota.models, lota.utils" in shown
    assert "back: lota.utils:1 -> lota.models" in shown
    assert json.loads(numbers.read_text())["module_circles"] == [["lota.models", "lota.utils"]]
    house.main(["--root", str(tmp_path), "--compare", "HEAD"])
    shown = capsys.readouterr().out
    assert "| lota: modules / lines | 3 / 1 | 3 / 2 |" in shown
    assert "| back-arrows | 0 | 1 |" in shown
