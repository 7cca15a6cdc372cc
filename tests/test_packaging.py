"""The wheel of lota, installed where there is no checkout: complete, typed, and it names what it imports."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TEST_ENVIRONMENT = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the checkout, built of a copy, since building leaves files beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "lota", source / "lota", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", out, source, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with the wheel and, behind it, the packages of the test environment."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=folder)
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-I", "-c", show, cwd=folder).strip())
    (packages / "test_environment.pth").write_text("\n".join(TEST_ENVIRONMENT) + "\n")
    return python


def imported_by_lota() -> set[str]:
    """Top-level modules outside the standard library that any module of lota/ imports, wherever it does."""
    names = set()
    for path in (ROOT / "lota").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"lota"}


def declared(metadata: Message, optional: bool) -> set[str]:
    """Distributions that the wheel needs, or those that its extras need."""
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    extra = [bool(r.marker and "extra" in str(r.marker)) for r in requirements]
    return {canonicalize_name(r.name) for r, e in zip(requirements, extra, strict=True) if e == optional}


def modules_of(distributions: set[str]) -> set[str]:
    """What can be imported from these distributions, of those that are installed here."""
    return {
        module
        for module, names in packages_distributions().items()
        if {canonicalize_name(name) for name in names} & distributions
    }


def test_every_import_is_declared(metadata):
    known = modules_of(declared(metadata, optional=False) | declared(metadata, optional=True))
    # Triton comes with torch for CUDA and is used only there; vLLM imports lota into its own environment,
    # never the other way round
    assert sorted(imported_by_lota() - known) == ["triton", "vllm"]


def test_every_public_name_works_without_the_extras(metadata, installed, tmp_path):
    script = Path(__file__).with_name("use_installed.py")
    hidden = sorted(imported_by_lota() - modules_of(declared(metadata, optional=False)))
    assert "matplotlib" in hidden
    told = json.loads(run(installed, "-I", script, tmp_path, *hidden, cwd=tmp_path).splitlines()[-1])
    assert Path(told["file"]).is_relative_to(installed.parent.parent)
    assert told["version"] == metadata["Version"]
    assert told["unused"] == []


@pytest.mark.parametrize("module", ["lota.masks", "lota.delta"])
def test_the_commands_of_the_package_start(installed, tmp_path, module):
    assert "usage:" in run(installed, "-I", "-m", module, "--help", cwd=tmp_path)


def test_the_wheel_holds_the_package_and_that_it_is_typed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lota").rglob("*.py")}
    assert names == {*sources, "lota/py.typed"}


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lota.__version__"}
