"""Keys of machine code: the same in every process, another one whenever the code might be."""

import importlib.util
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from numba import types

from minilora_kernels.sources import source_key, spelled

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
MAIN = """
from minilora_kernels.jit import kernel
from minilora_kernels.sources import source_key
from apart import helper

@kernel
def whole(x):
    return helper(x)

print(source_key(whole.py_func))
"""
APART = """
from collections import namedtuple
from minilora_kernels.jit import kernel
import constants
import further
from constants import FACTOR, PAIR, UNUSED
Place = namedtuple("Place", "{fields}")

def make(power):
    @kernel
    def inner(x):
        return x ** power * FACTOR + PAIR[1]
    return inner

inner = make({power})

@kernel
def helper(x):
    return Place(inner(x) + constants.OFFSET, further.twice(x)).{word}
"""
CONSTANTS = "FACTOR, PAIR, UNUSED, OFFSET = {factor}, (1, {last}), {unused}, {offset}"
FURTHER = """
from minilora_kernels.jit import kernel

@kernel
def twice(x):
    return x * {two}
"""


@pytest.fixture
def key(tmp_path):
    """A function: the key of a kernel whose helpers lie in other files and its constants in a third, in a new process."""

    def find(fields="at step", word="at", power=2, factor=3, last=4, unused=5, offset=6, two=2):
        (tmp_path / "main.py").write_text(MAIN)
        (tmp_path / "apart.py").write_text(APART.format(fields=fields, word=word, power=power))
        (tmp_path / "constants.py").write_text(CONSTANTS.format(factor=factor, last=last, unused=unused, offset=offset))
        (tmp_path / "further.py").write_text(FURTHER.format(two=two))
        environment = {**os.environ, "PYTHONPATH": str(KERNELS), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, tmp_path / "main.py"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    return find


def test_the_key_follows_all_that_a_kernel_is_made_of(key):
    first = key()
    assert key() == first
    changed = [key(**one) for one in ({"word": "step"}, {"factor": 4}, {"last": 5}, {"power": 3})]
    assert len({first, *changed}) == 5, "a helper's text, a constant, one in a tuple, one in a closure"
    changed = [key(offset=7), key(two=3)]
    assert len({first, *changed}) == 3, "a constant and a helper that are read from modules"
    assert key(unused=6) == first, "what no kernel names"


def test_fields_are_parts_of_a_types_name():
    """Numba's name for a named tuple does not say which field is which."""
    one, other = (types.NamedTuple([types.int64, types.float32], namedtuple("Pair", names)) for names in ("a b", "b a"))
    assert spelled(one) != spelled(other) and str(one).split("(")[1] == str(other).split("(")[1]
    alike = (types.NamedUniTuple(types.int64, 2, namedtuple("Pair", names)) for names in ("a b", "b a"))
    assert len({spelled(kind) for kind in alike}) == 2
    assert spelled(types.Tuple([one, types.int64])) != spelled(types.Tuple([other, types.int64]))
    assert spelled(types.int64) == "int64"


def test_what_was_imported_counts_whatever_the_file_says_now(tmp_path):
    """An upgrade may replace the file while a process runs on."""

    def imported(body):
        (tmp_path / "changing.py").write_text(f"def kernel(x):\n    return x + {body}\n")
        spec = importlib.util.spec_from_file_location("changing", tmp_path / "changing.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.kernel

    # Another length: Python takes bytecode for current by the second and the size of its source.
    old, new = imported("10"), imported("222")
    assert source_key(old) != source_key(new)
