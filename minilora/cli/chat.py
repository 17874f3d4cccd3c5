"""`minilora chat`: a conversation on the terminal, or from a pipe line by line."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import MiniloraError, UsageError
from .opening import choose_adapters, load_loras, open_model, sampling_params, system_message
from .options import engine_options, lora_options, model_options, sampling_options, split_engine
from .printing import stream_answer
from .report import Reporter, print_error

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import LoRARequest
    from ..params import SamplingParams


@click.command()
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
    if sys.stdin is None:
        raise UsageError("a chat reads its lines from stdin, which is closed")
    reporter = Reporter()
    engine, sampling = split_engine(rest)
    llm = open_model(reporter, model, dtype, group_size, threads, **{"max_num_seqs": 1, **engine})
    scales = load_loras(llm, loras, reporter)
    chosen = choose_adapters(llm, scales, adapters, reporter)
    reporter.done()
    _Conversation(llm, scales, chosen, system, sampling_params(llm, **sampling), reporter).run()


class _Conversation:
    def __init__(
        self,
        llm: "LLM",
        scales: dict[str, float],
        chosen: list["LoRARequest"],
        system: str | None,
        params: "SamplingParams",
        reporter: Reporter,
    ):
        self.llm, self.scales, self.chosen, self.system = llm, scales, chosen, system
        self.params, self.reporter = params, reporter
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
                line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
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
            print_error(error)
        except KeyboardInterrupt:
            click.echo("\n[stopped]", err=True)

    def answer(self, line: str) -> None:
        """Print the model's answer and keep both."""
        from ..chat import encode_chat

        messages = [*self.messages, {"role": "user", "content": line}]
        ids, length = encode_chat(self.llm.tokenizer, messages), self.llm.engine.length
        if len(ids) >= length and self.messages != system_message(self.system):
            raise UsageError(
                f"the conversation no longer fits: it has {len(ids)} tokens, the model takes {length - 1} at most",
                "/reset starts a new one; --max-model-len makes room if the model was trained for more.",
            )
        text = stream_answer(self.llm, ids, self.params, self.chosen)
        self.messages = [*messages, {"role": "assistant", "content": text}]

    def reset(self, _: str) -> None:
        """Forget what was said."""
        self.messages = system_message(self.system)

    def adapter(self, name: str) -> None:
        """Answer with these adapters from now on."""
        self.chosen = choose_adapters(self.llm, self.scales, name.split(), self.reporter) if name else []
        self.reporter.done()
        click.echo(f"[{'with ' + name if name else 'without adapter'}]", err=True)

    def help(self, _: str) -> None:
        """List the commands."""
        click.echo(
            "/adapter NAME[:SCALE] ...  answer with these adapters; without a name: with none\n"
            "/reset                     forget the conversation\n/quit                      leave",
            err=True,
        )
