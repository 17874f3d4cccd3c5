"""The command line. stdout carries the result only; progress, statistics and errors go to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. MINILORA_DEBUG=1 shows tracebacks.
Heavy imports happen inside commands, so that --help is quick.
"""

import contextlib
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .cli_models import list_, pull, quantize, show
from .cli_options import (
    engine_options,
    lora_options,
    model_options,
    sampling_options,
    split_engine,
    split_lora,
    split_scale,
)
from .cli_report import Reporter, announce_compiling
from .cli_serve import serve
from .errors import MiniloraError, UsageError

if TYPE_CHECKING:
    from .llm import LLM
    from .outputs import LoRARequest, RequestOutput
    from .params import SamplingParams
    from .plain import PlainLLM

    Model = LLM | PlainLLM

QUESTION = "Name three fruits."


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


def _open(reporter: Reporter, model: str, dtype: str, group_size: str, threads: int | None, **engine: Any) -> "LLM":
    from .llm import LLM

    announce_compiling(reporter)
    return LLM(model, dtype=dtype, group_size=int(group_size), threads=threads, report=reporter, **engine)


def _params(llm: "Model", seed: int | None, stop: Sequence[str], max_tokens: int, **given: Any) -> "SamplingParams":
    chosen = {key: value for key, value in given.items() if value is not None}
    if "temperature" not in llm.model.generation:
        chosen.setdefault("temperature", 0.0)
    return llm.model.default_params(max_tokens=max_tokens, stop=list(stop), seed=seed, **chosen)


def _load_adapters(
    llm: "Model", loras: Sequence[str], adapters: Sequence[str], reporter: Reporter
) -> list["LoRARequest"]:
    """The adapters that a request is to use."""
    from .outputs import LoRARequest

    scales: dict[str, float] = {}
    for text in loras:
        name, path, scale = split_lora(text)
        llm.add_lora(name, path, report=reporter)
        scales[name] = scale
    if not adapters:
        return [LoRARequest(name, scale=scale) for name, scale in scales.items()]
    chosen = []
    for text in adapters:
        name, scale = split_scale(text)
        if name not in llm.adapters:
            llm.add_lora(name, name, report=reporter)
        chosen.append(LoRARequest(name, scale=scale * scales.get(name, 1.0)))
    return chosen


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]


def _prompt_ids(llm: "Model", prompt: str, system: str | None, raw: bool) -> list[int]:
    from .chat import encode_chat

    if raw or llm.tokenizer.files.chat_template is None:
        if system:
            raise UsageError("--system needs a model with a chat template, and no --raw")
        return llm.tokenizer.encode(prompt)
    return encode_chat(llm.tokenizer, _messages(prompt, system))


