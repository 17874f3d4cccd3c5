"""The kernels on other CPUs: run with features masked, or compiled for ARM without being run."""

import json
import os
import subprocess
import sys

import pytest
from llvmlite import binding

from minilora_kernels import cpu

AVX2 = "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2,+sse4.1,+ssse3,+sse3,+movbe,+cx16"
MASKS = {
    cpu.AVX_VNNI: ("alderlake", f"{AVX2},+avxvnni", "avxvnni"),
    cpu.AVX2: ("haswell", AVX2, "avx2"),
    cpu.PLAIN: ("x86-64", "+sse2", "sse2"),
}


FEWER = "simd or kernels or phi3 or own_weights or inputs_are_rounded or any_number_of_threads"
TESTS = ["tests/test_simd.py", "tests/test_kernels.py", "tests/test_network.py", "tests/test_invariance.py"]
ARM = {
    "sdot": ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod,+fullfp16"),
    "usdot": ("aarch64-unknown-linux-gnu", "neoverse-v1", "+neon,+dotprod,+i8mm,+fullfp16"),
    "apple": ("arm64-apple-darwin", "apple-m1", "+neon"),
    "neither": ("aarch64-unknown-linux-gnu", "cortex-a72", "+neon"),
}


def mask(family):
    """The variables with which a process compiles for a lesser CPU."""
    name, features, _ = MASKS[family]
    return {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}


def marks(family):
    if not binding.get_host_cpu_features().get(MASKS[family][2]):
        return pytest.mark.skip(f"this CPU has no {MASKS[family][2]}")
    if family == cpu.family():
        return pytest.mark.skip("all tests run for this family here")
    return pytest.mark.side_run(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS, "-k", FEWER, **mask(family)
    )


@pytest.mark.parametrize("family", [pytest.param(family, marks=marks(family)) for family in MASKS])
def test_with_features_masked(family, side_run):
    """The tests of kernels and network pass in a process that compiles for a lesser CPU."""
    assert side_run.returncode == 0, side_run.stdout[-3000:]
    command = [sys.executable, "-c", "from minilora_kernels import cpu; print(cpu.family())"]
    assert subprocess.check_output(command, env={**os.environ, **mask(family)}, text=True).strip() == family


def mark_of_full_width():
    if cpu.full_width() or cpu.family() != cpu.AVX512_VNNI:
        return pytest.mark.skip("all tests run with these tiles here, or this CPU can't run them")
    features = binding.get_host_cpu_features().flatten()
    tests = ["tests/test_kernels.py", "tests/test_invariance.py", "-k", "linear or integers"]
    variables = {"NUMBA_CPU_NAME": "znver5", "NUMBA_CPU_FEATURES": features}
    return pytest.mark.side_run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, **variables)


@mark_of_full_width()
def test_tiles_for_a_cpu_of_full_width(side_run):
    """Those for many rows of integer weights, which only Zen 5 takes by itself."""
    assert side_run.returncode == 0, side_run.stdout[-3000:]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.side_run("tools/cross.py", *ARM[name])) for name in ARM]
)
def test_every_kernel_lowers_for_arm(name, side_run):
    assert side_run.returncode == 0, side_run.stderr[-2000:]
    instruction = {"neither": None, "apple": "sdot"}.get(name, name)
    found = json.loads(side_run.stdout)
    assert found["family"] == (cpu.NEON_DOT if instruction else cpu.PLAIN)
    for case, counts in found["cases"].items():
        if case.startswith("linear int") and instruction:
            assert counts[instruction] + counts["sdot"] >= 32, case
        if case.startswith(("linear", "attend", "shrink", "expand")):
            assert counts["fmla"] > 0, case
        if case == "shrink int8":
            assert counts["smlal"] > 0


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
