"""Chat templates: messages to prompt text, in a sandbox.

A template comes with a model and is not trusted: it can't reach Python's insides, and its output is limited.
Special tokens that a message merely mentions stay text: the template's own are the only ones that count.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2

from .errors import MiniloraError, UsageError
from .sandbox import LONGEST_TEXT, Sandbox
from .tokenizer import Tokenizer

SECONDS = 5.0
# Characters of a date's format, each of which may become 256: it is written in one go, without checking the clock.
LONGEST_FORMAT = 256

Message = Mapping[str, Any]


def _refuse(message: str) -> None:
    raise UsageError(f"the chat template refuses these messages: {message}")


def _now(form: str) -> str:
    if len(form) > LONGEST_FORMAT:
        _refuse("the format of its date is too long")
    return datetime.now().strftime(form)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    sandbox = Sandbox()
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = _now
    return sandbox.compile_template(template)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UsageError unless messages is a list of {"role": text, "content": text}."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError("messages must be a list with at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"messages[{i}] must be an object with a role")
        if not isinstance(message.get("content"), str):
            raise UsageError(f"messages[{i}]: its content must be a text")


def render(
    template: str, messages: Sequence[Message], names: Mapping[str, Any], add_generation_prompt: bool = True
) -> str:
    """The prompt text of messages. names: bos_token and the like, and further variables. Raises UsageError,
    FormatError."""
    check_messages(messages)
    compiled = _compile(template)
    sandbox = compiled.environment
    assert isinstance(sandbox, Sandbox)
    sandbox.start(SECONDS)
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, **names}
    pieces, size = [], 0
    try:
        # As one argument: a variable may be called self.
        for piece in compiled.generate(given):
            sandbox.check()
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST_TEXT:
                raise UsageError("the chat template's output is too long")
    except jinja2.TemplateError as error:
        raise UsageError(f"the chat template failed: {error}") from None
    except MiniloraError:
        raise
    except Exception as error:  # filters and methods raise whatever their arguments make them
        raise UsageError(f"the chat template failed: {type(error).__name__}") from None
    return "".join(pieces)


# What templates get from us: a request's own variables may not take their place.
RESERVED = frozenset(
    [
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "conversation"),
        *("chat_template", "tokenize", "return_dict", "bos_token", "eos_token", "pad_token", "unk_token"),
        *("raise_exception", "strftime_now"),
    ]
)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt's ids. variables: for the template, as enable_thinking.

    Raises UsageError where the model has no chat template, or the messages or variables don't fit it.
    """
    template = tokenizer.files.chat_template
    if template is None:
        raise UsageError("this model has no chat template", "Give the prompt as plain text.")
    check_messages(messages)
    variables = dict(variables or {})
    if reserved := sorted(RESERVED & variables.keys()):
        raise UsageError(f"chat_template_kwargs may not hold {reserved[0]!r}", param="chat_template_kwargs")
    names = {**tokenizer.files.names, **_as_plain(tokenizer, variables)}
    text = render(template, [_as_plain(tokenizer, message) for message in messages], names, add_generation_prompt)
    return tokenizer.encode(text, add_special_tokens=False, marked=True)


def _as_plain(tokenizer: Tokenizer, given: Any) -> Any:
    """The same, with texts in which the names of special tokens are just text."""
    if isinstance(given, str):
        return tokenizer.as_plain(given)
    if isinstance(given, Mapping):
        return {key: _as_plain(tokenizer, value) for key, value in given.items()}
    return [_as_plain(tokenizer, value) for value in given] if isinstance(given, list | tuple) else given
