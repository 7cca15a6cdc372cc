"""Deltas and masks to the hub, each with its model card in one commit, and back to a file here."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from lota.masks import Mask
from lota.masks import files as mask_files
from lota.models.hub import (
    DELTA_FILE,
    MASK_FILE,
    PREFIX,
    HubFile,
    NoSuchFile,
    fetch,
    hub_api,
    hub_errors,
    hub_file,
    hub_is_used,
    local_copy,
)
from lota.models.provenance import run_file
from lota.share.card import delta_card, find_base, find_scores, mask_card, merged_card, read_run
from lota.share.delta import format as delta_files
from lota.share.delta.reader import Delta
from lota.storage import atomic_path

CARD = "README.md"
Add = Callable[..., argparse.Action]


@dataclass(frozen=True)
class Upload:
    """What one commit brings."""

    place: HubFile  # of the file that the card describes
    files: Mapping[str, Path]  # name in the repository -> file here
    card: ModelCard


# Flags, which `python -m lota.delta` and `python -m lota.masks` share


def add_push_flags(add: Add) -> None:
    add(
        "--to",
        required=True,
        metavar="ORG/NAME",
        help="repository, made if need be; ORG/NAME/FILE names the file",
    )
    add("--revision", help="branch to commit to, made if need be (main)")
    add("--message", help="of the commit")
    add("--private", action="store_true", help="make the repository a private one")
    add("--run", dest="of_run", help="folder of the run that it comes from; default: that the file lies in")
    add("--scores", help="folder with metrics/summary.json; default: FILE_results, or the file's own")
    add("--base", help="hub id of the base, with @revision if need be; default: what the file records")
    add("--license", help="of the file, such as apache-2.0; default: what the card has already, else none")
    add("--dry_run", action="store_true", help="print the card, and send nothing")


def add_pull_flags(add: Add) -> None:
    add(
        "repository",
        metavar="ORG/NAME",
        help="with @REVISION for a branch, tag or commit, /FILE for another file",
    )
    add("--revision", help="branch, tag or commit; the same as @REVISION")
    add("--out", help="file to write; default: it stays in the hub's cache, where its name finds it")


# Push


def push_delta(args: argparse.Namespace) -> str:
    """Send a delta, and the mask that it was trained under if there is one; returns what to print."""
    delta, place = Delta.open(args.delta), _place(args, DELTA_FILE)
    path = delta.path
    base = find_base(delta.meta["base"], delta.meta["base_hash"], args.base)
    card = delta_card(delta, place, base, _run(args, path), find_scores(path, args.scores))
    files = {place.file: path}
    if args.mask is not None:
        files[MASK_FILE] = local_copy(args.mask, MASK_FILE)
        mask = Mask.load(files[MASK_FILE], mapped=True)
        mask.check({name: parameter.shape for name, parameter in delta.parameters.items()})
    return push(Upload(place, files, card), args)


def push_mask(args: argparse.Namespace) -> str:
    """Send a mask file; returns what to print."""
    path = local_copy(args.file, MASK_FILE)
    mask, place = Mask.load(path, mapped=True), _place(args, MASK_FILE)
    recorded = {key: value for key, value in mask.meta.items() if isinstance(value, str)}
    base = find_base(recorded.get("base"), recorded.get("base_hash"), args.base)
    scores = find_scores(path, args.scores) if args.scores else []
    return push(
        Upload(place, {place.file: path}, mask_card(mask, place, base, _run(args, path), scores)), args
    )


def push(upload: Upload, args: argparse.Namespace) -> str:
    """Commit all files and the card at once; ValueError, and no commit, for what the hub refuses."""
    if args.license is not None:
        upload.card.data["license"] = args.license
    if args.dry_run:
        return f"{upload.card}\nnot sent: {', '.join([*upload.files, CARD])} to {upload.place.repo}"
    if not hub_is_used():
        raise ValueError(
            f"to={args.to}: the hub cannot be reached or is switched off (HF_HUB_OFFLINE); --dry_run shows "
            "the card"
        )
    repo, api = upload.place.repo, hub_api()
    with hub_errors(f"push to {repo}", repo):
        api.create_repo(repo, private=True if args.private else None, exist_ok=True)
        if args.private and not api.model_info(repo).private:
            raise ValueError(
                f"--private: {repo} is there already and is public; make it private, or name another"
            )
        if args.revision is not None:
            api.create_branch(repo, branch=args.revision, exist_ok=True)
        card = merged_card(upload.card, _present_card(api, repo, args.revision))
        operations = [CommitOperationAdd(name, path) for name, path in upload.files.items()]
        operations.append(CommitOperationAdd(CARD, str(card).encode()))
        message = args.message or f"{', '.join(upload.files)} by lota"
        done = api.create_commit(repo, operations, commit_message=message, revision=args.revision)
    lines = [str(done.commit_url), f"use it as {upload.place.address}"]
    if not card.data.get("license"):
        lines.append("The card names no license: push again with --license, or edit it there.")
    if not card.data.get("base_model"):
        lines.append(
            "The card names no base of the hub: push again with --base ORG/NAME@REVISION, if it is there."
        )
    return "\n".join(lines)


def _place(args: argparse.Namespace, file: str) -> HubFile:
    """Where the file goes. Raises ValueError for what names no repository."""
    place = hub_file(PREFIX + args.to.removeprefix(PREFIX), file)
    assert place is not None  # with the prefix it is one, or an error
    if place.revision is not None:
        raise ValueError(f"to={args.to}: give the branch as --revision {place.revision}")
    return replace(place, revision=args.revision)


def _run(args: argparse.Namespace, path: Path) -> dict[str, object]:
    if args.of_run is not None and run_file(Path(args.of_run)) is None:
        raise ValueError(f"run={args.of_run}: there is no run's config.yaml; give a run's folder")
    return read_run(path if args.of_run is None else Path(args.of_run))


def _present_card(api: HfApi, repo: str, revision: str | None) -> str | None:
    """README.md of the repository, None if it has none yet."""
    try:
        with hub_errors(CARD, repo):
            return Path(api.hf_hub_download(repo, CARD, revision=revision)).read_text(encoding="utf-8")
    except NoSuchFile:
        return None


# Pull


def pull_delta(args: argparse.Namespace) -> str:
    """Fetch a delta and check every byte of it; returns what to print."""
    return _pull(args, DELTA_FILE, Delta.open, lambda out: delta_files.check_target(out))


def pull_mask(args: argparse.Namespace) -> str:
    """Fetch a mask file and check it; returns what to print."""
    return _pull(args, MASK_FILE, lambda path: Mask.load(path, mapped=True), mask_files.check_target)


def _pull(
    args: argparse.Namespace, file: str, read: Callable[[Path], object], check_target: Callable[[Path], None]
) -> str:
    named = hub_file(PREFIX + args.repository.removeprefix(PREFIX), file)
    assert named is not None
    if args.revision is not None:
        if named.revision not in (None, args.revision):
            raise ValueError(f"revision={args.revision} with {args.repository}: give one of them")
        named = replace(named, revision=args.revision)
    out = None if args.out is None else Path(args.out).expanduser()
    if out is not None:
        check_target(out)
    cached = fetch(named)
    found = read(cached)
    if out is None:
        return f"{found}\nin the cache as {cached}"
    with atomic_path(out) as temporary:
        shutil.copyfile(cached, temporary)
    return f"{found}\nwrote {out}"
