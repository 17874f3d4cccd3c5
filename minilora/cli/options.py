"""Options that several commands share: the model, its adapters, sampling, and the engine's sizes under vLLM's names."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from ..errors import UsageError
from ..params import DEFAULT_MODEL, DTYPES, ENGINE_DTYPES, NUMA_MODES, EngineConfig

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Size(click.ParamType):
    """Bytes: a number with a unit, such as 512M, 1.5GiB or 800 MB; units are powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if not match:
            self.fail(f"{value!r} is not a size; write 512M or 1.5GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class Text(click.types.StringParamType):
    """A text that may hold spaces. Where several come from one variable, they are its lines."""

    envvar_list_splitter = "\n"


def _options(*decorators: Callable) -> Callable:
    def apply(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


group_size_option = click.option(
    "--group-size",
    type=click.Choice(["16", "32", "64", "128"]),
    default="32",
    show_default=True,
    help="Weights per scale at most, for int8 and int4.",
)

model_options = _options(
    click.option(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        show_default=True,
        help="A name from `minilora list`, a hub repo (org/name), a folder or a .gguf file.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="Number format of the weights; auto keeps the file's. bfloat16+inputs rounds the inputs of products, too.",
    ),
    group_size_option,
    click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Threads; all usable cores if not given."),
)

lora_options = _options(
    click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="NAME[=PATH[:SCALE]]",
        help="Load an adapter; repeatable. All are applied unless --adapter picks some.",
    ),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME[:SCALE]",
        help="Answer with this adapter; repeatable: several at once.",
    ),
)

sampling_options = _options(
    click.option("--max-tokens", "-n", type=int, default=512, show_default=True, help="Longest answer, in tokens."),
    click.option(
        "--temperature", "--temp", type=float, help="0 always takes the best token; default: the model's own, or 0."
    ),
    click.option("--top-p", type=float, help="Keep the smallest set of best tokens that reach this probability."),
    click.option("--top-k", type=int, help="Keep the k best tokens."),
    click.option("--min-p", type=float, help="Keep tokens with at least this share of the best one's probability."),
    click.option("--repetition-penalty", type=float, help="Above 1: repeat less."),
    click.option("--seed", type=int, help="The same seed gives the same text."),
    click.option("--stop", multiple=True, type=Text(), help="End the answer at this text; repeatable."),
    click.option("-s", "--system", help="A system message before the prompt."),
)


def _engine_option(name: str, help: str, kind: Any = int, *others: str) -> Callable:
    """An option of EngineConfig, which shows that field's default, but does not pass it on: what is not given is None.

    others: further names.
    """
    default = getattr(EngineConfig, name.split("/")[0].strip("-").replace("-", "_"))
    shown = "" if default is None else f"  [default: {str(default).lower()}]"
    return click.option(name, *others, type=kind, default=None, help=help + shown)


engine_options = _options(
    _engine_option(
        "--max-model-len",
        "Tokens of prompt and answer; default: what the model was trained on.",
        int,
        "--ctx-size",
        "-c",
    ),
    _engine_option("--max-num-seqs", "Texts that run at once."),
    _engine_option("--max-num-batched-tokens", "Most tokens that a step computes."),
    _engine_option("--max-step-ms", "Longest step, in ms, that computes prompts while other texts decode."),
    _engine_option("--num-scheduler-steps", "Tokens a step may generate per sequence, as far as they fit into 20 ms."),
    _engine_option("--num-speculative-tokens", "Draft tokens per sequence and step (prompt lookup); 0 turns it off."),
    _engine_option(
        "--kv-cache-dtype",
        "Number format of the KV cache; auto is float16, for float32 models float32.",
        click.Choice(ENGINE_DTYPES),
    ),
    _engine_option(
        "--kv-cache-memory",
        "Bytes of the KV cache, such as 512M; default: enough for max-num-seqs full-length sequences, at most half of "
        "the free memory.",
        Size(),
    ),
    _engine_option("--block-size", "Tokens of a KV page."),
    _engine_option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        "Reuse KV pages of earlier texts with the same beginning.",
        None,
    ),
    _engine_option("--max-loras", "Adapters in use at once."),
    _engine_option("--max-cpu-loras", "Adapters kept in memory; default: 256, or max-loras if that is more."),
    _engine_option("--max-lora-rank", "Highest rank of an adapter."),
    _engine_option(
        "--lora-dtype",
        "Number format of the adapters; auto is int8, for float32 models float32.",
        click.Choice(ENGINE_DTYPES),
    ),
    _engine_option("--lora-memory", "Bytes for adapters in memory; default: a quarter of the free memory.", Size()),
    _engine_option("--numa", "Spread memory over nodes, or copy the weights to each.", click.Choice(NUMA_MODES)),
)

# --threads belongs to the model's options, and debug_checks is for tests and programs.
ENGINE_KEYS = {f.name for f in fields(EngineConfig)} - {"threads", "debug_checks"}


def long_names(option: click.Parameter) -> list[str]:
    """What an option is called, without the dashes; short forms left out."""
    return [name.removeprefix("--") for name in option.opts if name.startswith("--")]


def read_environment(command: click.Command) -> None:
    """Let each option of a command come from a variable too: --top-k from MINILORA_TOP_K."""
    for option in command.params:
        if isinstance(option, click.Option):
            option.envvar = "MINILORA_" + long_names(option)[0].replace("-", "_").upper()


def split_engine(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what was given for the engine, all other options)."""
    engine = {key: options[key] for key in ENGINE_KEYS if options.get(key) is not None}
    return engine, {key: value for key, value in options.items() if key not in ENGINE_KEYS}


def split_scale(text: str) -> tuple[str, float]:
    """ "name:0.5" -> ("name", 0.5); without a number at the end the scale is 1. Raises UsageError."""
    head, colon, tail = text.rpartition(":")
    try:
        scale = float(tail) if colon and head else None
    except ValueError:
        scale = None
    if scale is None:
        return text, 1.0
    if not math.isfinite(scale):
        raise UsageError(f"an adapter's scale must be a finite number, not {tail}")
    return head, scale


def split_lora(text: str) -> tuple[str, str, float]:
    """ "name=path:0.5" -> ("name", "path", 0.5); "name" -> ("name", "name", 1). Raises UsageError."""
    name, equals, source = text.partition("=")
    if not name or (equals and not source):
        raise UsageError(f"--lora {text!r} is not of the form NAME[=PATH[:SCALE]]")
    if not equals:
        return name, name, 1.0
    return (name, source, 1.0) if os.path.exists(source) else (name, *split_scale(source))
