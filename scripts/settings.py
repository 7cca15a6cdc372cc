"""Write docs/SETTINGS.md, or the comments in config/*.yaml, from what the code knows of each setting.

    python -m scripts.settings > docs/SETTINGS.md
    python -m scripts.settings --yaml

The order, headings and defaults are those of the YAML files; everything else is metadata of the fields in
lota/config.py, lota/lotto/config.py and lota/plan/config.py.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lota.config import Config
from lota.config_checks import WEIGHT_NEUTRAL
from lota.lotto.config import LottoConfig
from lota.plan.config import PlanConfig
from lota.settings import Setting, keys_of

CONFIG = Path(__file__).resolve().parent.parent / "config"
FILES = {  # file -> what its keys start with
    "config.yaml": "",
    "model/blank_model.yaml": "model.",
    "loss/sft.yaml": "loss.",
    "loss/dpo.yaml": "loss.",
    "trainer/BasicTrainer.yaml": "trainer.",
    "trainer/FSDPTrainer.yaml": "trainer.",
    "adapter/none.yaml": "adapter.",
    "adapter/lora.yaml": "adapter.",
    "lotto.yaml": "",
    "plan.yaml": "",
}
# What a file's keys of its own belong to, beside those of a training run
OWN: dict[str, tuple[str, type[Config]]] = {
    "lotto.yaml": ("a sequence of tasks", LottoConfig),
    "plan.yaml": ("a plan", PlanConfig),
}
INTRODUCTION = """# Settings

Every key of `train_single_gpu.py`, `lotto.py` and `python -m lota.plan` with its default and meaning. Give
keys on the command line as `key=value`; `null` is no value. `python -m scripts.settings > docs/SETTINGS.md`
writes this page.

- An invalid value is refused before the model loads; all errors are reported at once.
- "used with" names what a key needs. Without it the key is accepted, and listed at the start as not used.
- `model=`, `loss=`, `trainer=` and `adapter=` choose a file of config/model/, config/loss/ and so on, which
  sets keys of that group.
"""
NEUTRAL = """
## Keys that do not change the weights

A run can be resumed with other values of these keys, and a sweep leaves them out of the names of its folders:
"""


class Line(NamedTuple):
    """A `key: value # comment` line of a YAML file."""

    number: int
    key: str  # dotted
    default: str
    comment: str | None
    heading: str  # the comment line that its block starts with


def lines_of(path: Path, prefix: str = "") -> Iterator[Line]:
    """The keys of a YAML file, without its defaults list and its hydra section."""
    parents: list[str] = []
    heading, before = "run", "the first line"
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\nhydra:")[0].splitlines()):
        if text.startswith("# ") and not before:
            heading = text.removeprefix("# ")
        before = text
        match = re.match(r"( *)([\w-]+):(?: *(.*?))?(?: +# (.*))?$", text)
        if not match or match[2] == "defaults":
            continue
        parents = [*parents[: len(match[1]) // 2], match[2]]
        if match[3]:
            yield Line(number, prefix + ".".join(parents), match[3], match[4], heading)


def described(about: Setting) -> str:
    """Meaning, values and needs of a setting in one line."""
    parts = [f"{about.unit} {about.meaning}" if about.unit else about.meaning]
    choices = ["null" if choice is None else str(choice) for choice in about.choices]
    if any(choice not in about.meaning for choice in choices):
        parts.append(f"one of {', '.join(choices)}")
    parts += [about.bounds] if about.bounds else []
    needs = defaultdict(list)
    for need in about.needs:
        key, _, value = need.partition("=")
        needs[key.removesuffix(".name")].append(value)
    if needs:
        parts.append("used with " + ", ".join(f"{key}={_either(values)}" for key, values in needs.items()))
    return "; ".join(parts)


def _either(values: list[str]) -> str:
    return " or ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


def known(file: str = "") -> dict[str, str]:
    """Dotted key -> description, of the settings that a file's keys are."""
    _, schema = OWN.get(file, ("", Config))
    return {key.name: described(key.about) for key in keys_of(schema())}


def page() -> str:
    """The content of docs/SETTINGS.md."""
    runs = known()
    sections: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)  # heading -> key -> default, meaning
    for file, prefix in FILES.items():
        own, text = OWN[file][0] if file in OWN else prefix.removesuffix("."), known(file)
        for line in lines_of(CONFIG / file, prefix):
            told = line.key in runs and any(line.key in rows for rows in sections.values())
            if not told:
                sections[own or line.heading][line.key] = line.default, text[line.key]
    parts = [INTRODUCTION]
    for heading, rows in sections.items():
        table = [f"| `{key}` | `{default}` | {text} |" for key, (default, text) in rows.items()]
        parts.append(
            "\n".join(
                [f"\n## {heading.capitalize()}\n", "| key | default | meaning |", "|---|---|---|", *table, ""]
            )
        )
    return "".join([*parts, NEUTRAL, ", ".join(f"`{key}`" for key in left_out()), ".\n"])


def left_out() -> list[str]:
    """The neutral keys in the order of the schema."""
    return [key.name for key in keys_of(LottoConfig()) if key.name in WEIGHT_NEUTRAL]


def with_comments(file: str) -> str:
    """The text of a YAML file of config/ with the description of each key as its comment."""
    path, text = CONFIG / file, known(file)
    rows = path.read_text(encoding="utf-8").splitlines()
    for line in lines_of(path, FILES[file]):
        rows[line.number] = f"{re.sub(r' +# .*', '', rows[line.number])} # {text[line.key]}"
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--yaml", action="store_true", help="rewrite the comments in config/*.yaml")
    if not parser.parse_args().yaml:
        print(page(), end="")
        return
    for file in FILES:
        (CONFIG / file).write_text(with_comments(file), encoding="utf-8")


if __name__ == "__main__":
    main()
