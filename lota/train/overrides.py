"""The command line of a Hydra script, checked before Hydra composes it: all problems at once, near names.

Hydra would stop at the first, and advise to add a key that does not exist with a plus.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lota.config import Config
from lota.config_checks import own_rank
from lota.settings import Key, did_you_mean, keys_of, near_keys, words_of_type
from lota.train.cli import JobFailed, left_at_the_end

FULL_ERROR = "HYDRA_FULL_ERROR"  # let Hydra raise its errors, instead of printing them in its own words
FIRST_TELLS = 10.0  # seconds
MOST_JOBS = 1000  # values of one sweep that are looked at


def start(main: Callable[[], None], schema: type[Config], config: Path) -> None:
    """Run a script's Hydra main; exit with one message if its command line is wrong.

    schema: what the settings are. config: the YAML file that the command starts from.
    """
    problems = list(dict.fromkeys(override_problems(sys.argv[1:], schema, config)))
    if problems:
        _exit("\n".join(["invalid settings:", *(f"  {line}" for line in problems)]))
    # config/hydra/launcher/submitit_*.yaml are checked by schemas of the same names, which the plugin stores
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/submitit_\w+' is validated against", UserWarning)
    if os.environ.get(FULL_ERROR):
        with left_at_the_end():
            return main()
    os.environ[FULL_ERROR] = "1"
    try:
        with left_at_the_end():
            main()
    except (HydraException, OmegaConfBaseException) as error:
        cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        _exit(f"{error}{cause}")
    except JobFailed:  # the others have run
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__module__ != "submitit.core.utils":
            raise
        _exit(
            f"a job ended without a result: {str(error).strip().splitlines()[0]}\nIts log is in .submitit/ "
            "of the sweep's folder; the same command continues what has not ended."
        )


def _exit(message: str) -> NoReturn:
    """End with a message. Of several processes, which have not met yet, the first tells it: where it has the
    same to tell, it ends the others meanwhile.
    """
    if own_rank():
        time.sleep(FIRST_TELLS)
    sys.exit(message)


def override_problems(arguments: list[str], schema: type[Config], config: Path) -> Iterator[str]:
    """A line per problem of a command line, with what was given and the remedy."""
    args, others = get_args_parser().parse_known_args(arguments)
    if args.help or args.hydra_help or args.shell_completion:
        return
    checks = _Checks(args, schema, config)
    flags = [text for text in others if text.startswith("-")]
    values = []
    for text, following in pairwise([*arguments, "-"]):
        if text in flags:
            values += [] if _is_pair(following) else [following]
            yield checks.flag(text, "true" if _is_pair(following) else following)
    displaced = [text for text in others if text not in (*flags, *values)]
    if displaced and not flags:  # argparse takes the positional arguments of one place only
        yield f"{displaced[0]}: put flags such as -m in front of all settings, or behind them"
    for text in [*args.overrides, *displaced]:
        if text not in values:
            yield from checks.override(text)


def _is_pair(text: str) -> bool:
    return "=" in text or text.startswith("-")


class _Checks:
    """What is known of the keys and groups of a command."""

    def __init__(self, args: Namespace, schema: type[Config], config: Path):
        self.parser = OverridesParser.create()
        self.typed = OmegaConf.structured(schema)
        self.schema = schema()
        self.keys = {key.name: key for key in keys_of(self.schema)}
        self.nodes = {name.rpartition(".")[0] for name in self.keys} - {""}  # groups of keys
        self.groups = {folder.name: folder for folder in config.parent.iterdir() if folder.is_dir()}
        self.groups.pop("hydra", None)  # of Hydra's own, which Hydra checks
        self.sweeps = args.multirun
        defaults = yaml.safe_load(config.read_text(encoding="utf-8"))["defaults"]
        if "config" in defaults:  # those of another file
            defaults += yaml.safe_load((config.parent / "config.yaml").read_text(encoding="utf-8"))[
                "defaults"
            ]
        self.defaults = {name for entry in defaults if isinstance(entry, dict) for name in entry}
        # files of the user's own may have more keys and groups
        self.all_known = not (args.config_dir or args.config_path or args.config_name) and not any(
            "hydra.searchpath" in text for text in args.overrides
        )

    def flag(self, text: str, value: str) -> str:
        """The line on a flag, which Hydra's scripts do not take."""
        name, given, own = text.lstrip("-").partition("=")
        key, value = name.replace("-", "_"), own if given else value
        shown = text if given or value == "true" else f"{text} {value}"
        if key in self.keys or key in self.groups:
            return f"{shown}: settings are given as key=value: {key}={value}"
        return f"{shown}: settings are given as key=value{near_keys(key, self.keys.values())}"

    def override(self, text: str) -> Iterator[str]:
        """A line if the override cannot be read, names nothing, or has a value of another type."""
        try:
            found = self.parser.parse_override(text)
        except (HydraException, ValueError) as error:
            yield self._unreadable(text, error)
            return
        key = found.key_or_group
        if key == "hydra/launcher":
            yield from self._launcher_problems(found)
        if key.split("/")[0].split(".")[0] == "hydra" or found.package or found.type == OverrideType.DEL:
            return
        above = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
        if key in self.groups:
            yield from self._group_problems(found)
        elif key in self.keys:
            if found.type == OverrideType.ADD:
                yield f"{_shown(text)}: the key is there already; leave out the plus"
            for one in self._each(found):
                yield from self._value_problems(self.keys[key], one)
        elif self.all_known and key not in self.nodes and not any(name in self.keys for name in above):
            near = near_keys(key, self.keys.values()) or did_you_mean(key, self.groups)
            yield f"unknown key {_shown(text).lstrip('+')}{near}"

    def _launcher_problems(self, override: Override) -> Iterator[str]:
        """A line if the launcher is not installed, or would not be used."""
        name = str(override.value())
        if not self.sweeps and name != "basic":  # Hydra's own, which is there in any case
            yield f"hydra/launcher={name}: it launches the jobs of a sweep; put -m in front of all settings"
        if name.startswith("submitit") and find_spec("hydra_plugins.hydra_submitit_launcher") is None:
            yield f"hydra/launcher={name}: pip install hydra-submitit-launcher submitit (docs/SCALING.md)"

    def _unreadable(self, text: str, error: Exception) -> str:
        key, given, _ = text.partition("=")
        if not given:
            near = near_keys(key, self.keys.values()) if key not in self.keys else ""
            return f"{_shown(text)}: settings are given as key=value{near}"
        why = " ".join(str(error).split("\nSee ")[0].partition(";")[0].split())
        return f"{_shown(text)}: cannot be read ({why[:200]}); quote special characters: '{key}=\"...\"'"

    def _each(self, override: Override) -> list[Override]:
        """The override, or one for each job of a sweep."""
        if not override.is_sweep_override():
            return [override]
        key = override.get_key_element()
        texts = islice(override.sweep_string_iterator(), MOST_JOBS)
        return [self.parser.parse_override(f"{key}={text}") for text in texts]

    def _group_problems(self, override: Override) -> Iterator[str]:
        group = override.key_or_group
        folder = self.groups[group]
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        if override.type == OverrideType.CHANGE and group not in self.defaults:
            yield f"{_shown(override.input_line or group)}: {group} is added, with a plus: +{group}=..."
        for one in self._each(override):
            value = one.value()
            for name in value if isinstance(value, list) else [value]:
                if self.all_known and name is not None and str(name) not in options:
                    near = did_you_mean(name, options) or f"; choose one of {', '.join(options)}"
                    yield f"{group}={name}: there is no {folder.parent.name}/{group}/{name}.yaml{near}"

    def _value_problems(self, key: Key, override: Override) -> Iterator[str]:
        value = override.value()
        text = (override.input_line or "").partition("=")[2]
        if "${" in text:  # known only when all is composed
            return
        expected = words_of_type(key.type)
        if key.type.startswith("list[") and not isinstance(value, list) and value is not None:
            expected = f"a list, as in {key.name}=[{text}]"
        # a whole number is no answer to a question, which OmegaConf would take for yes
        fits = not ("bool" in key.type and type(value) is int and value not in (0, 1))
        with contextlib.suppress(OmegaConfBaseException, ValueError):
            OmegaConf.update(self.typed.copy(), key.name, value, merge=True)
            if fits:
                return
        yield f"{_shown(f'{key.name}={text}')}: should be {expected}"


def _shown(text: Any) -> str:
    return f"{text:.80}"
