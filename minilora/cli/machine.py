"""`minilora warmup` and `minilora env`: this computer made ready, and what it is."""

import time
from typing import TYPE_CHECKING

import click

from .opening import open_model
from .options import model_options
from .printing import print_facts
from .report import Reporter

if TYPE_CHECKING:
    from ..llm import LLM


@click.command()
@model_options
def warmup(model: str, dtype: str, group_size: str, threads: int | None) -> None:
    """Fetch, pack and compile all that a model needs, so that later starts are quick: with pages and adapters in their
    default formats."""
    reporter = Reporter()
    started = time.perf_counter()
    llm = open_model(reporter, model, dtype, group_size, threads, max_num_seqs=1)
    llm.engine.warm_up()
    _read_an_adapter(llm)
    reporter.done()
    click.echo(f"ready in {time.perf_counter() - started:.1f} s")


def _read_an_adapter(llm: "LLM") -> None:
    """Compile what reads and packs adapters."""
    import numpy as np

    from minilora_kernels.convert import widen_float16

    from ..adapters import Adapter, Pair, module_shapes

    module, (rows, columns) = next(iter(module_shapes(llm.model.weights.config).items()))
    # As from a file: what is read there can't be written to, which makes another program.
    a, b = (widen_float16(np.frombuffer(bytes(2 * size), np.uint16)) for size in (columns, rows))
    llm.engine.adapters.read(Adapter({module: Pair(a.reshape(1, columns), b.reshape(rows, 1))}))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def env(as_json: bool) -> None:
    """Show versions, CPU and folders, for bug reports."""
    from ..inspect import environment

    print_facts(environment(), as_json)
