"""Machine code on disk: found again, never mixed up, never trusted blindly. Each start is a process of its own."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from numba.core.errors import TypingError

from minilora_kernels.code_files import environment_key, read_code
from minilora_kernels.jit import kernel, program
from minilora_kernels.simd import splat_i32
from minilora_kernels.simd_memory import load_f32

MODULE = """
import sys
from minilora_kernels import jit
from constants import LIMIT

@jit.kernel
def helper(x):
    return x + {offset}

def make(factor):
    @jit.kernel
    def inner(x):
        return helper(x) * factor + LIMIT

    def scaled(x):
        return inner(x)

    return jit.program(scaled, (factor,))

compiled = []
jit.on_compile(compiled.append)
print([make(int(word))(1) for word in sys.argv[1:]], len(compiled))
"""


@pytest.fixture
def start(tmp_path):
    """A function: factors -> what a fresh process computes with them, and how many programs it had to compile."""

    def run(*factors, offset=0, limit=0, options=(), **environment):
        source, part = tmp_path / "scaled.py", tmp_path / uuid4().hex
        # Whole at any time: another thread's process may be about to read it.
        part.write_text(MODULE.format(offset=offset))
        part.replace(source)
        part.write_text(f"LIMIT = {limit}")
        part.replace(tmp_path / "constants.py")
        kernels = os.path.join(os.path.dirname(__file__), "..", "kernels")
        env = {**os.environ, "MINILORA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": kernels}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", **environment}
        done = subprocess.run(
            [sys.executable, *options, source, *map(str, factors)], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip(), done.stderr

    return run


def codes(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.code"))


def test_kept_and_found_again(start):
    assert start(3)[0] == "[3] 1"
    assert start(3)[0] == "[3] 0"


def test_programs_of_different_processes_do_not_mix(start):
    """Numba numbers its symbols anew in each process; both files hold an `inner` and a `helper`."""
    assert start(3)[0] == "[3] 1"
    assert start(5)[0] == "[5] 1"
    assert start(5, 3, 7)[0] == "[5, 3, 7] 1"
    assert start(7, 5, 3)[0] == "[7, 5, 3] 0"


def test_processes_that_start_at_once_do_not_harm_each_other(start):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda factor: start(factor, 7)[0], (3, 3, 5, 5)))
    assert [answer.rpartition(" ")[0] for answer in found] == ["[3, 7]", "[3, 7]", "[5, 7]", "[5, 7]"]
    assert start(3, 5, 7)[0] == "[3, 5, 7] 0"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the other CPU is an x86-64 one")
def test_each_cpu_has_its_own_code(start):
    """A home folder that machines share: none runs what was compiled for another."""
    other = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
    assert start(3)[0] == "[3] 1"
    assert start(3, **other)[0] == "[3] 1"
    assert start(3)[0] == start(3, **other)[0] == "[3] 0"


def test_an_edited_helper_is_compiled_anew(start):
    assert start(3)[0] == "[3] 1"
    assert start(3, offset=10)[0] == "[33] 1"


def test_an_edited_constant_of_another_file_is_compiled_anew(start):
    assert start(3)[0] == "[3] 1"
    assert start(3, limit=4)[0] == "[7] 1"
    assert start(3, limit=4)[0] == "[7] 0"


@pytest.mark.parametrize(
    ("name", "value"), [("numba.__version__", "0.1"), ("llvmlite.__version__", "0.1"), ("_SOURCES", b"edited")]
)
def test_each_version_has_its_own_code(monkeypatch, name, value):
    before = environment_key()
    monkeypatch.setattr(f"minilora_kernels.code_files.{name}", value)
    assert environment_key.__wrapped__() != before


def test_bounds_checks_and_optimised_python_have_their_own_ways(start):
    assert start(3)[0] == "[3] 1"
    assert start(3, NUMBA_BOUNDSCHECK="1")[0] == "[3] 1"
    assert start(3, options=["-O"])[0] == "[3] 0"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_file_is_compiled_anew(start, tmp_path, damage):
    start(3)
    [path] = codes(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-9], "flip": content, "empty": b"", "foreign": b"x" * 4096}[damage])
    assert start(3) == ("[3] 1", "")
    assert start(3) == ("[3] 0", ""), "and repaired"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_folder_that_others_may_write_is_not_trusted(start, tmp_path):
    start(3)
    [path] = codes(tmp_path)
    path.parent.chmod(0o777)
    answer, warning = start(3)
    assert answer == "[3] 1"
    assert "can be written by others" in warning


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_folder_of_another_user_is_not_trusted(monkeypatch, tmp_path):
    if os.getuid() == 0:
        os.chown(tmp_path, 1, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert read_code(tmp_path / "any.code") is None


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_folder_of_roots_is_trusted(monkeypatch):
    """As in an image that root built; warnings are errors here."""
    monkeypatch.setattr(os, "getuid", lambda: 1)
    assert read_code(Path("/any.code")) is None


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths")
def test_an_unwritable_cache_is_said_and_survived(start, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    answer, warning = start(3, MINILORA_CACHE=str(tmp_path / "file"))
    assert answer == "[3] 1"
    assert "MINILORA_CACHE" in warning and "Traceback" not in warning


def test_a_call_that_has_no_overload_is_an_error_each_time():
    """What is remembered of calls are those that were found; `passes`."""

    @kernel
    def one_vector_too_many(x):
        return load_f32(x, 0) + splat_i32(np.int32(1))

    for _ in range(2):
        with pytest.raises(TypingError, match=r"f32x16.*i32x16"):
            program(one_vector_too_many)(np.zeros(16, np.float32))
