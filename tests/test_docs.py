"""The documents are true: links, layout, settings, the library example, and every command's flags."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from prepared import python
from runs import composed

from tests.evaluations import write_rows

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCALING = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")
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
    inside, heads = "", list[Path]()
    for indent, name in re.findall(r"^( *)(\w+)/", block, re.MULTILINE):
        inside = inside if indent else name
        heads.append(ROOT / inside / name if indent else ROOT / name)
    assert all(head.is_dir() for head in heads) and len(heads) == len(set(heads))


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


# What stands in the README, and what a test has in its place: a small model, few rows and tokens.
SMALLER = {
    "~/.cache/lota": "{cache}",
    "meta-llama/Llama-3.2-1B": "{root}/assets/tiny-llama",
    "py exp_name=": "py max_length=64 max_prompt_length=32 n_eval_examples=2 exp_name=",
    "py -m exp_name=": "py -m max_length=64 max_prompt_length=32 n_eval_examples=2 exp_name=",
    "torchrun --standalone --nproc-per-node 8": "python -m torch.distributed.run --nproc-per-node=2",
    '--datasets "gsm8k"': '--datasets "gsm8k" --max_new_tokens 4',
    "--temperatures 0.7": "--temperatures 0.7 --max_length 64 --max_prompt_length 32",
}


def copy_of_the_checkout(folder: Path) -> Path:
    """The files that git knows, as they are now, committed in a repository of their own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # not one that is deleted and not committed yet
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order_and_leave_nothing_behind(tmp_path):
    """The bash blocks in one shell, as a newcomer types them, then the library example in the same place."""
    checkout, cache = copy_of_the_checkout(tmp_path / "checkout"), tmp_path / "cache"
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
    for split in ("train", "test"):
        write_rows(cache, "gsm8k", split, rows)
    write_rows(cache, "alpaca_eval", "eval", [{"instruction": "Say hello.", "output": "Hello."}])
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    for words, smaller in SMALLER.items():
        assert words in script, words
        script = script.replace(words, smaller.format(cache=cache, root=checkout))
    path = tmp_path / "bin"
    path.mkdir()
    (path / "python").symlink_to(python())
    places = {"PATH": f"{path}:{os.environ['PATH']}", "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        environment = os.environ | places
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        return done.stdout

    run("bash", "-eu", "-c", script)
    assert len(list(cache.glob("sweep/*/epoch-1/policy.pt"))) == 4
    example = re.search(r"```python\n(.*?)```", README.split("## As a library")[1], re.DOTALL)[1]
    (tmp_path / "example.py").write_text(example)
    run("python", str(tmp_path / "example.py"))
    assert run("git", "status", "--porcelain") == ""


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
    for line in re.findall(r"^(?:torchrun|sbatch) .*", SCALING.replace("\\\n", " "), re.MULTILINE):
        words = shlex.split(line)
        script = next(i for i, word in enumerate(words) if word.endswith(("train_single_gpu.py", ".sbatch")))
        trainings.append(words[script + 1 :])
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
