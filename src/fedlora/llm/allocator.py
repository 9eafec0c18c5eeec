"""Freed memory stays with the process on a CPU, so that the next pass finds it mapped.

glibc gives every block above 32 MiB back to the system when it is freed, and the system zeroes it page by page
when it is asked for again; a large batch of prompts is made of tensors of that size (benchmarks/allocator.py).
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep large blocks; False where there is no glibc, or it does not take the advice."""
    try:
        advise = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(advise(_M_MMAP_THRESHOLD, _LARGEST)) and bool(advise(_M_TRIM_THRESHOLD, _LARGEST))
