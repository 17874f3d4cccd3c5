"""`minilora warmup` and `minilora env`: make this computer ready, and describe it."""

import time

import click

from .opening import open_model
from .options import model_options
from .printing import print_facts
from .report import Reporter


@click.command()
@model_options
def warmup(model: str, dtype: str, group_size: str, threads: int | None) -> None:
    """Fetch, pack and compile all that a model needs, so that later starts are quick.

    The KV cache and adapters are taken to have their default formats.
    """
    reporter = Reporter()
    started = time.perf_counter()
    llm = open_model(reporter, model, dtype, group_size, threads, max_num_seqs=1)
    llm.engine.warm_up()
    reporter.done()
    click.echo(f"ready in {time.perf_counter() - started:.1f} s")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def env(as_json: bool) -> None:
    """Show versions, CPU and folders, for bug reports."""
    from ..describing import environment

    print_facts(environment(), as_json)
