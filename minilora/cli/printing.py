"""Results on stdout: answers as they grow, as one JSON document or side by side; facts line by line."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .. import __version__

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import LoRARequest, RequestOutput
    from ..params import SamplingParams


def stream_answer(llm: "LLM", ids: list[int], params: "SamplingParams", chosen: list["LoRARequest"]) -> str:
    """Print the answer as it grows, then how fast it was; returns it."""
    started = time.perf_counter()
    first, text, count, reason = 0.0, "", 0, None
    for delta in llm.stream({"prompt_token_ids": ids}, params, chosen):
        first = first or time.perf_counter() - started
        for new in delta.outputs:
            click.echo(new.text, nl=False)
            text, count, reason = text + new.text, count + len(new.token_ids), new.finish_reason
    click.echo()
    seconds = time.perf_counter() - started
    rate = (count - 1) / (seconds - first) if count > 1 else 0
    click.echo(f"[{len(ids)} prompt tokens, first token after {first:.2f} s, {count} tokens at {rate:.0f}/s]", err=True)
    note_full_context(len(ids), count, reason, params)
    return text


def note_full_context(prompt: int, count: int, reason: str | None, params: "SamplingParams") -> None:
    """Say on stderr that a text of `count` tokens was cut, if the context was full before max_tokens was reached."""
    if reason == "length" and count != params.max_tokens:
        click.echo(f"[cut: prompt and answer fill the context of {prompt + count} tokens]", err=True)


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


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print names with their values, as one document or a line for each."""
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:{width}}  {value}")
