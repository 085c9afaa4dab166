"""How the process holds memory on a CPU: what was freed is kept.

By default glibc gives a large block back to the system as soon as it is freed, and the next one is
cleared anew, page by page: a third of a step's time went into that.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT_BLOCK = 2**30
# Under autocast, rounded copies of weights come and go between activations of other sizes. Kept,
# large ones leave gaps that nothing else fits: 494M parameters held over 24 GB instead of 16.
LARGEST_KEPT_BLOCK_IN_BF16 = 2**24


def keep_freed_memory(largest: int = LARGEST_KEPT_BLOCK) -> None:
    """To be called before torch is imported; does nothing where the C library is not glibc.

    largest: bytes; a larger block is given back when it is freed. May be changed at any time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, largest)
        mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT_BLOCK * 2 - 1)


def give_back_freed_memory() -> None:
    """To be called where memory has run out: what is kept is nobody else's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
