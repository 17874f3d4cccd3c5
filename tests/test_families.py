"""The kernels on other CPUs: run with features masked, or compiled for ARM without being run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding

from minilora_kernels import cpu

ROOT = Path(__file__).resolve().parent.parent
AVX2 = "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2,+sse4.1,+ssse3,+sse3,+movbe,+cx16"
MASKS = {
    cpu.AVX_VNNI: ("alderlake", f"{AVX2},+avxvnni", "avxvnni"),
    cpu.AVX2: ("haswell", AVX2, "avx2"),
    cpu.PLAIN: ("x86-64", "+sse2", "sse2"),
}


@pytest.mark.parametrize("family", MASKS)
def test_with_features_masked(family):
    """The tests of kernels and network pass in a process that compiles for a lesser CPU."""
    name, features, needed = MASKS[family]
    if not binding.get_host_cpu_features().get(needed):
        pytest.skip(f"this CPU has no {needed}")
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    said = subprocess.run(
        [sys.executable, "-c", "from minilora_kernels import cpu; print(cpu.family())"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert said.stdout.strip() == family, said.stderr
    chosen = ["tests/test_simd.py", "tests/test_kernels.py", "tests/test_network.py", "tests/test_invariance.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, "-k", FEWER]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:]


FEWER = "simd or kernels or phi3 or own_weights or quantised_weights or any_number_of_threads"


@pytest.mark.parametrize(
    "triple, name, features, instruction",
    [
        ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod,+fullfp16", "sdot"),
        ("aarch64-unknown-linux-gnu", "neoverse-v1", "+neon,+dotprod,+i8mm,+fullfp16", "usdot"),
        ("arm64-apple-darwin", "apple-m1", "", "sdot"),
        ("aarch64-unknown-linux-gnu", "cortex-a72", "+neon", None),
    ],
)
def test_every_kernel_lowers_for_arm(triple, name, features, instruction):
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "cross.py"), triple, name, features or "+neon"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
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
