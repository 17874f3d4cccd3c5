"""How answers are printed: as they grow, as one JSON document, side by side."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .. import __version__

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import LoRARequest, RequestOutput
    from ..params import SamplingParams


def stream_answer(llm: "LLM", ids: list[int], params: "SamplingParams", chosen: list["LoRARequest"]) -> str:
    """Print the answer as it grows, then how fast it was; returns it."""
    started = time.perf_counter()
    first, pieces = 0.0, []
    for _, text in llm.stream({"prompt_token_ids": ids}, params, chosen):
        first = first or time.perf_counter() - started
        pieces.append(text)
        click.echo(text, nl=False)
    click.echo()
    seconds = time.perf_counter() - started
    text = "".join(pieces)
    count = len(llm.tokenizer.encode(text, add_special_tokens=False))
    rate = (count - 1) / (seconds - first) if count > 1 else 0
    click.echo(
        f"[{len(ids)} prompt tokens, first token after {first:.2f} s, about {count} tokens at {rate:.0f}/s]", err=True
    )
    return text


def print_json(outputs: list["RequestOutput"], seconds: float, names: Sequence[str] | None = None) -> None:
    """Print all texts as one document. names: what stands for each output's adapters."""
    rows = []
    for i, output in enumerate(outputs):
        for text in output.outputs:
            rows.append(
                {
                    "adapter": names[i] if names else [lora.lora_name for lora in output.lora_request],
                    "text": text.text,
                    "token_ids": text.token_ids,
                    "finish_reason": text.finish_reason,
                    "prompt_tokens": len(output.prompt_token_ids),
                }
            )
    document = {"version": __version__, "seconds": round(seconds, 4), "outputs": rows}
    click.echo(json.dumps(document, ensure_ascii=False))


def print_columns(question: str, titles: Sequence[str], texts: Sequence[str]) -> None:
    """Print texts side by side under their titles, below the question."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=question, box=box.SIMPLE_HEAD, title_style="bold", expand=False)
    for title in titles:
        table.add_column(Text(title), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=120).print(table)
