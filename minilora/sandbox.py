"""The sandbox that chat templates run in.

A template comes with a model and is not trusted. Jinja's own sandbox keeps it from Python's insides; this one also
keeps it from taking time and memory without end: every loop, call and operator looks at the clock, and what multiplies
texts or numbers is bounded before it does so.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.filters
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

from .errors import FormatError, UsageError

LONGEST_TEXT = 1 << 24
LARGEST_NUMBER = 100_000
WIDEST_INDENT = 64
MOST_ITEMS = 1 << 20
# Seconds that a template runs freely; then those that it works and rests in turn, as Python runs one thread at a time.
PATIENCE, WORK, REST = 0.05, 0.001, 0.004

# Everything else that Jinja has is of no use to a chat template, or multiplies its input.
FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int"),
    *("items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round"),
    *("safe", "select", "selectattr", "sort", "title", "trim", "unique", "upper", "wordcount"),
)
# Of these, those that go through all of a list, in one go.
_OF_LISTS = {"dictsort", "groupby", "list", "max", "min", "reverse", "sort", "unique"}
_WIDE_FIELD = re.compile(r"\d{5,}")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's part for training; here it is just its content."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Watch(NodeTransformer):
    """Puts a look at the clock into every loop, and a bound on what ~ joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (Jinja's name)
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_watched", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Where templates are compiled and run. Any number of threads may run them at once."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, finalize=_finite, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        self._clock = threading.local()
        own: dict[str, Callable] = {
            "_watched": self._watched,
            "_joined": self._joined,
            "join": self._join,
            "replace": self._replace,
            "indent": self._indent,
            "sum": self._sum,
            "string": _text,
            "tojson": self._to_json,
        }
        found = {name: self.filters[name] for name in FILTERS} | own
        self.filters = {name: self._bounded(function, name in _OF_LISTS) for name, function in found.items()}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "joiner", "cycler")}

    def start(self, seconds: float) -> None:
        """Give this thread so much time for a template."""
        now = time.monotonic()
        self._clock.end, self._clock.seconds, self._clock.rest = now + seconds, seconds, now + PATIENCE

    def check(self) -> None:
        """Raise UsageError when the time is over. A template that runs long lets other threads go first."""
        now = time.monotonic()
        if now > self._clock.rest:
            time.sleep(REST)
            self._clock.rest = now + REST + WORK
        if now > self._clock.end:
            raise UsageError(f"the chat template ran for more than {self._clock.seconds:g} seconds")

    def compile_template(self, text: str) -> jinja2.Template:
        """A template that is watched. Raises FormatError."""
        try:
            tree = _Watch().visit(self.parse(text))
            return self.from_string(tree.set_environment(self))
        except (jinja2.TemplateError, RecursionError) as error:
            raise FormatError(f"the chat template is not valid: {error}") from None

    # ------------------------------------------------------------ what templates do

    def getattr(self, obj: Any, attribute: str) -> Any:
        """obj.attribute"""
        self.check()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """obj[argument]"""
        self.check()
        return super().getitem(obj, argument)

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805 (Jinja's own names: templates may pass any other)
        """A function's or method's result."""
        __self.check()
        _check_numbers(args, kwargs)
        # Jinja wraps a text's format in a function of its own.
        method = getattr(__obj, "__wrapped__", __obj)
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str):
            if name == "join" and args:
                return __self._join(args[0], text)
            if name == "replace":
                _check_replaced(text, *args[:2])
            if name == "format":
                return _Formatter(__self).vformat(text, args, kwargs)
            if name == "format_map" and args:
                return _Formatter(__self).vformat(text, (), args[0])
            if name in ("encode", "expandtabs", "translate"):
                raise SecurityError(f"{name} is not available")
        if isinstance(text, bytes):
            raise SecurityError("methods of bytes are not available")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """left operator right"""
        self.check()
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("formatting with % is not available")
        if operator == "**":
            _check_numbers((left, right), {})
            if isinstance(right, int) and abs(right) > 64:
                raise SecurityError("a power is too large")
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        if operator == "*":
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)

    # ------------------------------------------------------------ filters

    def _bounded(self, function: Callable, of_lists: bool) -> Callable:
        """A filter that looks at the clock, at the numbers it is given, and at its list's length."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.check()
            # The first is what the filter works on; a number there is no width or count.
            _check_numbers(args[first + 1 :], kwargs)
            if of_lists and len(args) > first and hasattr(args[first], "__len__"):
                _check_items(len(args[first]))
            return function(*args, **kwargs)

        return bounded

    def _watched(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check()
            yield item

    def _joined(self, parts: list[Any]) -> str:
        texts = [_text(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def _join(self, items: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
        texts = []
        for item in self._watched(items):
            if attribute is not None:
                item = self.getitem(item, attribute)
            texts.append(_text(item))
        _check_size(sum(map(len, texts)) + len(texts) * len(separator))
        return separator.join(texts)

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text = _text(text)
        _check_replaced(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text, one = _text(text), width if isinstance(width, str) else " " * min(width, WIDEST_INDENT)
        _check_size(len(text) + (text.count("\n") + 1) * len(one))
        return jinja2.filters.do_indent(text, one, first, blank)

    def _sum(self, items: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        """Numbers only: lists would be copied for each one added."""
        for item in self._watched(items):
            number = item if attribute is None else self.getitem(item, attribute)
            if not isinstance(number, int | float) or not isinstance(start, int | float):
                raise SecurityError("sum adds numbers only")
            start += number
        return start

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As in transformers, for which templates are written; piece by piece, as indents multiply."""
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii,
            indent=None if indent is None else min(indent, WIDEST_INDENT),
            separators=separators,
            sort_keys=sort_keys,
        )
        pieces, size = [], 0
        for piece in self._watched(encoder.iterencode(_finite(value))):
            size += len(piece)
            _check_size(size)
            pieces.append(piece)
        return "".join(pieces)


class _Formatter(SandboxedFormatter):
    """str.format, whose fields together are bounded."""

    def __init__(self, sandbox: Sandbox):
        super().__init__(sandbox)
        self.sandbox, self.size = sandbox, 0

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value, first = super().get_field(field_name, args, kwargs)
        return _finite(value), first

    def format_field(self, value: Any, format_spec: str) -> str:
        self.sandbox.check()
        if _WIDE_FIELD.search(format_spec):
            raise SecurityError("a field of a format is too wide")
        text = super().format_field(value, format_spec)
        self.size += len(text)
        _check_size(self.size)
        return text


def _finite(value: Any) -> Any:
    """The value, if writing it comes to an end: lists can hold one list many times, and that one as well."""
    left, rest = MOST_ITEMS, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            rest += one
        left -= 1
        if left < 0:
            _check_items(MOST_ITEMS + 1)
    return value


def _text(value: Any) -> str:
    return str(_finite(value))


def _check_items(count: int) -> None:
    if count > MOST_ITEMS:
        raise SecurityError("a list of the chat template is too long")


def _check_size(size: int) -> None:
    if size > LONGEST_TEXT:
        raise SecurityError("a text or list of the chat template is too long")


def _check_numbers(args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise SecurityError("a number of the chat template is too large")


def _check_product(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if hasattr(value, "__len__") and isinstance(count, int):
            _check_size(len(value) * count)
        elif isinstance(value, int) and value.bit_length() > 4096:
            raise SecurityError("a number of the chat template is too large")


def _check_replaced(text: str, *words: Any) -> None:
    if len(words) == 2 and all(isinstance(word, str) for word in words):
        old, new = words
        _check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
