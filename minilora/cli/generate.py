"""`minilora generate`: one answer, or without a prompt the bundled adapters' answers side by side."""

import os
import stat
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .opening import choose_adapters, load_loras, open_model, open_plain, prompt_ids, sampling_params
from .options import engine_options, lora_options, model_options, sampling_options, split_engine
from .printing import note_full_context, print_columns, print_json, stream_answer
from .report import Reporter

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import LoRARequest
    from ..params import SamplingParams
    from .opening import Model

QUESTION = "Name three fruits."
# Seconds of silence on stdin, after which the user is told what is waited for.
WAITING = 1.0


@dataclass(frozen=True)
class _Asked:
    """What is asked of the model, as the options say. sampling: those for SamplingParams."""

    prompt: str
    system: str | None
    raw: bool
    loras: Sequence[str]
    adapters: Sequence[str]
    sampling: dict[str, Any]

    def prepare(self, llm: "Model", reporter: Reporter) -> tuple[list[int], "SamplingParams", list["LoRARequest"]]:
        """(the prompt's tokens, parameters, adapters), loaded."""
        chosen = choose_adapters(llm, load_loras(llm, self.loras, reporter), self.adapters, reporter)
        ids = prompt_ids(llm, self.prompt, self.system, self.raw)
        params = sampling_params(llm, **self.sampling)
        reporter.done()
        return ids, params, chosen


@click.command()
@click.argument("prompt", required=False)
@model_options
@lora_options
@sampling_options
@engine_options
@click.option("--stream/--no-stream", default=True, help="Print the answer as it grows.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@click.option(
    "--backend",
    type=click.Choice(["numba", "numpy"]),
    default="numba",
    show_default=True,
    help="numpy: the plain reference, slow.",
)
def generate(
    prompt: str | None,
    model: str,
    dtype: str,
    group_size: str,
    threads: int | None,
    loras: Sequence[str],
    adapters: Sequence[str],
    system: str | None,
    stream: bool,
    raw: bool,
    as_json: bool,
    backend: str,
    **rest: Any,
) -> None:
    """Answer PROMPT; "-" or a pipe reads it from stdin.

    Without a prompt: ask the model one question and show the answers of the base model and of the bundled
    adapters side by side, from one batch; with --lora or --adapter, show the answer with these.
    """
    prompt = _read_prompt(prompt, raw)
    reporter = Reporter()
    if prompt is None and (loras or adapters):
        click.echo(QUESTION, err=True)
    engine, sampling = split_engine(rest)
    asked = _Asked(QUESTION if prompt is None else prompt, system, raw, loras, adapters, sampling)
    if backend == "numpy":
        _refuse_engine_options([*engine, *(["threads"] if threads is not None else [])])
        _answer_at_once(open_plain(reporter, model, dtype, group_size), asked, reporter, as_json)
        return
    llm = open_model(reporter, model, dtype, group_size, threads, **engine)
    if prompt is None and not loras and not adapters:
        _show_side_by_side(llm, asked, reporter, as_json)
    elif stream and not as_json:
        stream_answer(llm, *asked.prepare(llm, reporter))
    else:
        _answer_at_once(llm, asked, reporter, as_json)


def _read_prompt(argument: str | None, raw: bool) -> str | None:
    """The prompt: the argument, or what stdin holds for "-" or in a pipe; None if there is none. Raises UsageError.

    raw: to the last byte; else, as in a shell, without the last line's end.
    """
    prompt = argument
    if argument == "-":
        prompt = _read_stdin()
    elif argument is None and _is_piped():
        prompt = _read_stdin() or None
    if prompt is not None and argument in ("-", None) and not raw:
        prompt = prompt.removesuffix("\n")
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt


def _read_stdin() -> str:
    if sys.stdin is None:
        raise UsageError("the prompt should come from stdin, which is closed")
    # A pipe that nobody writes to looks like a program that hangs.
    waiting = threading.Timer(WAITING, click.echo, ("reading the prompt from stdin",), {"err": True})
    waiting.daemon = True
    waiting.start()
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UsageError(f"stdin is not {error.encoding} text: its byte {error.start} is 0x{byte:02x}") from None
    finally:
        waiting.cancel()


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file, not a terminal or nothing."""
    if sys.stdin is None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _refuse_engine_options(given: list[str]) -> None:
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{flags}: no effect with --backend numpy", "Leave one of the two out.")


def _answer_at_once(llm: "Model", asked: _Asked, reporter: Reporter, as_json: bool) -> None:
    ids, params, chosen = asked.prepare(llm, reporter)
    started = time.perf_counter()
    [output] = llm.generate([{"prompt_token_ids": ids}], params, [chosen])
    [answer] = output.outputs
    if as_json:
        print_json([output], time.perf_counter() - started)
    else:
        click.echo(answer.text)
    note_full_context(len(ids), len(answer.token_ids), answer.finish_reason, params)


def _show_side_by_side(llm: "LLM", asked: _Asked, reporter: Reporter, as_json: bool) -> None:
    from ..checkpoint.resolve import entries
    from ..outputs import LoRARequest

    names = [name for name, entry in entries("adapters").items() if entry.base == llm.model.name]
    for name in names:
        llm.add_lora(name, name, report=reporter)
    asked = replace(asked, sampling={**asked.sampling, "max_tokens": min(asked.sampling["max_tokens"], 96)})
    ids, params, _ = asked.prepare(llm, reporter)
    requests = [(), *((LoRARequest(name),) for name in names)]
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids}] * len(requests), params, requests)
    seconds = time.perf_counter() - started
    titles = ["base", *names]
    if as_json:
        print_json(outputs, seconds, titles)
        return
    print_columns(asked.prompt, titles, [output.outputs[0].text.strip() for output in outputs])
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    click.echo(
        f"[{len(outputs)} answers in one batch: {count} tokens in {seconds:.2f} s, {count / seconds:.0f}/s]", err=True
    )
