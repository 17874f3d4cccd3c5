"""The tests of what must not be possible, once more under python -O, which drops every assert of the program."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = (
    *(HERE / f"test_{name}.py" for name in ("requests", "adapters", "lora", "isolation", "streams", "guard", "wire")),
    *(HERE / f"test_{name}.py" for name in ("admission", "health", "metrics")),
    *(HERE.parent / f"test_{name}.py" for name in ("tokenizer", "gguf", "checkpoint")),
)


def test_security_without_asserts():
    # pytest keeps the tests' own asserts, but warns of those it can't.
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = ["-W", "ignore::pytest.PytestConfigWarning"]
    run = subprocess.run([*command, *options, *FILES], cwd=HERE.parents[1], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
