"""Progress of what takes long, such as downloads and packing: told in sentences to whoever calls it."""

from collections.abc import Callable

Report = Callable[[str], None]
"""Takes one line of text."""


def silent(message: str) -> None:
    """A Report that says nothing."""
