"""The command line. stdout carries the result only; progress, statistics and errors go to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. MINILORA_DEBUG=1 shows tracebacks.
Heavy imports happen inside commands, so that --help is quick.

generate, chat, serve       the commands that run a model
models, machine             pull, list, show, quantize; warmup, env
options                     options that several commands share
opening, answers, report    opening models and their adapters; how answers are printed; progress on stderr
"""

import os
import sys
from collections.abc import Sequence

import click

from .. import __version__
from ..errors import MiniloraError, UsageError
from .chat import chat
from .generate import generate
from .machine import env, warmup
from .models import list_, pull, quantize, show
from .serve import serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return (
            cli.main(
                args=list(arguments) if arguments is not None else None, prog_name="minilora", standalone_mode=False
            )
            or 0
        )
    except click.ClickException as error:
        error.show(sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except MiniloraError as error:
        if os.environ.get("MINILORA_DEBUG"):
            raise
        click.echo(f"error: {error.cause}", err=True)
        if error.remedy:
            click.echo(error.remedy, err=True)
        return 2 if isinstance(error, UsageError) else 1


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MINILORA", "max_content_width": 100}
)
@click.version_option(__version__, message="minilora %(version)s")
def cli() -> None:
    """Run language models with LoRA adapters on this computer's CPU."""


for command in (generate, chat, serve, pull, list_, show, quantize, warmup, env):
    cli.add_command(command)
