"""The kernels on other CPUs: run with features masked, or compiled for ARM without being run."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from llvmlite import binding

from minilora_kernels import cpu
from minilora_kernels.limits import usable_cores

ROOT = Path(__file__).resolve().parent.parent
AVX2 = "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2,+sse4.1,+ssse3,+sse3,+movbe,+cx16"
MASKS = {
    cpu.AVX_VNNI: ("alderlake", f"{AVX2},+avxvnni", "avxvnni"),
    cpu.AVX2: ("haswell", AVX2, "avx2"),
    cpu.PLAIN: ("x86-64", "+sse2", "sse2"),
}


FEWER = "simd or kernels or phi3 or own_weights or quantised_weights or any_number_of_threads"
TESTS = ["tests/test_simd.py", "tests/test_kernels.py", "tests/test_network.py", "tests/test_invariance.py"]
ARM = {
    "sdot": ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod,+fullfp16"),
    "usdot": ("aarch64-unknown-linux-gnu", "neoverse-v1", "+neon,+dotprod,+i8mm,+fullfp16"),
    "apple": ("arm64-apple-darwin", "apple-m1", "+neon"),
    "neither": ("aarch64-unknown-linux-gnu", "cortex-a72", "+neon"),
}


def masked(family):
    """The environment of a process that compiles for a lesser CPU."""
    name, features, _ = MASKS[family]
    return {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}


def run(arguments, environment=None):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def runs(request):
    """What the tests of this module that were chosen run, by its key: as many at once as there are cores, as each takes minutes."""
    pool = ThreadPoolExecutor(usable_cores())
    chosen = {item.callspec.params.get("key") for item in request.session.items if item.path == request.path}
    started = {}
    for family in chosen.intersection(MASKS):
        arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS, "-k", FEWER]
        if reason_to_skip(family) is None:
            started[family] = pool.submit(run, arguments, masked(family))
    for name in chosen.intersection(ARM):
        started[name] = pool.submit(run, ["tools/cross.py", *ARM[name]])
    yield started
    pool.shutdown(cancel_futures=True)


def reason_to_skip(family):
    needed = MASKS[family][2]
    if not binding.get_host_cpu_features().get(needed):
        return f"this CPU has no {needed}"
    return "all tests run for this family here" if family == cpu.family() else None


@pytest.mark.parametrize("key", MASKS)
def test_with_features_masked(key, runs):
    """The tests of kernels and network pass in a process that compiles for a lesser CPU."""
    if reason := reason_to_skip(key):
        pytest.skip(reason)
    said = run(["-c", "from minilora_kernels import cpu; print(cpu.family())"], masked(key))
    assert said.stdout.strip() == key, said.stderr
    done = runs[key].result()
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("key", ARM)
def test_every_kernel_lowers_for_arm(key, runs):
    instruction = {"neither": None, "apple": "sdot"}.get(key, key)
    done = runs[key].result()
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["family"] == (cpu.NEON_DOT if instruction else cpu.PLAIN)
    for case, counts in found["cases"].items():
        if case.startswith("linear int") and instruction:
            assert counts[instruction] + counts["sdot"] >= 32, case
        if case.startswith(("linear", "attend", "shrink", "expand")):
            assert counts["fmla"] > 0, case


@pytest.mark.parametrize(
    "triple, name, features, family",
    [
        ("x86_64-unknown-linux-gnu", "znver5", {"avx512vnni", "avx512bw", "avx512vl", "avx2"}, cpu.AVX512_VNNI),
        ("x86_64-unknown-linux-gnu", "skylake-avx512", {"avx512bw", "avx512vl", "avx2"}, cpu.AVX2),
        ("x86_64-pc-windows-msvc", "alderlake", {"avxvnni", "avx2"}, cpu.AVX_VNNI),
        ("x86_64-apple-darwin", "skylake", {"avx2"}, cpu.AVX2),
        ("x86_64-unknown-linux-gnu", "nehalem", {"sse4.2"}, cpu.PLAIN),
        ("arm64-apple-darwin", "apple-m1", set(), cpu.NEON_DOT),
        ("aarch64-unknown-linux-gnu", "cortex-a72", {"neon"}, cpu.PLAIN),
        ("riscv64-unknown-linux-gnu", "generic", set(), cpu.PLAIN),
    ],
)
def test_family_of(triple, name, features, family):
    assert cpu.family_of(triple, name, frozenset(features)) == family