def _piped() -> str | None:
    """What stands in a pipe or file on stdin, None for a terminal or nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return None
    return sys.stdin.read() or None


# ---------------------------------------------------------------- generate


@cli.command()
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
    stream: bool,
    raw: bool,
    as_json: bool,
    backend: str,
    system: str | None,
    **rest: Any,
) -> None:
    """Answer PROMPT; "-" or a pipe reads it from stdin.

    Without a prompt: ask the model one question and show the answers of the base model and of the bundled
    adapters side by side, from one batch.
    """
    if prompt is None or prompt == "-":
        prompt = _piped() if prompt is None else sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    reporter = Reporter()
    engine, sampling = split_engine(rest)
    if backend == "numpy":
        _generate_plain(
            reporter,
            QUESTION if prompt is None else prompt,
            system,
            model,
            dtype,
            group_size,
            loras,
            adapters,
            raw,
            as_json,
            sampling,
        )
        return
    llm = _open(reporter, model, dtype, group_size, threads, **engine)
    if prompt is None and not loras and not adapters:
        _show_side_by_side(llm, reporter, system, as_json, sampling)
        return
    chosen = _load_adapters(llm, loras, adapters, reporter)
    ids = _prompt_ids(llm, QUESTION if prompt is None else prompt, system, raw)
    params = _params(llm, **sampling)
    reporter.done()
    if as_json or not stream:
        started = time.perf_counter()
        output = llm.generate({"prompt_token_ids": ids}, params, [chosen])[0]
        seconds = time.perf_counter() - started
        click.echo(_json([output], seconds) if as_json else output.outputs[0].text)
        return
    _stream(llm, ids, params, chosen)


def _stream(llm: "LLM", ids: list[int], params: "SamplingParams", chosen: list["LoRARequest"]) -> str:
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


def _json(outputs: list["RequestOutput"], seconds: float, names: Sequence[str] | None = None) -> str:
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
    return json.dumps({"version": __version__, "seconds": round(seconds, 4), "outputs": rows}, ensure_ascii=False)


def _show_side_by_side(
    llm: "LLM", reporter: Reporter, system: str | None, as_json: bool, sampling: dict[str, Any]
) -> None:
    from .checkpoint.lock import entries
    from .outputs import LoRARequest

    names = [name for name, entry in entries("adapters").items() if entry.base == llm.model.name]
    for name in names:
        llm.add_lora(name, name, report=reporter)
    ids = _prompt_ids(llm, QUESTION, system, raw=False)
    requests = [(), *((LoRARequest(name),) for name in names)]
    sampling["max_tokens"] = min(sampling["max_tokens"], 96)
    params = _params(llm, **sampling)
    reporter.done()
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids}] * len(requests), params, requests)
    seconds = time.perf_counter() - started
    titles = ["base", *names]
    if as_json:
        click.echo(_json(outputs, seconds, titles))
        return
    _print_columns(QUESTION, titles, [output.outputs[0].text.strip() for output in outputs])
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    click.echo(
        f"[{len(outputs)} answers in one batch: {count} tokens in {seconds:.2f} s, {count / seconds:.0f}/s]", err=True
    )


def _print_columns(question: str, titles: Sequence[str], texts: Sequence[str]) -> None:
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


def _generate_plain(
    reporter: Reporter,
    prompt: str,
    system: str | None,
    model: str,
    dtype: str,
    group_size: str,
    loras: Sequence[str],
    adapters: Sequence[str],
    raw: bool,
    as_json: bool,
    sampling: dict[str, Any],
) -> None:
    """generate with the NumPy reference."""
    from .plain import PlainLLM

    llm = PlainLLM(model, dtype=dtype, group_size=int(group_size), report=reporter)
    chosen = _load_adapters(llm, loras, adapters, reporter)
    ids = _prompt_ids(llm, prompt, system, raw)
    params = _params(llm, **sampling)
    reporter.done()
    started = time.perf_counter()
    output = llm.generate({"prompt_token_ids": ids}, params, chosen)
    click.echo(_json([output], time.perf_counter() - started) if as_json else output.outputs[0].text)


# ---------------------------------------------------------------- chat


@cli.command()
@model_options
@lora_options
@sampling_options
@engine_options
def chat(
    model: str,
    dtype: str,
    group_size: str,
    threads: int | None,
    loras: Sequence[str],
    adapters: Sequence[str],
    system: str | None,
    **rest: Any,
) -> None:
    """Talk with a model. /adapter NAME switches, /reset starts anew, /help lists all."""
    reporter = Reporter()
    engine, sampling = split_engine(rest)
    llm = _open(reporter, model, dtype, group_size, threads, **{"max_num_seqs": 1, **engine})
    chosen = _load_adapters(llm, loras, adapters, reporter)
    reporter.done()
    _Conversation(llm, chosen, system, _params(llm, **sampling), reporter).run()


class _Conversation:
    def __init__(
        self, llm: "LLM", chosen: list["LoRARequest"], system: str | None, params: "SamplingParams", reporter: Reporter
    ):
        self.llm, self.chosen, self.system, self.params, self.reporter = llm, chosen, system, params, reporter
        self.messages: list[dict[str, str]] = []
        self.reset("")

    def run(self) -> None:
        """Until /quit or the end of input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (gives input() a history)
        commands = {"/reset": self.reset, "/adapter": self.adapter, "/help": self.help}
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line in ("/quit", "/exit"):
                return
            word, _, rest = line.partition(" ")
            if word in commands:
                self.attempt(commands[word], rest.strip())
            elif line.startswith("/"):
                click.echo(f"no command {word}; /help lists them", err=True)
            elif line:
                self.attempt(self.answer, line)

    def attempt(self, action: Callable[[str], None], text: str) -> None:
        """Report what goes wrong and go on."""
        try:
            action(text)
        except MiniloraError as error:
            click.echo(f"error: {error.cause}", err=True)
        except KeyboardInterrupt:
            click.echo("\n[stopped]", err=True)

    def answer(self, line: str) -> None:
        """Print the model's answer and keep both."""
        from .chat import encode_chat

        messages = [*self.messages, {"role": "user", "content": line}]
        text = _stream(self.llm, encode_chat(self.llm.tokenizer, messages), self.params, self.chosen)
        self.messages = [*messages, {"role": "assistant", "content": text}]

    def reset(self, _: str) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def adapter(self, name: str) -> None:
        """Answer with these adapters from now on."""
        self.chosen = _load_adapters(self.llm, [], name.split(), self.reporter) if name else []
        self.reporter.done()
        click.echo(f"[{'with ' + name if name else 'without adapter'}]", err=True)

    def help(self, _: str) -> None:
        """List the commands."""
        click.echo(
            "/adapter NAME[:SCALE] ...  answer with these adapters; without a name: with none\n"
            "/reset                     forget the conversation\n/quit                      leave",
            err=True,
        )


# ---------------------------------------------------------------- the machine


@cli.command()
@model_options
def warmup(model: str, dtype: str, group_size: str, threads: int | None) -> None:
    """Fetch, pack and compile all that a model needs, so that later starts are quick."""
    from .params import SamplingParams

    reporter = Reporter()
    started = time.perf_counter()
    llm = _open(reporter, model, dtype, group_size, threads, max_num_seqs=1)
    llm.generate({"prompt_token_ids": [0]}, SamplingParams(max_tokens=2, temperature=1.0, logprobs=1, ignore_eos=True))
    reporter.done()
    click.echo(f"ready in {time.perf_counter() - started:.1f} s")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def env(as_json: bool) -> None:
    """Show versions, CPU and folders, for bug reports."""
    from .inspect import environment

    facts = environment()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        click.echo(f"{key:12} {value}")


for command in (serve, pull, list_, show, quantize):
    cli.add_command(command)
