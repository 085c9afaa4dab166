"""Makes glibc keep freed memory in the process, on a CPU.

By default glibc returns a large block to the system as soon as it is freed, and the system clears
each page of the next one: a third of a step's time was spent on that.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in malloc.h
LARGEST_KEPT_BLOCK = 2**30  # bytes
# Under autocast, rounded copies of weights are made and freed between activations of other sizes.
# If large ones are kept, they leave gaps that nothing else fits into: a model of 494M parameters
# held over 24 GB instead of 16.
LARGEST_KEPT_BLOCK_IN_BF16 = 2**24  # bytes


def keep_freed_memory(largest: int = LARGEST_KEPT_BLOCK) -> None:
    """Keeps freed blocks for reuse; does nothing if the C library is not glibc.

    Call it before torch is imported. A later call may change `largest`.

    Args:
        largest: bytes; larger blocks are returned to the system when they are freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, largest)
        mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT_BLOCK * 2 - 1)


def give_back_freed_memory() -> None:
    """Returns kept memory to the system; call it when memory has run out."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
