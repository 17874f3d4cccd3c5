"""Commands about models and adapters that run none: fetch, list, show, quantize."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from ..errors import UsageError
from .options import DTYPES, group_size_option
from .printing import print_facts
from .report import Reporter


@click.command()
@click.argument("names", nargs=-1, required=True)
def pull(names: Sequence[str]) -> None:
    """Fetch models or adapters without running them."""
    from ..checkpoint.resolve import resolve

    reporter = Reporter()
    for name in names:
        path = resolve(name, reporter)
        reporter.done()
        click.echo(path)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_(as_json: bool) -> None:
    """List the models and adapters that have a name."""
    from ..checkpoint.resolve import entries, is_present

    rows = [
        {
            "kind": kind.removesuffix("s"),
            "name": name,
            "here": is_present(entry),
            "licence": entry.licence,
            "description": entry.description,
        }
        for kind in ("models", "adapters")
        for name, entry in entries(kind).items()
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(
            f"{row['kind']:8} {row['name']:26} {'here' if row['here'] else 'to fetch':9} {row['licence']:12} "
            f"{row['description']}"
        )


@click.command()
@click.argument("name")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Show a model packed in this number format.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(name: str, dtype: str, as_json: bool) -> None:
    """Show a model's or adapter's shapes, formats and bytes."""
    from ..describing import describe

    reporter = Reporter()
    facts = describe(name, dtype, reporter)
    reporter.done()
    print_facts(facts, as_json)


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(DTYPES[1:]), default="int4", show_default=True, help="Number format of the weights."
)
@group_size_option
def quantize(source: str, target: Path, dtype: str, group_size: str) -> None:
    """Write SOURCE as a packed model into the folder TARGET."""
    from ..checkpoint import open_checkpoint
    from ..checkpoint.resolve import resolve_model
    from ..packed import MANIFEST, write_packed
    from ..plan import Plan, Target

    if target.exists():
        raise UsageError(f"{target} exists already", "Remove it, or name another folder.")
    reporter = Reporter()
    path = resolve_model(source, reporter)
    if (path / MANIFEST).exists():
        raise UsageError(f"{source} is packed already", "Quantize what it was made from.")
    checkpoint = open_checkpoint(path)
    plan = Plan(checkpoint, Target(dtype, int(group_size)))
    reporter(f"packing {plan.size / 1e6:.0f} MB")
    try:
        write_packed(target, plan, checkpoint.tokenizer())
    except OSError as error:
        if target.exists():
            raise UsageError(f"{target} was made by somebody else meanwhile", "Name another folder.") from error
        raise
    reporter.done()
    click.echo(target)
