"""What the run that a policy.pt comes from says of it: the config.yaml of its folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import yaml

logger = logging.getLogger(__name__)


# What decides how prompts are written and cut; it goes along with the weights, for evaluation to do the same.
PROMPT_SETTINGS = ("chat_template", "max_length", "max_prompt_length")


@dataclass(frozen=True)
class RunSettings:
    """Settings that outlive training. base: model.name_or_path; None and () where there is no run."""

    base: str | None = None
    pad_token: str | None = None
    tokenizer: str | None = None
    datasets: tuple[str, ...] = ()
    chat_template: str | None = None
    max_length: int | None = None
    max_prompt_length: int | None = None

    @property
    def prompts(self) -> dict[str, str | int | None]:
        return {name: getattr(self, name) for name in PROMPT_SETTINGS}


def run_settings(path: Path) -> RunSettings:
    """Settings of the run that `path` belongs to: RUN, RUN/epoch-1 or RUN/epoch-1/policy.pt.

    Empty for what lies outside a run folder, with a warning where a config.yaml there is no run's.
    """
    path = path.expanduser().resolve()
    folders = path.parents[:2] if path.is_file() else (path, path.parent)
    file = next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)
    if file is None:
        return RunSettings()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        model = content["model"]
        return RunSettings(
            model.get("name_or_path"),
            model.get("pad_token"),
            model.get("tokenizer_name_or_path"),
            tuple(content.get("datasets") or ()),
            *(content.get(name) for name in PROMPT_SETTINGS),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is not a run's config (%s): not used", file, " ".join(str(error).split()))
        return RunSettings()
