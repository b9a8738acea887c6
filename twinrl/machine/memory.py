"""The C library's allocator, set for training on a CPU; Python's search for garbage, kept away from modules."""

import atexit
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
GIBIBYTE = 2**30


def keep_freed_memory() -> bool:
    """Let the process keep the memory that tensors free, instead of returning it to the kernel in every step.

    glibc gives large blocks back as soon as they are free, and the next step pays for them again, page by page:
    8 % of a ``tutorial`` step of the UNet at width 32 and batch 128 on one thread (``benchmarks/step_time.py``).
    After a few steps there are none of these page faults. The process keeps its peak of memory, and somewhat more
    where blocks of different sizes do not fit into each other's place. Both thresholds are needed: setting one
    switches the automatic choice of the other off.

    Returns:
        Whether it took effect; False where the C library is not glibc.

    *When to use*: once, before training on a CPU. Calling it again is harmless.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # the value is an int: one gibibyte above which blocks are mapped by themselves, and −1 for "never trim"
    return bool(library.mallopt(M_MMAP_THRESHOLD, GIBIBYTE)) and bool(library.mallopt(M_TRIM_THRESHOLD, -1))


@contextmanager
def importing() -> Iterator[None]:
    """Inside, large modules are imported: no garbage is looked for, and none in them afterwards.

    They make a million objects that live as long as the process. Looking through them takes 0.7 s of 3.7 s that the
    imports of a training take, and 1.1 s more when the process ends (measured on one core).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def end_without_search() -> None:
    """When the process ends, its objects go without a search for garbage among them."""
    atexit.register(gc.freeze)
