"""The tests of what must not be possible, once more without the program's own asserts, as under python -O."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# Known failures have their tests under their names, S1 to S28 and L1 to L11.
KNOWN = re.compile(r"^def test_[sl]\d+_", re.MULTILINE)
FILES = [path for path in sorted(TESTS.rglob("test_*.py")) if KNOWN.search(path.read_text())]
MORE = [
    TESTS / f"{name}.py"
    for name in ("server/test_streams", "server/test_admission", "crowd/test_faults", "crowd/test_counters")
]


def test_security_without_asserts():
    # pytest keeps the tests' own asserts, but warns of those it can't. The variable, unlike -O, reaches child processes.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = ["-W", "ignore::pytest.PytestConfigWarning"]
    run = subprocess.run(
        [*command, *options, *FILES, *MORE],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONOPTIMIZE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
