"""Runs beside the tests: what takes minutes in a process of its own begins with the session, on cores left idle."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from minilora_kernels.limits import usable_cores

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 1800.0  # Seconds after which a run is taken for one that hangs.
POLITE = 10 if os.name == "posix" else psutil.BELOW_NORMAL_PRIORITY_CLASS


def is_side_run(item):
    return item.get_closest_marker("side_run") is not None and item.get_closest_marker("skip") is None


class SideRuns:
    """The runs of the tests marked `side_run(*arguments, **environment)`: each is Python with these."""

    def __init__(self, items):
        self.processes = []
        self.pool = ThreadPoolExecutor(usable_cores())
        self.runs = {item.nodeid: self.pool.submit(self._run, item) for item in items if is_side_run(item)}

    def _run(self, item):
        mark = item.get_closest_marker("side_run")
        process = psutil.Popen(
            [sys.executable, *mark.args],
            env={**os.environ, **mark.kwargs},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        process.nice(POLITE)
        output, errors = process.communicate(timeout=LONGEST)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def result(self, item):
        """What the run of this test has said, once it has ended."""
        return self.runs[item.nodeid].result()

    def end(self):
        """End what a session that was cut short has left running, by Ctrl-C: so it ends what it has started itself."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        running = [process for process in self.processes if process.is_running()]
        for process in running:
            process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(running, timeout=30)
        for process in left:
            process.kill()
