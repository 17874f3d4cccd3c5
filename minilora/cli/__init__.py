"""The command line. stdout carries the result only; progress, statistics and errors go to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 and 143 interrupted. MINILORA_DEBUG=1 shows tracebacks.
Heavy imports happen inside commands, so that --help is quick.

generate, chat, serve       the commands that run a model
models, machine             pull, list, show, quantize; warmup, env
options                     options that several commands share
opening, printing, report   opening models and their adapters; results on stdout; progress and errors on stderr
"""

import io
import os
import sys
from collections.abc import Sequence

import click

from .. import __version__
from ..errors import MiniloraError, UsageError
from ..params import vllm_hint
from .chat import chat
from .generate import generate
from .machine import env, warmup
from .models import list_, pull, quantize, show
from .options import read_environment
from .report import print_error
from .serve import serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What its encoding lacks is shown as a question mark.
        sys.stdout.reconfigure(errors="replace")
    try:
        return (
            cli.main(
                args=list(arguments) if arguments is not None else None, prog_name="minilora", standalone_mode=False
            )
            or 0
        )
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption) and (hint := vllm_hint(error.option_name)):
            error = click.NoSuchOption(error.option_name, f"{error.message} {hint}", ctx=error.ctx)
        error.show(sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except (MiniloraError, OSError, UnicodeError) as error:
        if os.environ.get("MINILORA_DEBUG"):
            raise
        print_error(error)
        _drop_what_cannot_be_written()
        return 2 if isinstance(error, UsageError) else 1


def _drop_what_cannot_be_written() -> None:
    """Where stdout takes nothing more, leave Python nothing to write there at its end: it would complain again."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="minilora %(version)s")
def cli() -> None:
    """Run language models with LoRA adapters on this computer's CPU."""


for command in (generate, chat, serve, pull, list_, show, quantize, warmup, env):
    read_environment(command)
    cli.add_command(command)
