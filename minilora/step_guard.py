"""Makes sure that at most one thread is in a step, and never twice."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UsageError


class StepGuard:
    """Keeps an engine's steps apart: within one another, or side by side, they would compute in the same arrays.

    computing: whether a step is being computed, so that no text may end.
    """

    def __init__(self) -> None:
        self.computing = False
        self._taken = threading.Lock()
        self._thread: int | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Be in a step. Raises UsageError where somebody is."""
        self.check_idle()
        if not self._taken.acquire(blocking=False):
            raise _other_thread()
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
            self._taken.release()

    def check_thread(self) -> None:
        """Raise UsageError while another thread is in a step."""
        if self._thread not in (None, threading.get_ident()):
            raise _other_thread()

    def check_idle(self) -> None:
        """Raise UsageError where no step can begin."""
        self.check_thread()
        if self._thread is not None:
            raise UsageError("the engine is in a step already", "Within one, queue requests with submit.")

    def check_settled(self) -> None:
        """Raise UsageError where no text can end."""
        self.check_thread()
        if self.computing:
            raise UsageError("a step is being computed", "End texts between steps, not from a logits processor.")


def _other_thread() -> UsageError:
    return UsageError("another thread is in a step of this engine", "To serve several threads use AsyncEngine.")
