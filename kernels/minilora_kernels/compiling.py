"""Processes that compile units (see `unit`) while this one compiles the program that calls them."""

import ast
import atexit
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from .code_files import environment_key, sealed, unsealed
from .limits import memory_left, usable_cores

# The memory that a process that compiles takes, with some to spare.
PROCESS_BYTES = 200 << 20
# A unit's maker, by module and name, and its constants.
Request = tuple[str, str, tuple]


class Compiling:
    """A process that compiles some units, one after the other."""

    def __init__(self, process: subprocess.Popen, requests: Sequence[Request]):
        self._process, self._requests = process, list(requests)
        self._codes: list[bytes | None] | None = None

    def result(self, request: Request) -> bytes | None:
        """The object file of one of them; None, with a warning, if the process failed. Waits for its end."""
        if self._codes is None:
            self._codes = self._read()
        return self._codes[self._requests.index(request)]

    def end(self) -> None:
        """Stop it."""
        _running.remove(self)
        self._process.kill()
        self._process.wait()

    def _read(self) -> list[bytes | None]:
        output, errors = self._process.communicate()
        _running.remove(self)
        codes = _codes_in(output)
        if self._process.returncode == 0 and len(codes) == len(self._requests) and all(codes):
            return codes
        reason = f"exit code {self._process.returncode}" if self._process.returncode else "its output is damaged"
        reason = (errors.decode(errors="replace").strip().splitlines() or [reason])[-1]
        warnings.warn(f"a process that compiles failed ({reason}): compiling in this one instead", stacklevel=2)
        return [None] * len(self._requests)


def _codes_in(output: bytes) -> list[bytes | None]:
    """One for each line, None where it is damaged; empty where it is something else."""
    try:
        return [unsealed(bytes.fromhex(line)) for line in output.decode().splitlines()]
    except ValueError:
        return []


_running: list[Compiling] = []


@atexit.register
def _end_all() -> None:
    for process in list(_running):
        process.end()


def compile_beside(requests: Sequence[Request]) -> list[Compiling]:
    """For each request the process that compiles it; none where none can be started, or there is no room for one."""
    count, processes = min(len(requests), _room()), []
    try:
        for i in range(count):
            processes.append(_start(requests[i::count]))
    except OSError as error:
        warnings.warn(f"no process to compile in ({error.strerror}): compiling in this one only", stacklevel=2)
        for process in processes:
            process.end()
        return []
    return [processes[i % count] for i in range(len(requests))] if processes else []


def _room() -> int:
    """How many processes may compile beside this one: as many as there are cores, if memory lasts."""
    cores, memory = usable_cores(), memory_left()
    # A frozen program's executable is no Python.
    if cores == 1 or getattr(sys, "frozen", False) or not sys.executable:
        return 0
    # One part is for what this process takes meanwhile.
    return cores if memory is None else min(cores, max(0, memory // PROCESS_BYTES - 1))


def _start(requests: Sequence[Request]) -> Compiling:
    words = [word for module, name, constants in requests for word in (module, name, repr(constants))]
    command = [sys.executable, "-c", f"from {__name__} import main; main()", environment_key(), *words]
    # It finds what this process finds, and in the same order.
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    _running.append(Compiling(process, requests))
    return _running[-1]


def main() -> None:
    """Compile the units that the arguments name, one object file in each line of output."""
    key, *words = sys.argv[1:]
    if key != environment_key():
        sys.exit("it would compile for another environment")
    for module, name, constants in zip(words[::3], words[1::3], words[2::3], strict=True):
        print(sealed(getattr(import_module(module), name).unit(*ast.literal_eval(constants)).compile()).hex())
