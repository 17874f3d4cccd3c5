"""Memory in huge pages, and given back when it is free."""

import mmap
import platform
import subprocess
import sys

import numpy as np
import pytest

from minilora import memory
from minilora.memory import HUGE_PAGE
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


def write_in_small_pages(path, size, first):
    """A huge page at a time up to `first`, then small pages from the end backwards: the system keeps them so."""
    with path.open("wb", buffering=0) as file:
        for at in [*range(0, first, HUGE_PAGE), *range(size - mmap.PAGESIZE, first - 1, -mmap.PAGESIZE)]:
            file.seek(at)
            file.write(np.full(HUGE_PAGE if at < first else mmap.PAGESIZE, at // HUGE_PAGE, np.uint8))


@pytest.mark.parametrize("first", [0, 4 * HUGE_PAGE])
def test_files_in_small_pages_are_read_again_into_huge_ones(tmp_path, first):
    file, pages = tmp_path / "file", 16
    write_in_small_pages(file, pages * HUGE_PAGE, pages * HUGE_PAGE)
    if not memory._huge_bytes(memory.map_file(file)):
        pytest.skip("files are not kept in huge pages here")
    write_in_small_pages(file, pages * HUGE_PAGE, first)
    mapped = memory.map_file(file)
    assert (mapped.reshape(pages, HUGE_PAGE) == np.arange(pages, dtype=np.uint8)[:, None]).all()
    assert memory._huge_bytes(mapped) > first
    mapped[5] = 77
    assert memory.map_file(file)[5] == 0, "what is written stays in this process"


def test_small_files_are_mapped_as_they_are(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert memory.map_file(tmp_path / "file").tobytes() == b"abc"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_freed_arrays_are_given_back():
    def megabytes(give_back):
        command = [sys.executable, "-c", FREED.format(give_back=give_back)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert megabytes(True) < megabytes(False) - 100
