"""Patterns of adapter files mean what Python's regular expressions mean, in no more than a moment."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.patterns import Pattern

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.k_proj",
    "model.layers.3.mlp.down_proj",
    "lm_head",
    "model.embed_tokens",
]
USUAL = [
    r"q_proj",
    r".*q_proj",
    r"model.layers.0.self_attn.q_proj",
    r"^model\.layers\.\d+\.self_attn\.(q|k)_proj$",
    r".*\.layers\.[0-9]+\..*_proj",
    r"model\.layers\.(0|1[0-9]?)\.self_attn\.[qk]_proj",
    r"(.*\.)?(lm_head|embed_tokens)",
    r"[^.]+",
    r"(model|lm)[._\-]?\w+.*?",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns(pattern):
    for name in NAMES:
        assert Pattern(pattern).matches(name) == (re.fullmatch(pattern, name) is not None), name
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        ended = re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^').removesuffix('$')})", name) is not None
        assert Pattern(pattern.removeprefix("^").removesuffix("$")).matches(name, starts) == ended, name


ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", r"\S", r"[\W\d]", "[ab]", "[^a]", "[0-5b]", r"[\.a-]", "^", "$", "1"]
)


def joined(inner):
    return st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??"])).map(lambda pair: f"({pair[0]}){pair[1]}"),
    )


@settings(max_examples=600, deadline=None)
@given(st.recursive(ATOMS, joined, max_leaves=8), st.text("ab.1_", max_size=6))
def test_any_pattern_is_as_python_has_it(pattern, name):
    assert Pattern(pattern).matches(name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(..|.|...)*zz",
        ".*" * 12 + "zz",
        "(.|.)" * 30 + "zz",
        ".?" * 60 + "zz",
        "((a*)*b*)*zz",
        r"(\w|.|[a-z])*zz",
    ],
)
def test_none_takes_long(pattern):
    started = time.process_time()
    assert not Pattern(pattern).matches("model.layers.31.self_attn.q_proj", range(20))
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "pattern",
    ["a**", "*a", "(a", "a)", "[a", "[]", "[b-a]", "a{2}", "(?=a)", r"\b", r"a\1", "^*", "a|*", "\\", "a" * 201, "a*+"],
)
def test_what_is_none_is_refused(pattern):
    with pytest.raises(ValueError):
        Pattern(pattern)
