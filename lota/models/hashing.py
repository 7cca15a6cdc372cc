"""SHA-256 identities, as hex digits.

`content_hash`: weights on disk under the loaded model's names; masks and deltas carry it.
`weights_key`, `config_key`, `model_key`: what a loaded model computes; results are stored under them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lota.models.weights import WeightSource
from lota.storage import content_key

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HASH_CHUNK = 1 << 20  # entries that are read at a time


def content_hash(source: WeightSource) -> str:
    """sha256 over (name, dtype, shape, bytes) of every parameter in the order of names."""
    return StreamingHash(source).finish()


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
