"""Every kernel, checked against its NumPy twin, then timed on one thread beside this machine's ceilings.

    python bench/kernels.py [--only PART_OF_A_NAME] [--json]

The best of 5 runs. us: one call; GB/s: bytes that must be read; % read: of memory's bandwidth, above 100 where they
come from caches; GMAC/s: multiply-adds; % int8: of the int8 peak. Last line: one JSON document.
"""

import argparse
import json
import time
from dataclasses import asdict

import numpy as np
from ceilings import Ceilings, measure, seconds

from minilora_kernels.cases import CASES, Case, Scratch
from minilora_kernels.jit import program
from minilora_kernels.simd_memory import compiler_barrier

SECONDS = 0.15


def repeated(case: Case, returns: bool):
    """The kernel called `times` times from compiled code, so that Python's own cost is left out.

    The barrier has the compiler forget what memory holds, so that no call is left out.
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
    """The arguments with scratch arrays as ordinary ones."""
    return tuple(np.asarray(a).view(np.ndarray) if isinstance(a, Scratch) else a for a in arguments)


def seconds_per_call(case: Case, size: dict[str, int]) -> float:
    arguments = plain(case.make(np.random.default_rng(0), size))
    loop = repeated(case, returns=case.compiled(*arguments) is not None)
    loop(1, arguments)
    started = time.perf_counter()
    loop(3, arguments)
    times = max(1, int(SECONDS / 3 / max((time.perf_counter() - started) / 3, 1e-8)))
    return seconds(lambda: loop(times, arguments)) / times


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
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"no kernel's name contains {options.only!r}")
    ceilings = measure(1)
    if not options.json:
        print(f"one thread: {ceilings.read:.1f} GB/s read, {ceilings.multiply:.0f} G int8 multiply-adds/s")
        print(f"{'kernel':22} {'size':44} {'us':>10} {'GB/s':>8} {'% read':>7} {'GMAC/s':>8} {'% int8':>7}")
    rows = []
    for case in cases:
        error = max(case.compare(np.random.default_rng(1), size) for size in case.small)
        if error > case.tolerance:
            raise SystemExit(
                f"{case.name} differs from its twin by {error:.1e}, more than the {case.tolerance:.1e} allowed"
            )
        for size in case.large:
            found = row(case, size, ceilings)
            rows.append(found)
            if not options.json:
                shape = " ".join(f"{k}={v}" for k, v in size.items())
                share = f"{found['int8_percent']:7.0f}" if found["int8_percent"] else " " * 7
                print(
                    f"{case.name:22} {shape:44} {found['us']:10.2f} {found['gb_per_s']:8.1f}"
                    f" {found['read_percent']:7.0f} {found['gmac_per_s']:8.1f} {share}",
                    flush=True,
                )
    print(json.dumps({"ceilings": asdict(ceilings), "rows": rows}))


if __name__ == "__main__":
    main()
