"""The allocator's setting takes effect: freed memory is used again without a page fault."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import resource, torch
from twinrl.memory import keep_freed_memory
torch.set_num_threads(1)
if {keep}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(16 * 2**20) for _ in range(2)]  # 64 MiB each: glibc by itself maps blocks over 32 MiB anew
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(12):  # the heap settles after a few rounds
    faults()
print(faults())
"""


def page_faults(keep: bool) -> int:
    """Page faults of making and dropping 128 MiB of tensors again, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", MEASURE.format(keep=keep)], check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
    assert page_faults(keep=True) < 100
    assert page_faults(keep=False) > 1000
