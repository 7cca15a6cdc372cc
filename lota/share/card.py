"""Model cards of deltas and masks on the hub: what they are, of which base and run, scores, use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lota.config import Config
from lota.masks import Mask
from lota.models.hashing import remembered_hash
from lota.models.hub import DELTA_FILE, PREFIX, HubFile, cached_snapshot, hub_file, is_hub_reference
from lota.models.provenance import run_file
from lota.models.tensor_files import has_weights
from lota.settings import flat, stored_settings
from lota.share.delta.reader import Delta

BEGIN, END = "<!-- lota: written by a push, and again by the next one -->", "<!-- lota: end -->"
SUMMARY = Path("metrics", "summary.json")  # what eval_model_all.py writes into its folder
# Settings that a card tells, as far as the run has them
_TOLD = ("optimizer", "lr", "lr_scheduler", "batch_size", "n_epochs", "n_examples", "loss.name", "seed")
_LORA = ("lora_rank", "lora_alpha")


@dataclass(frozen=True)
class Base:
    """The model that a file belongs to."""

    name: str  # hub id, or the last part of a local path: the rest is nobody's business
    on_hub: bool
    revision: str | None  # commit whose weights have the file's hash, if the hub's cache has it
    hash: str | None


@dataclass(frozen=True)
class Score:
    """A result of eval_model_all.py."""

    task: str
    metric: str
    value: float
    stderr: float | None  # None for one example
    n: int  # examples


# What is known


def find_base(recorded: str | None, base_hash: str | None, given: str | None = None) -> Base:
    """The base, by what a file records of it and, in its place, a hub id that is given, maybe with @revision.

    Raises ValueError for what is given and is no hub id, or has other weights in the hub's cache.
    """
    named = hub_file(given or recorded or "", "config.json")
    if given is not None and named is None:
        raise ValueError(f"base={given}: give a hub id, such as org/name or org/name@revision")
    if named is None or (given is None and Path(named.repo).expanduser().exists()):
        return Base(Path(recorded or "").name or "not known", False, None, base_hash)
    snapshot = cached_snapshot(named)
    if snapshot is None or not has_weights(snapshot) or base_hash is None:
        return Base(named.repo, True, None, base_hash)
    found = remembered_hash(snapshot)
    if found != base_hash:
        if given is not None:
            raise ValueError(
                f"base={given}: its weights in the hub's cache have the hash {found[:12]}, not "
                f"{base_hash[:12]}; name the revision that the file was made of"
            )
        return Base(named.repo, True, None, base_hash)
    return Base(named.repo, True, snapshot.name, base_hash)


def read_run(path: Path) -> dict[str, Any]:
    """Settings, by dotted key, of the run that a file or folder belongs to; empty if it belongs to none."""
    file = run_file(path)
    return {} if file is None else flat(stored_settings(file, Config()))


def find_scores(file: Path, given: str | None = None) -> list[Score]:
    """Scores of an evaluation: in the folder that is given, else in FILE_results, else beside the file.

    Raises ValueError for a folder that is given and has none, and for a damaged summary.
    """
    places = [Path(given).expanduser()] if given else [file.with_name(f"{file.stem}_results"), file.parent]
    summary = next((place / SUMMARY for place in places if (place / SUMMARY).is_file()), None)
    if summary is None:
        if given:
            raise ValueError(f"scores={given} has no {SUMMARY}: eval_model_all.py --out {given} writes it")
        return []
    try:
        tasks = json.loads(summary.read_text(encoding="utf-8"))["tasks"]
        return [
            Score(
                str(entry["task"]),
                str(metric),
                float(found["score"]),
                _number(found["stderr"]),
                int(found["n"]),
            )
            for entry in tasks
            for metric, found in entry["metrics"].items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{summary} is no summary of an evaluation ({error}): evaluate again") from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


# What is said


def delta_card(
    delta: Delta, place: HubFile, base: Base, run: Mapping[str, Any], scores: Sequence[Score]
) -> ModelCard:
    """The card of a delta file."""
    meta, changed, entries = delta.meta, delta.n_changed, delta.meta["entries"]
    rows = {
        "Method": _method(run, meta["sparsity"], bool(meta.get("kept"))),
        "Mask": mask if is_hub_reference(mask := str(run.get("mask_path"))) else None,
        "Task": meta.get("task"),
        **_base_rows(base),
        "Tuned weights (SHA-256)": meta["tuned_hash"],
        "Changed entries": f"{changed:,} of {entries:,} ({changed / max(1, entries):.2%})",
        "Dtype": meta.get("dtype"),
        "Chat template": meta.get("chat_template"),
        "Training": _training(run),
    }
    what = (
        "The weights that fine-tuning changed, as a sparse task vector of "
        "[LoTA](https://arxiv.org/abs/2406.16797): put on its base it gives the tuned model bit for bit, and "
        "taken off, the base again."
    )
    at = "" if base.revision is None else f', revision="{base.revision}"'
    address = place.address.removeprefix(PREFIX) if place.file == DELTA_FILE else place.address
    use = [
        "import lota, transformers",
        f'model = transformers.AutoModelForCausalLM.from_pretrained("{base.name}"{at}, dtype="auto")',
        f'lota.attach(model, "{address}")',
    ]
    command = f"python -m lota.delta apply --model {base.name} --delta {address} --out tuned/"
    tags = ["lota", "sparse-task-vector", *_tags(meta.get("task"), run)]
    card = _card(place, what, rows, use, command, scores, base, tags)
    if base.on_hub:
        card.data["base_model_relation"] = "adapter"
    return card


def mask_card(
    mask: Mask, place: HubFile, base: Base, run: Mapping[str, Any], scores: Sequence[Score]
) -> ModelCard:
    """The card of a mask file. scores: of a model that was trained under it."""
    meta = mask.meta
    rows = {
        "Chosen by": meta.get("score"),
        "Sparsity": f"{1 - mask.density:.6g}: {mask.n_kept:,} of {mask.n_total:,} entries train",
        "Granularity": meta.get("granularity"),
        "Scope": meta.get("scope"),
        **_base_rows(base),
        "Training": _training(run),
    }
    what = (
        "A mask of [LoTA](https://arxiv.org/abs/2406.16797): the entries of a model's weights that "
        "fine-tuning may change. All others stay as they are."
    )
    use = [
        "import lota",
        f'mask = lota.Mask.load("{place.address}")',
        "optimizer = lota.MaskedRMSprop(model, mask, lr=1e-4)  # then lota.fuse_in_backward(optimizer)",
    ]
    command = f"python train_single_gpu.py mask_path={place.address} model.name_or_path={base.name} ..."
    return _card(
        place, what, rows, use, command, scores, base, ["lota", "lottery-ticket-mask", *_tags(None, run)]
    )


def merged_card(new: ModelCard, old: str | None) -> ModelCard:
    """A new card in place of what the last push wrote; the owner's own text and metadata stay.

    old: README.md of the repository. Raises ValueError if its metadata cannot be read.
    """
    if old is None:
        return new
    try:
        card = ModelCard(old, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"README.md of the repository cannot be read ({error}): mend its metadata"
        ) from error
    begin, end = card.text.find(BEGIN), card.text.find(END)
    last = card.text[begin:end] if 0 <= begin < end else ""
    ours, theirs = new.data.to_dict(), card.data.to_dict()
    theirs.pop("model-index", None)  # scores of what the file was before
    if "license" in ours:  # given with this push
        theirs.pop("license", None)
    if "base_model" in ours and f"| Base | [{theirs.get('base_model')}](" in last:  # not the owner's
        theirs.pop("base_model")
    tags = theirs.get("tags") or []
    tags = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *ours["tags"]]))
    data = ModelCardData(**{**ours, **theirs, "tags": tags})
    if last:
        text = card.text[:begin] + new.text.strip() + card.text[end + len(END) :]
    else:
        text = f"{card.text.rstrip()}\n\n{new.text.strip()}\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _card(
    place: HubFile,
    what: str,
    rows: Mapping[str, Any],
    use: Sequence[str],
    command: str,
    scores: Sequence[Score],
    base: Base,
    tags: Sequence[str],
) -> ModelCard:
    name = place.repo.partition("/")[2]
    results = [EvalResult("text-generation", s.task, s.task, s.metric, _with_error(s)) for s in scores]
    data = ModelCardData(
        library_name="lota",
        tags=[re.sub(r"\s+", "-", tag) for tag in tags],
        base_model=base.name if base.on_hub else None,
        pipeline_tag="text-generation",
        model_name=name if results else None,
        eval_results=results or None,
    )
    lines = [BEGIN, f"# {name}", "", what, "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in (None, "")]
    if scores:
        lines += [
            "",
            "## Scores",
            "",
            "| task | metric | score ± standard error | examples |",
            "|---|---|---|---|",
        ]
        lines += [f"| {_cell(s.task)} | {_cell(s.metric)} | {_with_error(s)} | {s.n:,} |" for s in scores]
    lines += ["", "## Use", "", "```python", *use, "```", "", f"or `{command}`", END]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines) + "\n")


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _with_error(score: Score) -> str:
    digits = 4 if abs(score.value) < 100 else 1
    error = "" if score.stderr is None else f" ± {score.stderr:.{digits}f}"
    return f"{score.value:.{digits}f}{error}"


def _base_rows(base: Base) -> dict[str, str | None]:
    at = "" if base.revision is None else f", revision `{base.revision}`"
    link = f"[{base.name}](https://huggingface.co/{base.name}){at}" if base.on_hub else base.name
    return {"Base": link, "Base weights (SHA-256)": base.hash}


def _method(run: Mapping[str, Any], sparsity: float, with_mask: bool) -> str:
    masked = f"a mask of sparsity {sparsity:.6g}" if with_mask else "a mask"
    masked += ": all entries outside of it are those of the base"
    if run.get("adapter.name") == "lora":
        ranks = ", ".join(f"{key}={run[key]}" for key in _LORA if key in run)
        return f"LoRA ({ranks}), merged"
    if run.get("snip"):
        return f"SNIP, {masked}"
    if with_mask or run.get("mask_path") is not None:
        return f"LoTA, {masked}"
    return "full fine-tuning" if run else f"not recorded; {sparsity:.6g} of the entries are those of the base"


def _training(run: Mapping[str, Any]) -> str | None:
    told = [f"{key.removesuffix('.name')}={run[key]}" for key in _TOLD if run.get(key) is not None]
    tasks = run.get("datasets")
    return ", ".join([f"datasets={','.join(tasks)}", *told]) if tasks else None


def _tags(task: str | None, run: Mapping[str, Any]) -> list[str]:
    names = [*(task or "").split(","), *(run.get("datasets") or ())]
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))
