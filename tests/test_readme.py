"""The README is true: its tree, its table of settings, its library example, its commands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from test_config import CONFIG, commented_keys, keys_of, settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS_OF_YAML = (
    "config/model/",
    "config/loss/",
    "config/trainer/",
    "config/adapter/",
    "config/experiment/",
)
ONE_FOLDER_ONE_CLAUSE = ("tests/", "assets/", *FOLDERS_OF_YAML)
FIRST_OF_GROUP = (
    ("model", "blank_model"), ("loss", "sft"), ("loss", "dpo"), ("trainer", "BasicTrainer"),
    ("adapter", "none"),
)  # fmt: skip


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def tree() -> list[str]:
    """Paths of the README's tree, folders with a slash at the end; every line has a clause."""
    block = README.split("## The tree")[1].split("```")[1]
    found, folder = [], ""
    for line in block.strip("\n").splitlines():
        names, clause = re.fullmatch(r" *((?:\S+, )*\S+)(?:  +(.*))?", line).groups()
        indented = line.startswith(" ")
        for name in names.split(", "):
            path = (folder if indented else "") + name
            assert clause or name.endswith("/"), f"no clause: {line}"
            found.append(path)
        if not indented:
            folder = names if names.endswith("/") else ""
    return found


def test_every_file_stands_in_the_tree():
    known = tree()
    for file in tracked_files():
        by_folder = any(file.startswith(folder) and folder in known for folder in ONE_FOLDER_ONE_CLAUSE)
        assert file in known or by_folder or file.startswith(".") or file in ("LICENSE", "README.md"), file
    missing = [path for path in known if not (ROOT / path).exists()]
    assert not missing


def test_the_table_of_settings_is_the_comments_of_the_yaml_files():
    rows = dict(
        re.findall(r"^\| `([\w.]+)` \| `.*?` \| (.*) \|$", README.split("## Settings")[1], re.MULTILINE)
    )
    comments = commented_keys(CONFIG / "config.yaml")
    for group, name in FIRST_OF_GROUP:
        comments |= commented_keys(CONFIG / group / f"{name}.yaml", f"{group}.")
    assert rows == comments
    assert set(rows) == set(keys_of(settings()))


def test_the_table_of_a_sequence_is_the_comments_of_its_yaml_file():
    table = README.split("| key of a sequence |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `.*?` \| (.*) \|$", table, re.MULTILINE))
    comments = commented_keys(CONFIG / "lotto.yaml")
    assert rows == {key: comment for key, comment in comments.items() if key != "datasets"}


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


def test_the_training_commands_compose():
    commands = re.findall(r"^python (?:-u )?train_single_gpu\.py ((?:.*\\\n)*.*)$", README, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = command.replace("\\\n", " ").replace("$BASE", "base").replace("-m ", "").split()
        # a sweep's first value
        single = [re.sub(r"^(\+?\w+)=([^\[]*?),.*", r"\1=\2", word) for word in words]
        assert settings(*single).exp_name
