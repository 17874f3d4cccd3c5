"""The tests of what must not be possible, once more without the program's own asserts, as under python -O."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# Known failures have their tests under their names, S1 to S28 and L1 to L11.
KNOWN = re.compile(r"^def (test_[sl]\d+_\w+)", re.MULTILINE)
# Files of which all tests are about what others send, and what becomes of it.
WHOLE = [
    TESTS / f"{name}.py"
    for name in (
        *(
            "server/test_guard",
            "server/test_wire",
            "server/test_isolation",
            "server/test_requests",
            "server/test_streams",
        ),
        *("server/test_admission", "test_sandbox", "test_checkpoint", "crowd/test_faults", "crowd/test_counters"),
    )
]


def chosen() -> list[str]:
    """The command line for these files, and for known failures' tests in all others."""
    files = {path: KNOWN.findall(path.read_text()) for path in sorted(TESTS.rglob("test_*.py"))}
    names = [path.stem for path in WHOLE] + [name for found in files.values() for name in found]
    return [*(str(path) for path, found in files.items() if found or path in WHOLE), "-k", " or ".join(names)]


def test_security_without_asserts():
    # pytest keeps the tests' own asserts, but warns of those it can't. The variable, unlike -O, reaches child processes.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = ["-W", "ignore::pytest.PytestConfigWarning"]
    run = subprocess.run(
        [*command, *options, *chosen()],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONOPTIMIZE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
