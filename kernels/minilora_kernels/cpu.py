"""Which vector instructions the compiler may use on this machine.

Numba compiles for one CPU: the host, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say. The family
decides how `dot` multiplies bytes, the registers how large tiles are. Everything else is LLVM's business.
"""

from functools import cache

from numba.core.registry import cpu_target

AVX512_VNNI = "avx512-vnni"
AVX_VNNI = "avx-vnni"
AVX2 = "avx2"
NEON_DOT = "neon-dotprod"
PLAIN = "plain"


def family_of(triple: str, name: str, features: frozenset[str]) -> str:
    """The family of a CPU, from LLVM's names for its triple, model and features."""
    if triple.startswith(("aarch64", "arm64")):
        # LLVM reports no features on macOS; every Apple core has the dot product.
        return NEON_DOT if "dotprod" in features or name.startswith("apple-") else PLAIN
    if {"avx512vnni", "avx512bw", "avx512vl"} <= features:
        return AVX512_VNNI
    if {"avxvnni", "avx2"} <= features:
        return AVX_VNNI
    return AVX2 if "avx2" in features else PLAIN


@cache
def target() -> tuple[str, str, frozenset[str]]:
    """LLVM triple, CPU name and enabled features that Numba compiles for."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, frozenset(f[1:] for f in features.split(",") if f.startswith("+"))


@cache
def family() -> str:
    """The family that Numba compiles for in this process."""
    return family_of(*target())


@cache
def vectors() -> int:
    """How many vectors of 512 bits the registers hold: 32 with AVX-512; 8 in 16 of 256 bits, or in 32 of 128.

    SSE2 alone holds 4: nothing is tuned for it.
    """
    return 32 if "avx512f" in target()[2] else 8


@cache
def full_width() -> bool:
    """Whether two vectors of 512 bits are multiplied in a cycle: so on Zen 5, while Zen 4 takes two cycles for that."""
    return target()[1] == "znver5"


@cache
def streams_past_caches() -> bool:
    """Whether what a busy kernel reads once is best fetched past the second-level cache: so on Zen 5, not on Zen 4."""
    return target()[1] == "znver5"


@cache
def has_fma() -> bool:
    """Whether fused multiply-add is an instruction here (else LLVM would call libm for it)."""
    triple, _, features = target()
    return "fma" in features or triple.startswith(("aarch64", "arm64"))


@cache
def has_half() -> bool:
    """Whether float16 converts by instruction here (else LLVM would call a library that need not be there)."""
    triple, _, features = target()
    return "f16c" in features or triple.startswith(("aarch64", "arm64"))


@cache
def has_bf16() -> bool:
    """Whether 512 bits of bfloat16 are multiplied in pairs by instruction here."""
    return "avx512bf16" in target()[2]


@cache
def has_i8mm() -> bool:
    """Whether ARM's mixed-sign dot product (usdot) is there."""
    return "i8mm" in target()[2]
