"""Ctrl-C, held back where it would leave books half written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Ctrl-C while an engine works: it comes when the books are in order again, or at once within `let_through`.

    In the main thread, where nobody else handles it; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self._came = self._through = False

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at the end instead of in the middle."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            came, self._came = self._came, False
            if came:
                raise KeyboardInterrupt

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Within held_back, raise KeyboardInterrupt at once: for what takes long and changes no books."""
        if self._came:
            raise KeyboardInterrupt
        self._through = True
        try:
            yield
        finally:
            self._through = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._through:
            raise KeyboardInterrupt
        self._came = True
