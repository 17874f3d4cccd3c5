"""The sandbox of chat templates: what real ones need works, and what never ends or fills the memory is stopped (S12)."""

import threading
import time

import psutil
import pytest

from minilora import chat
from minilora.chat import render
from minilora.errors import FormatError, UsageError

MESSAGES = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"}]

GOOD = {
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m['role'] }}{{ ',' if not loop.last }}{% endfor %}": "1/2 user,2/2 assistant",
    "{% for m in messages if m.role == 'user' %}{{ m.content | trim ~ '!' ~ 1 }}{% else %}none{% endfor %}": "hi!1",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.previtem.role }}{% break %}{% endfor %}": "user",
    "{{ messages | map(attribute='role') | join(', ') }}": "user, assistant",
    "{{ messages | join('+', attribute='role') }}": "user+assistant",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}": "1",
    "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i * 2 %}{% endfor %}{{ ns.n }}": "20",
    "{{ messages[1:][0].content.split('e')[0].replace('y', 'Y') }}": "Y",
    "{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f('a') }}{{ f('b', y=3) }}": "[a2][b3]",
    "{{ messages[0] | tojson }}": '{"role": "user", "content": " hi "}',
    "{{ {'a': [1]} | tojson(indent=1) }}": '{\n "a": [\n  1\n ]\n}',
    "{{ {'b': 'é', 'a': [1]} | tojson(separators=(',', ':'), sort_keys=true) }}": '{"a":[1],"b":"é"}',
    "{{ 'é' | tojson(ensure_ascii=true) }}": '"\\u00e9"',
    "{{ '{a[0]}{b!r:>4}'.format_map({'a': [1], 'b': 'x'}) }}": "1 'x'",
    "{{ 'x' * 3 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 'a' + 'b' }}{{ [1] + [2] }}": "xxx332ab[1, 2]",
    "{{ '{}-{:>3}'.format(1, 2) }}{{ ', '.join(['a', 'b']) }}{{ 'a-a' | replace('a', 'b', 1) }}": "1-  2a, bb-a",
    "{{ 'a\\nb' | indent(2) }}{{ 'a\\nb' | indent('>', true) }}": "a\n  b>a\n>b",
    "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'b': 1, 'a': 2} | dictsort }}": "b1a2[('a', 2), ('b', 1)]",
    "{% for row in [[1, [2]], [3]] recursive %}{{ row if row is number else loop(row) }}{% endfor %}": "123",
    "{{ [1, 2.5] | sum }}{{ [{'a': 1}, {'a': 2}] | sum(attribute='a', start=4) }}": "3.57",
    "{% generation %}{{ 1 | string ~ 2 }}{% endgeneration %}": "12",
}

GROW = "{% set ns = namespace(x=START) %}{% for i in range(90) %}{% set ns.x = STEP %}{% endfor %}"
BAD = [
    "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ ('{:' ~ '1' ~ '0' * 9 ~ '}').format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ ('{0:9999}' * 5000).format('') | length }}",
    "{{ ('{0}' * 500).format('a' * 100000) | length }}",
    "{{ ('{a!r}' * 500).format_map({'a': 'a' * 100000}) | length }}",
    "{{ ('a' * 1000).encode().replace(''.encode(), ('a' * 90000).encode()) | length }}",
    "{{ (0).to_bytes(1000, 'big').replace((0).to_bytes(0, 'big'), (0).to_bytes(90000, 'big')) | length }}",
    "{{ 'a\\t'.expandtabs(1000000000) }}",
    "{{ lipsum(n=100000000) }}",
    "{{ 1 | round(1000000000, 'floor') }}",
    "{{ 'a' | indent(100000000) }}",
    "{{ ('a\\n' * 1000000) | indent('b' * 1000000) }}",
    "{{ [[1] * 1000000] | tojson(indent=90000) }}",
    "{{ ([1] * 1000000) | tojson(separators=('a' * 90000, ':')) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "{{ range(90000) | join('a' * 1000000) }}",
    "{{ strftime_now('%99d' * 1000000) | length }}",
    "{{ ('ba' * 5000000) | sort | length }}",
    "{{ ('ba' * 5000000) | list | unique | list | length }}",
    "{% set a = range(100000) | list %}{{ ([a] * 300) | sum(start=[]) | length }}",
    "{{ ('a' * 1000000).join(range(90000) | map('string')) }}",
    GROW.replace("START", "'aaaa'").replace("STEP", "ns.x ~ ns.x"),
    GROW.replace("START", "'aaaa'").replace("STEP", "ns.x + ns.x"),
    GROW.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
    GROW.replace("START", "3").replace("STEP", "ns.x * ns.x"),
    GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
    GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x | tojson }}",
    GROW.replace("START", "[1]").replace("STEP", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | string }}",
    GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ 'x' ~ ns.x }}",
]


@pytest.mark.parametrize("template", GOOD)
def test_what_templates_do(template):
    assert render(template, MESSAGES, {}) == GOOD[template]


@pytest.mark.parametrize("template", BAD)
def test_s12_what_never_ends_or_fills_the_memory(template, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    process = psutil.Process()
    before, started = process.memory_info().rss, time.process_time()
    with pytest.raises((UsageError, FormatError), match="chat template"):
        render(template, MESSAGES, {})
    assert time.process_time() - started < 0.5 + 2
    assert process.memory_info().rss - before < 500 << 20


def test_s12_each_thread_has_its_own_time(monkeypatch):
    """A template that runs on is stopped although others of the same text begin anew all the while."""
    monkeypatch.setattr(chat, "SECONDS", 0.4)
    template = (
        "{% if on %}{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}{% endif %}x"
    )
    ended = threading.Event()

    def begin_often():
        while not ended.is_set():
            assert render(template, MESSAGES, {"on": False}) == "x"

    other = threading.Thread(target=begin_often)
    other.start()
    started = time.monotonic()
    try:
        with pytest.raises(UsageError, match=r"more than 0\.4 seconds"):
            render(template, MESSAGES, {"on": True})
    finally:
        ended.set()
        other.join()
    assert time.monotonic() - started < 10
