"""SHA-256 identities, as hex digits.

`content_hash`: weights on disk under the loaded model's names; masks and deltas carry it.
`remembered_hash`: the same, and it is remembered as long as the files stay what they are.
`weights_key`, `config_key`, `model_key`: what a loaded model computes; results are stored under them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lota.config import default_cache, expanded
from lota.models.weights import WeightSource, open_weights
from lota.storage import content_key, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HASH_CHUNK = 1 << 20  # entries that are read at a time
REMEMBERED = "hashes.json"  # of the cache folder: what remembered_hash knows, the newest last
REMEMBERED_AT_MOST = 1000
SETTLED = 2.0  # seconds: a file written again within its time stamp's resolution looks untouched
logger = logging.getLogger(__name__)


def content_hash(source: WeightSource) -> str:
    """sha256 over (name, dtype, shape, bytes) of every parameter in the order of names."""
    return StreamingHash(source).finish()


def remembered_hash(path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> str:
    """`content_hash` of weights on disk, computed once for as long as their files stay the same.

    path, model: as in `open_weights`. A file is the same by its path, size, inode and time of change in ns;
    one that has just been written is hashed, but not remembered. The memory is a file of the cache folder
    that anybody may delete; if it cannot be read or written, the hash is computed.
    """
    source = open_weights(path, model)
    file = expanded(default_cache()) / REMEMBERED
    began, key = time.time_ns(), _files_key(source)
    found = _read_remembered(file).get(key)
    if found is not None:
        return found
    made = content_hash(source)
    newest = max((path.stat().st_mtime_ns for path in source.files), default=0)
    if newest < began - SETTLED * 1e9 and _files_key(source) == key:
        kept = _read_remembered(file)  # again: another process may have added to it meanwhile
        kept.pop(key, None)
        newer = [*kept.items(), (key, made)][-REMEMBERED_AT_MOST:]
        try:
            write_json(file, dict(newer))
        except (OSError, ValueError) as error:  # ValueError: others keep it too long
            logger.info("%s is not written (%s): the weights will be hashed again", file, error)
    return made


def _files_key(source: WeightSource) -> str:
    """sha256 of what the content hash depends on: the files as they are now, and which tensors are read."""
    files = {}
    for path in source.files:
        state = path.stat()
        files[str(path.resolve())] = [state.st_size, state.st_mtime_ns, state.st_ino]
    units = [[unit.parameters, unit.stored, unit.converted] for unit in source.units()]
    return content_key([files, units, version("transformers")])  # which converts what is stored


def _read_remembered(file: Path) -> dict[str, str]:
    """Key of files -> content hash; whatever is no hash is left out."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {key: made for key, made in content.items() if re.fullmatch("[0-9a-f]{64}", str(made))}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        logger.info("%s is not used, it cannot be read: %s", file, str(error)[:200])
        return {}


class StreamingHash:
    """`content_hash` of a source that is being read for another purpose, so that it is read only once.

    `put` takes parts as they are read, from any thread and a little out of order; parts that nobody puts in
    are read here when their turn comes, at the latest in `finish`. Those who read in the order of names
    and in parts of `chunk` entries keep what waits here small.
    """

    def __init__(self, source: WeightSource, shared: Iterable[str] = (), chunk: int = HASH_CHUNK):
        """shared: names whose parts will be put in."""
        self._source = source
        self._shared = {name for name in shared if source.numel(name)}
        self._parts = [  # (name, start, stop) in the order in which they are hashed
            (name, start, min(start + chunk, source.numel(name)))
            for name in sorted(source.names())
            for start in range(0, max(source.numel(name), 1), chunk)
        ]
        self._turn = {part: i for i, part in enumerate(self._parts)}
        self._next = 0  # turn of the part that is hashed next
        self._waiting: dict[int, Tensor] = {}  # turn -> part that came before its turn
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()

    def wants(self, name: str, start: int, stop: int) -> bool:
        """Whether this part is still to come, so that `put` would keep it."""
        turn = self._turn.get((name, start, stop))
        return turn is not None and turn >= self._next and name in self._shared

    def put(self, name: str, start: int, stop: int, part: Tensor) -> None:
        """Take entries [start, stop) of a parameter; nothing happens if they were taken before."""
        if not self.wants(name, start, stop):
            return
        self._waiting[self._turn[name, start, stop]] = part
        while self._is_due() and self._lock.acquire(blocking=False):  # one thread hashes, none waits for it
            try:
                while self._is_due():
                    self._take_next()
            finally:
                self._lock.release()

    def finish(self) -> str:
        """The hash, once nobody puts in more."""
        while self._next < len(self._parts):
            self._take_next()
        return self._digest.hexdigest()

    def _is_due(self) -> bool:
        if self._next >= len(self._parts):
            return False
        return self._next in self._waiting or self._parts[self._next][0] not in self._shared

    def _take_next(self) -> None:
        name, start, stop = self._parts[self._next]
        part = self._waiting.pop(self._next, None)
        if part is None:
            part = self._source.read_flat(name, start, stop)
        if start == 0:
            shape, dtype = self._source.shape(name), str(self._source.dtype(name)).removeprefix("torch.")
            self._digest.update(f"{name}\0{dtype}\0{'x'.join(map(str, shape))}\0".encode())
        self._digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
        self._next += 1


def weights_key(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every weight in memory, tied ones once.

    Of what is really used, wherever it came from: a folder, a checkpoint on top of it, another dtype.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_key(config: PreTrainedConfig) -> str:
    """sha256 of a model's config, but for what does not decide what it computes."""
    return _config_key(config.to_dict())


def config_file_key(path: str | os.PathLike[str]) -> str:
    """The same of config.json as it stands, without the defaults of today's library: a folder's or hub id's.

    Raises OSError if there is none, ValueError if it is no JSON.
    """
    from transformers.utils.hub import cached_file  # slow to import

    file = cached_file(str(path), "config.json")
    assert file is not None
    return _config_key(json.loads(Path(file).read_text(encoding="utf-8")))


def _config_key(content: dict[str, Any]) -> str:
    about = ("_name_or_path", "transformers_version")  # a folder may move, a library may be updated
    return content_key({key: value for key, value in content.items() if key not in about})


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides the ids of a text: vocabulary, merges, normalization, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = tokenizer.get_vocab()
    else:
        of_the_last_call = ("padding", "truncation")
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in of_the_last_call}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return content_key([type(tokenizer).__name__, rules, special])


def model_key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What of a model and its tokenizer decides a completion: weights, config, tokenizer, each as a hash."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {
        "weights": weights_key(model),
        "config": content_key([config_key(model.config), ends]),
        "tokenizer": tokenizer_key(tokenizer),
    }
