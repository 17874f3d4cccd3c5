"""Memory in huge pages, and given back when it is free."""

import platform
import subprocess
import sys

import numpy as np
import pytest

from minilora_kernels.memory import CACHE_LINE, aligned_zeros

FREED = """
import psutil
import numpy as np
from minilora.memory import give_back_freed_arrays
if {give_back}:
    give_back_freed_arrays()
# Arrays of many sizes, of which a small one stays behind each, as where adapters are read and packed.
kept = []
for _ in range(3):
    for array in [np.ones(size << 18) for size in range(1, 12)]:
        kept.append(np.ones(100))
    many = []
    for _ in range(400):
        many.append(np.ones(1 << 16))
        kept.append(np.ones(100))
    del many, array
print(psutil.Process().memory_info().rss >> 20)
"""


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.float32])
@pytest.mark.parametrize("count", [0, 1, 1000, 300_001])
def test_arrays_begin_on_a_cache_line(count, dtype):
    arrays = [aligned_zeros(count, dtype) for _ in range(8)]
    assert all(array.dtype == dtype and len(array) == count and not array.any() for array in arrays)
    assert all(array.ctypes.data % CACHE_LINE == 0 for array in arrays if count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_freed_arrays_are_given_back():
    def megabytes(give_back):
        command = [sys.executable, "-c", FREED.format(give_back=give_back)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert megabytes(True) < megabytes(False) - 100
