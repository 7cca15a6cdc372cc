"""What a setting is: a dataclass field with its meaning, values and effect on the weights as metadata."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, get_type_hints

import yaml

P = ParamSpec("P")


@dataclass(frozen=True)
class Setting:
    """What is known of a key beside its type."""

    default: Any
    meaning: str
    unit: str = ""  # of a number; the first words of its description
    choices: tuple[Any, ...] = ()  # the only values, if there are any
    at_least: float | None = None  # bounds of a number, or of each number of a list
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    needs: tuple[
        str, ...
    ] = ()  # `key=value` or `key=value|value`: with any other value nothing reads the key
    fill: Any = None  # what stands for null if all that the key needs is set
    changes_weights: bool = True  # if not, a run may be resumed with another value
    path: bool = False  # becomes absolute if it exists, so that a run can be resumed from another folder

    @property
    def bounds(self) -> str:
        """Text such as `at least 0 and below 1`; empty without bounds."""
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)

    def allows(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


def as_field(known: Callable[P, Setting]) -> Callable[P, Any]:
    """A function with the arguments of `known` that makes a dataclass field with that metadata."""

    def make(*arguments: P.args, **named: P.kwargs) -> Any:
        about = known(*arguments, **named)
        if isinstance(about.default, list | dict):
            return field(default_factory=about.default.copy, metadata={"setting": about})
        return field(default=about.default, metadata={"setting": about})

    return make


setting = as_field(Setting)
neutral = partial(setting, changes_weights=False)


class Key(NamedTuple):
    """A key of a configuration."""

    name: str  # dotted
    about: Setting
    value: Any
    type: str  # annotation


def keys_of(node: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a configuration and of its groups, in the order of the fields."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from keys_of(value, f"{prefix}{f.name}.")
        elif "setting" in f.metadata:
            yield Key(prefix + f.name, f.metadata["setting"], value, str(f.type))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


# Types

_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list[str]": "a list, as in [a,b]",
    "list[float]": "a list of numbers",
    "None": "null",
}
_CLASSES = {
    "str": str, "int": int, "float": int | float, "bool": bool, "None": type(None), "Any": object
}  # fmt: skip


def words_of_type(annotation: str) -> str:
    """What a value of a key's type is, in words."""
    return " or ".join(_WORDS.get(part, part) for part in annotation.split(" | "))


def has_type(value: Any, annotation: str) -> bool:
    """Whether a value is what a key's annotation says; a whole number is a number too, true is none."""
    for part in annotation.split(" | "):
        if inner := re.fullmatch(r"list\[(\w+)\]", part):
            if isinstance(value, list) and all(has_type(item, inner[1]) for item in value):
                return True
        elif inner := re.fullmatch(r"dict\[str, (\w+)\]", part):
            if isinstance(value, Mapping) and all(
                isinstance(key, str) and has_type(item, inner[1]) for key, item in value.items()
            ):
                return True
        elif isinstance(value, _CLASSES[part]) and (part in ("bool", "Any") or not isinstance(value, bool)):
            return True
    return False


def stored_settings(file: Path, config: Any) -> dict[str, Any]:
    """The nested settings that a run wrote. Raises ValueError naming a file that is none of a run's.

    config: one with the keys and types that they should have.
    """
    try:
        content = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{file} holds no settings of a run")
    check_types(content, config, file)
    return content


def check_types(content: Mapping[str, Any], config: Any, file: Path) -> None:
    """Raise ValueError naming the file and the first key of `config` whose value in `content` is of another
    type.
    """
    values = flat(content)
    for key in keys_of(config):
        if key.name in values and not has_type(values[key.name], key.type):
            expected = words_of_type(key.type)
            raise ValueError(f"{file}: {key.name}={values[key.name]!r:.60} should be {expected}")


def value_problems(node: Any) -> Iterator[str]:
    """A line per key whose value is none of its choices or out of its bounds."""
    for key in keys_of(node):
        about = key.about
        if about.choices and key.value not in about.choices:
            names = ["null" if choice is None else str(choice) for choice in about.choices]
            yield f"{key.name}={key.value}: choose one of {', '.join(names)}{did_you_mean(key.value, names)}"
        numbers = key.value if isinstance(key.value, list) else [key.value]
        for number in numbers:
            if about.bounds and number is not None and not about.allows(number):
                finite = "" if math.isfinite(number) else "finite and "
                null = ", or null" if "None" in key.type else ""
                yield f"{key.name}={number}: must be {finite}{about.bounds}{null}"


def unknown_keys(given: Mapping[str, Any], schema: type, prefix: str = "") -> list[str]:
    """A line per key that the schema does not have (Hydra's `+key=value` lets any pass), with near names."""
    known = get_type_hints(schema)
    lines = []
    for key, value in given.items():
        if key not in known:
            lines.append(f"unknown key {prefix}{key}={value}{did_you_mean(key, known, prefix)}")
        elif is_dataclass(known[key]) and isinstance(value, Mapping):
            lines += unknown_keys(value, known[key], f"{prefix}{key}.")
    return lines


def did_you_mean(given: Any, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message that names what is nearest; empty if nothing is near."""
    near = difflib.get_close_matches(str(given), known, cutoff=0.5)
    return f"; did you mean {', '.join(prefix + name for name in near)}?" if near else ""


def near_keys(given: str, keys: Iterable[Key]) -> str:
    """The same for a key: names that look like it, else keys whose meaning has its words."""
    known = {key.name: key.about.meaning for key in keys}
    last_parts = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(given, known, cutoff=0.7)
    near += [last_parts[part] for part in difflib.get_close_matches(given, last_parts, cutoff=0.7)]
    if not near:
        words = [word for word in re.split(r"[\W_]+", given) if len(word) > 2]
        places = {name: [meaning.find(word) for word in words] for name, meaning in known.items()}
        fitting = [name for name, found in places.items() if found and min(found) >= 0]
        near = sorted(fitting, key=lambda name: places[name])[:3]
    return f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
