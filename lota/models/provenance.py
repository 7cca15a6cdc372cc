"""What the run that a policy.pt comes from says of it: the config.yaml of its folder."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.config import Config
from lota.models.tensor_files import is_delta, read_metadata
from lota.settings import stored_settings
from lota.storage import parse_json

logger = logging.getLogger(__name__)
# These decide how prompts are written and cut; they go along with the weights, for evaluation to do the same.
PROMPT_LENGTHS = ("max_length", "max_prompt_length")  # in tokens
PROMPT_SETTINGS = ("chat_template", *PROMPT_LENGTHS)
Prompts = dict[str, str | int | None]  # of PROMPT_SETTINGS
RECORD = "conversion.json"  # lists the files of a folder that we wrote and may replace
MERGE_RECORD = "merge.json"  # of a folder that merging wrote: inputs, rule, statistics


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that outlive training; the defaults stand for no run."""

    base: str | None = None  # model.name_or_path
    pad_token: str | None = None  # model.pad_token
    tokenizer: str | None = None  # model.tokenizer_name_or_path
    datasets: tuple[str, ...] = ()
    chat_template: str | None = None
    max_length: int | None = None  # in tokens, as is the next
    max_prompt_length: int | None = None
    data_dir: str | None = None
    validation_fraction: float | None = None

    @property
    def prompts(self) -> Prompts:
        return {name: getattr(self, name) for name in PROMPT_SETTINGS}


def run_file(path: Path) -> Path | None:
    """config.yaml of the run that `path` belongs to: RUN, RUN/epoch-1 or a file in one of them."""
    path = path.expanduser().resolve()
    folders = path.parents[:2] if path.is_file() else (path, path.parent)
    return next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)


def run_settings(path: Path) -> RunSettings:
    """Settings of the run that `path` belongs to: RUN, RUN/epoch-1 or RUN/epoch-1/policy.pt.

    The defaults for what lies outside a run folder, with a warning if a config.yaml there is no run's.
    """
    file = run_file(path)
    if file is None:
        return RunSettings()
    try:
        content = stored_settings(file, Config())
    except ValueError as error:
        logger.warning("%s; not used", error)
        return RunSettings()
    model = content["model"]
    return RunSettings(
        model.get("name_or_path"),
        model.get("pad_token"),
        model.get("tokenizer_name_or_path"),
        tuple(content.get("datasets") or ()),
        *(content.get(name) for name in (*PROMPT_SETTINGS, "data_dir", "validation_fraction")),
    )


def recorded_base(path: Path) -> str | None:
    """The model that a run, a converted folder or an applied delta says it was made from."""
    try:
        found = parse_json((path.expanduser() / RECORD).read_bytes())["base"]
    except (OSError, ValueError, LookupError, TypeError):
        found = run_settings(path).base
    return found if isinstance(found, str) else None


def recorded_prompts(model: str | os.PathLike[str]) -> Prompts:
    """PROMPT_SETTINGS of the runs that a converted or merged folder, or a delta, comes from.

    None for those not known, and for those in which merged runs differ.
    """
    path = Path(model).expanduser()
    files = [path] if path.is_file() else [path / RECORD, path / MERGE_RECORD]
    file = next((file for file in files if file.is_file()), None)
    if file is None or (file == path and not is_delta(path)):
        return dict.fromkeys(PROMPT_SETTINGS)
    try:
        if file == path:  # a delta's metadata are strings
            record: dict[str, Any] = dict(read_metadata(path))
            record |= {key: int(record[key]) for key in PROMPT_LENGTHS if key in record}
        else:
            record = dict(parse_json(file.read_bytes()))
        found = {name: record.get(name) for name in PROMPT_SETTINGS}
        for name, value in found.items():
            if value is not None and type(value) is not (int if name in PROMPT_LENGTHS else str):
                raise ValueError(f"{name}={value!r:.60}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): make it anew") from error
    return found


def trained_prompts(path: str | os.PathLike[str]) -> Prompts:
    """The same of what may also be a run's own folder or policy.pt."""
    run = run_settings(Path(path))
    return run.prompts if run.chat_template else recorded_prompts(path)
