"""python -m minilora: the command line."""

import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line; returns the exit code. Signals are answered while its modules are imported too."""
    signal.signal(signal.SIGTERM, _end)
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _end(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C: what was begun is cleared away."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
