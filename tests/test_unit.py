"""Kernels compiled apart from their callers: in other processes or in this one, found again, and never called without their code."""

import os
import subprocess
import sys

import pytest

KERNELS = os.path.join(os.path.dirname(__file__), "..", "kernels")
UNITS = """
from numba import types
from numba.core.typing import signature
from minilora_kernels import jit
from minilora_kernels.unit import unit

FLOAT = types.float64

@jit.kernel
def more(x):
    return x + {more}

@unit(lambda factor: [signature(FLOAT, FLOAT), signature({returns}, FLOAT)])
def make_times(factor):
    @jit.kernel
    def times(x):
        return more(x) * factor

    @jit.kernel
    def less(x):
        return x - factor

    return times, less

@unit(lambda factor: [signature(FLOAT, FLOAT)])
def make_nested(factor):
    times, _ = make_times.unit(factor).kernels

    @jit.kernel
    def nested(x):
        return times(x)

    return nested
"""

MAIN = """
import os, sys
before, after, programs, argument = sys.argv[1:]
exec(before)
import numpy as np
from minilora_kernels import jit
from minilora_kernels.unit import unit
from parts import make_times

three, five = make_times.unit(3.0), make_times.unit(5.0)
times, less = three.kernels
[times_five, _] = five.kernels

@jit.kernel
def inner(x):
    return times(x) + times_five(less(x))

def both(x):
    return inner(x)

def only(x):
    return times(x)

names = []
jit.on_compile(names.append)
exec(after)
print(*[jit.program(function, units=units)(eval(argument)) for function, units in eval(programs)], *names)
"""
BOTH = "[(both, [three, five])]"
# 3 * (4 + 1) + 5 * (4 - 3 + 1)
ANSWER = "25.0"


@pytest.fixture
def start(tmp_path):
    """A function: what a fresh process prints, results and then what it had to compile, and its warnings."""

    def run(before="", after="", programs=BOTH, argument="4.0", more=1, returns="FLOAT", fails=False):
        (tmp_path / "parts.py").write_text(UNITS.format(more=more, returns=returns))
        main = tmp_path / "main.py"
        main.write_text(MAIN)
        env = {**os.environ, "MINILORA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": KERNELS}
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        command = [sys.executable, main, before, after, programs, argument]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stdout.strip(), done.stderr

    return run


def codes(tmp_path):
    return {path.name.split("-")[0] for path in (tmp_path / "cache").rglob("*.code")}


ONE_CORE = "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])"
NO_PROCESSES = "sys.executable = ''"
LITTLE_MEMORY = "from minilora_kernels import compiling; compiling.memory_left = lambda: 450 << 20"
COUNT = "import subprocess; started = []; real = subprocess.Popen\n"
COUNT += "subprocess.Popen = lambda *args, **more: (started.append(1), real(*args, **more))[1]"


@pytest.mark.parametrize("before", ["", ONE_CORE, NO_PROCESSES], ids=["beside", "one core", "no processes"])
def test_compiled_once_and_found_again(start, tmp_path, before):
    if before == ONE_CORE and not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system binds no process to a core")
    assert start(before) == (f"{ANSWER} times times both", "")
    assert codes(tmp_path) == {"times", "both"}
    assert start() == (ANSWER, ""), "nothing to compile, wherever it was compiled before"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_other_processes_compile_where_there_are_cores(start):
    count = "import atexit; atexit.register(lambda: print(len(started)))"
    for room, expected in (("", 2), (ONE_CORE, 0), (LITTLE_MEMORY, 1)):
        assert start(COUNT + "\n" + room, count, more=expected)[0].split()[-1] == str(expected)
        assert start(COUNT, count, more=expected)[0].split()[-1] == "0", "all is on disk"


def test_programs_share_a_unit(start):
    assert start(programs="[(only, [three])]") == ("15.0 times only", "")
    assert start() == (f"{ANSWER} times both", ""), "only the other unit is new"


def test_an_edited_maker_is_compiled_anew(start):
    assert start()[0] == f"{ANSWER} times times both"
    assert start(more=2)[0].startswith("33.0 times times")


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_file_is_compiled_anew(start, tmp_path, damage):
    start(programs="[(only, [three])]")
    [path] = (tmp_path / "cache").rglob("times-*.code")
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-9] if damage == "cut" else b"")
    assert start(programs="[(only, [three])]") == ("15.0 times", "")
    assert start(programs="[(only, [three])]") == ("15.0", "")


def test_a_process_that_fails_is_said_and_replaced(start):
    """Here it can't find the maker, which is in the program itself."""
    here = "make_times.__module__ = 'missing'; three, five = make_times.unit(4.0), five; times, less = three.kernels"
    output, warnings = start(after=here, programs="[(only, [three])]")
    assert output == "20.0 times only"
    assert "a process that compiles failed (ModuleNotFoundError" in warnings and "Traceback" not in warnings


def test_where_only_some_processes_can_be_started_none_is(start):
    later = "import subprocess, itertools; real, calls = subprocess.Popen, itertools.count()\n"
    later += (
        "def popen(*args, **more):\n    if next(calls): raise OSError(11, 'no more')\n    return real(*args, **more)\n"
    )
    output, warnings = start(later + "subprocess.Popen = popen")
    assert output == f"{ANSWER} times times both" and "no process to compile in (no more)" in warnings


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_no_process_goes_on_without_its_caller(start):
    """An error, or Ctrl-C, while another process compiles."""
    leave = "jit._start([three]); print(three.compiling._process.pid); sys.exit(3)"
    with pytest.raises(ProcessLookupError):
        os.kill(int(start(after=leave, fails=True)[0]), 0)


@pytest.mark.parametrize(
    "line", ["lambda content: None", "lambda content: bytes.fromhex('no')"], ids=["damaged", "noise"]
)
def test_what_a_process_writes_must_be_whole(start, line):
    """Machine code that is not what the other process made would be run."""
    output, warnings = start(f"from minilora_kernels import compiling; compiling.unsealed = {line}")
    assert output == f"{ANSWER} times times both" and "its output is damaged" in warnings


def test_a_process_of_another_environment_compiles_nothing():
    """As where its code was replaced, or it sees another CPU."""
    command = [sys.executable, "-c", "from minilora_kernels.compiling import main; main()", "another key"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": KERNELS}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == "it would compile for another environment"


def test_a_unit_that_the_program_does_not_name_is_refused(start):
    for _ in range(2):
        assert "units that it was not given" in start(programs="[(both, [three])]", fails=True)[1]


def test_kernels_take_what_their_signatures_say(start):
    assert "(float64,) -> float64" in start(argument="np.zeros(2)", fails=True)[1]


def test_what_a_kernel_returns_must_be_what_its_signature_says(start):
    assert "not (float64,) -> int64" in start(returns="types.int64", fails=True)[1]


def test_a_unit_that_calls_another_is_refused(start):
    assert "another unit" in start(after="import parts; parts.make_nested.unit(3.0).load()", fails=True)[1]
