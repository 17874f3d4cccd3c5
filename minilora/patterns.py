"""Regular expressions from adapter files, which come from anybody: Python's `re` takes exponential time for some of
them, and holds up everything else meanwhile.

A pattern is turned into a function from the places where a match may begin to those where it may end, as sets: no way
is tried twice (after Thompson 1968, doi:10.1145/363347.363387). It knows what patterns for names of modules consist of:
letters, digits, `.`, `|`, groups, classes in brackets, `*`, `+`, `?` and their lazy forms, `^`, `$`, `\\d`, `\\w`,
`\\s`, `\\D`, `\\W`, `\\S` and escaped signs.
"""

from collections.abc import Callable, Iterable

LONGEST = 200

_Match = Callable[[str, set[int]], set[int]]
_Test = Callable[[str], bool]

_CLASSES: dict[str, _Test] = {"d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_", "s": str.isspace}


class Pattern:
    """A pattern, as re.fullmatch understands it. Raises ValueError where it is none, or holds anything else."""

    def __init__(self, text: str):
        if len(text) > LONGEST:
            raise ValueError("too long")
        self._rest = text
        self._match = self._alternatives()
        if self._rest:
            raise ValueError(f"unexpected {self._rest[0]!r}")

    def matches(self, name: str, starts: Iterable[int] = (0,)) -> bool:
        """Whether all of a name matches, from any of these places on."""
        return len(name) in self._match(name, set(starts))

    def _take(self, *signs: str) -> str:
        """The next sign, if it is one of these (any, if none are given), else ""."""
        sign = self._rest[:1]
        if signs and sign not in signs:
            return ""
        self._rest = self._rest[1:]
        return sign

    def _alternatives(self) -> _Match:
        ways = [self._sequence()]
        while self._take("|"):
            ways.append(self._sequence())
        return ways[0] if len(ways) == 1 else lambda text, at: set().union(*(way(text, at) for way in ways))

    def _sequence(self) -> _Match:
        parts = []
        while self._rest and self._rest[0] not in "|)":
            parts.append(self._repeated())

        def one_after_the_other(text: str, at: set[int]) -> set[int]:
            for part in parts:
                if not at:
                    break
                at = part(text, at)
            return at

        return one_after_the_other

    def _repeated(self) -> _Match:
        anchor, one = self._rest[0] in "^$", self._atom()
        sign = self._take("*", "+", "?")
        # A lazy form matches the same, as all of a name must match.
        self._take("?" if sign else "")
        if (sign and anchor) or self._rest[:1] in ("*", "+", "?"):
            raise ValueError("nothing to repeat")
        many = _star(one)
        kinds: dict[str, _Match] = {
            "": one,
            "*": many,
            "+": lambda text, at: many(text, one(text, at)),
            "?": lambda text, at: at | one(text, at),
        }
        return kinds[sign]

    def _atom(self) -> _Match:
        sign = self._take()
        if sign == "(":
            if self._rest[:1] == "?":
                raise ValueError("unexpected '?'")
            inner = self._alternatives()
            if not self._take(")"):
                raise ValueError("a group has no end")
            return inner
        if sign == "^":
            return lambda text, at: at & {0}
        if sign == "$":
            return lambda text, at: at & {len(text)}
        if sign == "[":
            return _sign(self._class())
        if sign == ".":
            return _sign(lambda c: c != "\n")
        if sign in "*+?)]{}":
            raise ValueError(f"unexpected {sign!r}")
        return _sign(self._escaped() if sign == "\\" else sign.__eq__)

    def _escaped(self) -> _Test:
        sign = self._take()
        if sign in _CLASSES:
            return _CLASSES[sign]
        if sign.lower() in _CLASSES:
            opposite = _CLASSES[sign.lower()]
            return lambda c: not opposite(c)
        if not sign or sign.isalnum():
            raise ValueError(f"unknown escape {sign!r}")
        return sign.__eq__

    def _class(self) -> _Test:
        """What stands in brackets."""
        negated, tests = bool(self._take("^")), list[_Test]()
        while not tests or self._rest[:1] != "]":
            sign = self._take()
            if not sign or sign in "[]":
                raise ValueError("a class that is not understood")
            if self._rest[:1] == "-" and self._rest[1:2] not in ("]", ""):
                last = self._rest[1]
                if not (sign.isalnum() and last.isalnum() and sign <= last):
                    raise ValueError("a class that is not understood")
                self._rest = self._rest[2:]
                tests.append(lambda c, first=sign, last=last: first <= c <= last)  # type: ignore[misc]
            else:
                tests.append(self._escaped() if sign == "\\" else sign.__eq__)
        self._take("]")
        return lambda c: any(test(c) for test in tests) != negated


def _sign(test: _Test) -> _Match:
    return lambda text, at: {place + 1 for place in at if place < len(text) and test(text[place])}


def _star(one: _Match) -> _Match:
    def many(text: str, at: set[int]) -> set[int]:
        found = new = set(at)
        while new:
            new = one(text, new) - found
            found = found | new
        return found

    return many
