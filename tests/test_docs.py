"""The documents are true: links, layout, settings, the library example, and every command's flags."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from prepared import python
from runs import composed

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "masks/README.md", *ROOT.glob("docs/*.md")]
BLOCK = re.compile(r"^```(?:bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
TRAINING = ("train_single_gpu.py", "lotto.py")  # Hydra's overrides, not flags


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    for link in links(document):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_linked():
    linked = {(d.parent / link.partition("#")[0]).resolve() for d in DOCUMENTS for link in links(d)}
    assert {d.resolve() for d in DOCUMENTS} - linked <= {ROOT / "README.md"}
    assert set(ROOT.glob("docs/*.png")) <= linked


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


def test_the_layout_names_every_folder_and_package():
    block = README.split("## Layout")[1].split("```")[1]
    named = re.findall(r"(?:^|[ ;,])(\w+)/", block, re.MULTILINE)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(file) for file in listed.stdout.split("\0") if file]
    folders = {file.parts[0] for file in files if len(file.parts) > 1 and not file.parts[0].startswith(".")}
    packages = {file.parts[1] for file in files if file.parts[0] == "lota" and len(file.parts) > 2}
    assert folders | packages <= set(named)
    assert all(
        (ROOT / name).is_dir() or (ROOT / "lota" / name).is_dir() or name == "extract" for name in named
    )


def test_the_settings_of_the_readme_are_those_of_the_whole_table():
    def rows(text: str) -> dict[str, tuple[str, str]]:
        found = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (.*?) \|$", text, re.MULTILINE)
        return {key: (default, meaning) for key, default, meaning in found}

    few = rows(README.split("## The settings that matter most")[1].split("\n## ")[0])
    assert len(few) == 10
    everything = rows((ROOT / "docs/SETTINGS.md").read_text(encoding="utf-8"))
    assert {key: everything.get(key) for key in few} == few


def test_the_library_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README.split("## As a library")[1], re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    first = scope["AutoModelForCausalLM"].from_pretrained("assets/tiny-llama")
    start = first(input_ids=scope["ids"], labels=scope["ids"]).loss.item()
    assert scope["loss"] < start
    assert scope["lota"].Mask.load("0.9_mask.pt").n_kept == scope["mask"].n_kept > 0


def commands() -> list[list[str]]:
    """The words of every command in the documents that starts Python."""
    found = []
    for document in DOCUMENTS:
        for block in BLOCK.findall(document.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if re.match(r"(\w+=\S+ )*python ", line) else []
                if words:
                    words = words[words.index("python") + 1 :]
                    found.append([word for word in words if word != "-u"])
    return found


def test_the_training_commands_compose():
    trainings = [words[1:] for words in commands() if words[0] == "train_single_gpu.py"]
    assert len(trainings) >= 8
    for words in trainings:
        given = [word.replace("$BASE", "base") for word in words if word != "-m"]
        given = given if any(word.startswith("exp_name=") for word in given) else [*given, "exp_name=a"]
        first = [re.sub(r"^(\+?[\w.]+)=([^\[]*?),.*", r"\1=\2", word) for word in given]  # of a sweep
        assert composed(*first).exp_name


@pytest.mark.slow
def test_the_other_commands_have_the_flags_that_the_documents_use():
    used: dict[tuple[str, ...], set[str]] = {}
    for words in commands():
        size = 2 if words[0] == "-m" else 1
        program = tuple(words[:size])
        if words[0] in TRAINING or program == ("-m", "venv") or program == ("-m", "pytest"):
            continue
        if program in (("-m", "lota.delta"), ("-m", "lota.masks")):
            program = tuple(words[:3])
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        used.setdefault(program, set()).update(flags)
    assert len(used) >= 12
    for program, flags in used.items():
        if flags:
            command = [python(), *program, "--help"]
            shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            assert flags <= set(re.findall(r"--[\w-]+", shown)), program
