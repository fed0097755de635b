"""Imports numba and compiles functions with it."""

import logging
import sys
from collections.abc import Callable
from typing import Any

_IMPORT_ATTEMPTS = 5


def _import_numba() -> Any:
    """Imports numba; retries if another thread changes the environment during the import.

    Numba copies the whole environment during its import and raises KeyError if a variable disappears under it, as
    pytest makes one do around each test.
    """
    for attempts_left in reversed(range(_IMPORT_ATTEMPTS)):
        try:
            import numba.extending
        except KeyError:
            if not attempts_left:
                raise
            # Modules that were imported halfway would fail the next attempt too.
            for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
                del sys.modules[name]
        else:
            break
    return numba


_numba = _import_numba()
cgutils, intrinsic, types = _numba.core.cgutils, _numba.extending.intrinsic, _numba.types

logger = logging.getLogger(__name__)


def received(dtype: Any) -> Any:
    """Numba's type of a vector inside a received message: read-only, at any byte offset."""
    return types.Array(dtype, 1, "C", readonly=True, aligned=False)


def readable(dtype: Any) -> Any:
    """Numba's type of an aligned vector that the function only reads."""
    return types.Array(dtype, 1, "C", readonly=True)


def writable(dtype: Any) -> Any:
    """Numba's type of an aligned vector that the function writes."""
    return types.Array(dtype, 1, "C")


def compiled(signatures: Any, function: Callable[..., Any]) -> Any:
    """Compiles a function for its signatures, or loads it from numba's cache on disk.

    Fast-math stays off: it would let the compiler fuse, reorder and flush as it likes, and differently in the vector
    part of a loop and in its remainder. `error_model="numpy"` drops Python's check for division by zero, which would
    prevent vector code.

    Args:
        signatures: Numba's signatures of the function.
        function: Code that numba can compile without Python objects. It runs without the GIL.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return _numba.njit(signatures, cache=True, **options)(function)
    except Exception as error:
        # A cache folder that is read-only, full or damaged raises exceptions of many types, and none of them is a
        # reason not to start. A fault of the function itself is raised again below.
        logger.warning(
            "numba cannot use its cache (%s): compiling the kernels takes a few seconds", type(error).__name__
        )
        return _numba.njit(signatures, **options)(function)
