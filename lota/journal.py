"""Results on disk that a later run may continue, but only if everything that decides them is the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Journal:
    """An append-only file of numbered records that were made under one key.

    Line 1 holds the key, every other line {"index": i, "record": ...}. A file with the same key is
    continued; one with another key is set aside, together with the files made from it. A last line that was
    cut off is dropped. Use it in a `with` block, which closes the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], key: Mapping[str, Any], made_from_it: Iterable[Path] = ()
    ) -> None:
        self.path = Path(path)
        self.key = json.loads(json.dumps(key))  # as it is read back: tuples become lists
        self.records: dict[int, Any] = {}
        self._file: TextIO | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._continue()
        if not self.records:
            moved = [set_aside(path) for path in (self.path, *made_from_it) if path.exists()]
            if moved:
                logger.info("starting anew; what was there is now %s", ", ".join(path.name for path in moved))

    def _continue(self) -> None:
        try:
            key, records, length = read_journal(self.path)
            differences = _differences(key, self.key)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not reused: it cannot be read (%s)", self.path, error)
            return
        if differences:
            logger.info("%s is not reused: made with another %s", self.path, ", ".join(differences))
            return
        if records:
            os.truncate(self.path, length)
            logger.info("reusing %d results of %s", len(records), self.path)
        self.records = records

    def add(self, index: int, record: Any) -> None:
        """Store a record so that it outlives the process."""
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        if not self.records:
            self._write({"key": self.key})
        self.records[index] = record
        self._write({"index": index, "record": record})
        self._file.flush()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_journal(path: Path) -> tuple[Any, dict[int, Any], int]:
    """Key, records, and the length of the whole lines in bytes. Errors: ValueError, KeyError, TypeError."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    header, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    return header["key"], {line["index"]: line["record"] for line in lines}, len(whole)


def set_aside(path: Path) -> Path:
    """Rename a file to the first free name of NAME.1.SUFFIX, NAME.2.SUFFIX, ..."""
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(free)


def _differences(old: Any, new: Mapping[str, Any]) -> list[str]:
    if not isinstance(old, dict):
        raise TypeError("its first line is no key")
    absent = object()
    return [name for name in sorted({*old, *new}) if old.get(name, absent) != new.get(name, absent)]


def content_key(content: Any) -> str:
    """sha256 of plain values, the same for equal content whatever the order of dict keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def weights_key(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every weight in memory, tied ones once.

    Of what is really used, wherever it came from: a folder, a checkpoint on top of it, another dtype.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def config_key(config: PreTrainedConfig) -> str:
    """sha256 of a model's config, but for what does not decide what it computes."""
    content = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # a folder may move, a library may be updated
        content.pop(name, None)
    return content_key(content)


def model_key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What of a model and its tokenizer decides a completion: weights, config, tokenizer, each as a hash."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return {
        "weights": weights_key(model),
        "config": content_key([config_key(model.config), ends]),
        "tokenizer": content_key([type(tokenizer).__name__, tokenizer.get_vocab(), special]),
    }
