"""A user's mistakes gathered, so that all of them are told at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Problems:
    """What went wrong in several checks, each of which may raise ValueError."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, check: Callable[..., T], *arguments: Any, **named: Any) -> T | None:
        """The check's result; None where it raised ValueError, whose message is kept."""
        try:
            return check(*arguments, **named)
        except ValueError as error:
            self.found.append(str(error))
            return None

    def refuse(self) -> None:
        """Raise one ValueError with everything found, each message once; nothing where there is nothing."""
        if self.found:
            raise ValueError("\n".join(dict.fromkeys(self.found)))


def torch_reason(error: Exception) -> str:
    """One line of why `torch.load` refused a file, without its advice to load with weights_only=False."""
    text = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip() or type(error).__name__
    return text.splitlines()[0].split(" Please use")[0][:200]
