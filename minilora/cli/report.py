"""What commands say on stderr: what takes long, and what went wrong."""

import sys

import click

from ..errors import MiniloraError


class Reporter:
    """Shows what takes long, one line at a time, on stderr; a terminal's line is overwritten."""

    def __init__(self) -> None:
        self._live = sys.stderr is not None and sys.stderr.isatty()
        self._width = 0

    def __call__(self, message: str) -> None:
        """Show a line."""
        if not self._live:
            click.echo(message, err=True)
            return
        click.echo("\r" + message.ljust(self._width), err=True, nl=False)
        self._width = len(message)

    def done(self) -> None:
        """Clear the line."""
        if self._live and self._width:
            click.echo("\r" + " " * self._width + "\r", err=True, nl=False)
            self._width = 0


def announce_compiling(report: Reporter) -> None:
    """Announce programs that are compiled for this CPU."""
    from minilora_kernels.jit import on_compile

    on_compile(lambda name: report(f"compiling the {name.strip('_')} program for this CPU (once; kept on disk)"))


def print_error(error: Exception) -> None:
    """Say what is wrong, and in a second line what to do about it if the error knows."""
    cause, remedy = (error.cause, error.remedy) if isinstance(error, MiniloraError) else (str(error), "")
    click.echo(f"error: {cause}", err=True)
    if remedy:
        click.echo(remedy, err=True)
