"""Everything that minilora raises on purpose.

    MiniloraError
    ├── UsageError         a parameter or a request is wrong (also a ValueError)
    ├── NotFoundError      no model, adapter or file of that name (also a LookupError)
    ├── DownloadError      a file could not be fetched, or is not the one that was asked for
    ├── FormatError        a file is damaged or says something impossible
    ├── UnsupportedError   correct input whose mathematics minilora does not have
    ├── AdapterError       an adapter does not fit its base model, or is incomplete
    │   └── UnloadedError  it was unloaded while a request used it
    ├── ResourceError      memory, disk or threads are short
    ├── RequestError       a request failed for a reason of its own, or with the step that it was in
    ├── QueueTimeoutError  a request waited too long for its turn
    └── EngineDeadError    the engine has stopped and takes no more requests
        └── EngineClosedError  because it was told to

Each says the cause in one line and, where there is one, the remedy in a second.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Self


class MiniloraError(Exception):
    """Base of all. cause: what is wrong, naming the value; remedy: what to do about it, may be empty."""

    def __init__(self, cause: str, remedy: str = ""):
        super().__init__(f"{cause}\n{remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy


class UsageError(MiniloraError, ValueError):
    """A parameter or a request is wrong. param: which one, where it has a name."""

    def __init__(self, cause: str, remedy: str = "", param: str | None = None):
        super().__init__(cause, remedy)
        self.param = param


class NotFoundError(MiniloraError, LookupError):
    """Nothing of that name is there."""


class DownloadError(MiniloraError):
    """A file could not be fetched, or its bytes are not the expected ones."""


class FormatError(MiniloraError):
    """A file is damaged or contradicts itself."""


class UnsupportedError(MiniloraError):
    """The input asks for something that minilora does not compute."""


class AdapterError(MiniloraError):
    """An adapter does not fit its base model, or is incomplete."""


class UnloadedError(AdapterError):
    """An adapter was unloaded while a request used it."""


class ResourceError(MiniloraError):
    """Memory, disk or threads are short."""


class RequestError(MiniloraError):
    """A request failed while it ran. outputs: of a call of LLM, those of all its requests; else empty."""

    def __init__(self, cause: str, remedy: str = "", outputs: Sequence[Any] = ()):
        super().__init__(cause, remedy)
        self.outputs = list(outputs)


class QueueTimeoutError(MiniloraError):
    """A request waited too long for its turn."""


class EngineDeadError(MiniloraError):
    """The engine has stopped."""

    def copy(self) -> Self:
        """Another of the same content: each that waits for the engine raises its own."""
        return type(self)(self.cause, self.remedy)


class EngineClosedError(EngineDeadError):
    """The engine has stopped because it was told to."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint naming the known name nearest to `name`; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""
