"""Every kernel, checked against its NumPy twin, then timed on one thread beside this machine's ceilings.

    python bench/kernels.py [--only PART_OF_A_NAME] [--json]

us: one call; GB/s: bytes that must be read, from data that lies in cache after the first call; G/s: multiply-adds.
Last line: one JSON document.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from minilora_kernels.cases import CASES, Case, Scratch
from minilora_kernels.jit import program
from minilora_kernels.simd_memory import compiler_barrier

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ceilings import Ceilings, measure

SECONDS = 0.15


def repeated(case: Case, returns: bool):
    """The kernel called `times` times from compiled code, so that Python's own cost is left out.

    It is really called each time: the compiler forgets what memory holds.
    """
    kernel = case.kernel

    def add_up(times, arguments):
        total = 0.0
        for _ in range(times):
            compiler_barrier()
            total += kernel(*arguments)
        return total

    def call(times, arguments):
        for _ in range(times):
            compiler_barrier()
            kernel(*arguments)

    return program(add_up if returns else call, ("bench", case.name, *case.constants))


def plain(arguments: tuple) -> tuple:
    """Scratch arrays as ordinary ones."""
    return tuple(np.asarray(a).view(np.ndarray) if isinstance(a, Scratch) else a for a in arguments)


def seconds_per_call(case: Case, size: dict[str, int]) -> float:
    arguments = plain(case.make(np.random.default_rng(0), size))
    loop = repeated(case, returns=case.compiled(*arguments) is not None)
    loop(1, arguments)
    started = time.perf_counter()
    loop(3, arguments)
    times = max(1, int(SECONDS / 3 / max((time.perf_counter() - started) / 3, 1e-8)))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        loop(times, arguments)
        best = min(best, (time.perf_counter() - started) / times)
    return best


def row(case: Case, size: dict[str, int], ceilings: Ceilings) -> dict:
    taken = seconds_per_call(case, size)
    bandwidth, rate = case.bytes(size) / taken / 1e9, case.operations(size) / taken / 1e9
    integer = case.name.startswith("linear int")
    return {
        "case": case.name,
        "size": size,
        "us": taken * 1e6,
        "gb_per_s": bandwidth,
        "read_percent": 100 * bandwidth / ceilings.read,
        "gmac_per_s": rate,
        "int8_percent": 100 * rate / ceilings.multiply if integer else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"no kernel's name holds {options.only!r}")
    ceilings = measure(1)
    if not options.json:
        print(f"one thread reads {ceilings.read:.1f} GB/s, multiplies {ceilings.multiply:.0f} G/s")
        print(f"{'kernel':22} {'size':44} {'us':>10} {'GB/s':>8} {'% read':>7} {'G/s':>8} {'% int8':>7}")
    rows = []
    for case in cases:
        error = max(case.compare(np.random.default_rng(1), size) for size in case.small)
        if error > case.tolerance:
            raise SystemExit(f"{case.name} differs from its twin by {error:.1e}, allowed are {case.tolerance:.1e}")
        for size in case.large:
            found = row(case, size, ceilings)
            rows.append(found)
            if not options.json:
                shape = " ".join(f"{k}={v}" for k, v in size.items())
                share = f"{found['int8_percent']:7.0f}" if found["int8_percent"] else " " * 7
                print(
                    f"{case.name:22} {shape:44} {found['us']:10.2f} {found['gb_per_s']:8.1f} {found['read_percent']:7.0f} {found['gmac_per_s']:8.1f} {share}",
                    flush=True,
                )
    print(json.dumps({"ceilings": asdict(ceilings), "rows": rows}))


if __name__ == "__main__":
    main()
