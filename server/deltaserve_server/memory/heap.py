"""Settings of the C library's heap."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt; see mallopt(3)."""

_LARGEST = 32 << 20
"""Largest block that comes from the heap instead of an mmap of its own: glibc's upper limit for this setting."""

_PAD = 64 << 20
_NEVER = (1 << 31) - 1


def keep_freed() -> None:
    """Makes the heap of this process keep freed memory instead of returning it to the system.

    An update frees the messages of its pushes, and the next push needs as much again. Getting that from the system each
    time, with a page fault per page, takes a third of a step. Without glibc the function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        # Setting any of these also turns off glibc's dynamic thresholds, hence all three.
        for parameter, value in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD)):
            mallopt(parameter, value)
