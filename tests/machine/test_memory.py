"""The allocator's setting takes effect: freed memory is used again without a page fault."""

import gc
import platform
import subprocess
import sys

import pytest

from twinrl.machine import memory

MEASURE = """
import ctypes, resource, torch
from twinrl.machine.memory import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which one fault brings 512 pages
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(9 * 2**20) for _ in range(2)]  # 36 MiB each: glibc by itself maps blocks over 32 MiB anew
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def least():
    return min(faults() for _ in range(12))  # the heap settles after a few rounds
print(least(), keep_freed_memory(), least())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    """72 MiB of tensors are made and dropped again and again: 18,432 pages of 4 KiB, 1,152 of 64 KiB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    before, kept, after = run.stdout.split()
    assert int(before) > 1000
    assert kept == "True"
    assert int(after) < 100


def test_what_was_imported_is_not_looked_through_again() -> None:
    with memory.importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_a_failed_import_leaves_the_search_on() -> None:
    with pytest.raises(ImportError), memory.importing():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()
