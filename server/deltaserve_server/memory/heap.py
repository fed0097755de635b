"""How the C library's heap treats memory that was freed."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""

_LARGEST = 32 << 20
"""Up to this size a block comes from the heap, not from the system: glibc takes no more."""

_PAD = 64 << 20
_NEVER = (1 << 31) - 1


def keep_freed() -> None:
    """Has the heap keep what is freed, for this whole process.

    The messages of a push are freed when its update is made, and the next push needs as much again: taken from the
    system each time, a page at a time, that costs a third of a step. Without glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD)):
            mallopt(parameter, value)
