"""Whether a model that is not a local folder can be had: from the hub's cache, or from the hub."""

from __future__ import annotations

import functools
import logging
import os
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)
_SECONDS = 3.0  # to reach the hub in; a firewall or a name server may let one wait for minutes
_TELLING = ("config.json", "tokenizer_config.json", "tokenizer.json")  # one of them is in every model


def refuse_absent(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for what neither exists here nor can be had from the hub, without asking it for long.

    A hub that cannot be reached is not asked again in this process: its libraries would retry for a minute.
    """
    if not str(path).strip():  # it would be the working directory
        raise ValueError("the model's name is empty: give a Hugging Face folder or a hub id")
    if Path(path).expanduser().exists():
        return
    if not _is_hub_id(str(path)):
        raise ValueError(f"{path} does not exist: give a Hugging Face folder, a hub id or a policy.pt")
    if not hub_is_used() and not _is_cached(str(path)):
        from huggingface_hub import constants

        raise ValueError(
            f"{path} does not exist: it is no folder or file here, there is no hub model of that name in "
            f"{constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached or is switched off "
            "(HF_HUB_OFFLINE); give a Hugging Face folder, or fetch the model on a machine with a network"
        )


def hub_is_used() -> bool:
    """Whether the hub's libraries may ask it; if it cannot be reached, from now on they may not.

    Behind a proxy they always may: whether it leads to the hub, only they can tell.
    """
    from huggingface_hub import constants  # slow to import

    if constants.is_offline_mode():
        return False
    if urllib.request.getproxies() or _reachable(constants.ENDPOINT):
        return True
    constants.HF_HUB_OFFLINE = True
    logger.info("%s cannot be reached; only what is cached can be read", constants.ENDPOINT)
    return False


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith((".pt", ".safetensors", ".bin"))


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in _TELLING)


@functools.cache  # many may ask
def _reachable(url: str) -> bool:
    """Whether a connection can be made. In a thread: looking up the host's name has no time limit."""
    parts = urlsplit(url)
    address = parts.hostname, parts.port or (80 if parts.scheme == "http" else 443)
    reached = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, _SECONDS).close()
        except OSError:
            return
        reached.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return reached.is_set()
