"""The tests of what must not be possible, once more without the program's own asserts, as under python -O."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
# The tests of known failures, see KNOWN_FAILURES.md, have their codes in their names.
KNOWN = re.compile(r"^def test_[sl]\d+_", re.MULTILINE)
FILES = [path for path in sorted(TESTS.rglob("test_*.py")) if KNOWN.search(path.read_text())]
MORE = [
    TESTS / f"{name}.py"
    for name in ("server/test_streams", "server/test_admission", "crowd/test_faults", "crowd/test_counters")
]
# pytest keeps the tests' own asserts, but warns of those it can't.
COMMAND = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning", *FILES, *MORE]


@pytest.mark.side_run(*COMMAND, PYTHONOPTIMIZE="1")  # The variable, unlike -O, reaches child processes.
def test_security_without_asserts(side_run):
    assert side_run.returncode == 0, side_run.stdout[-3000:]
    assert " passed" in side_run.stdout
