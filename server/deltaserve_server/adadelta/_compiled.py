"""How this room comes to numba, and has it compile a function."""

import logging
import sys
from collections.abc import Callable
from typing import Any

_IMPORTS = 5


def _imported() -> Any:
    """Imports numba.

    It reads all of the environment as it is imported, and fails where another thread takes a variable out meanwhile
    (pytest does with each test). What has been imported of it by then would keep any later try from success.
    """
    for left in reversed(range(_IMPORTS)):
        try:
            import numba.extending
        except KeyError:
            if not left:
                raise
            for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
                del sys.modules[name]
        else:
            break
    return numba


_numba = _imported()
cgutils, intrinsic, types = _numba.core.cgutils, _numba.extending.intrinsic, _numba.types

logger = logging.getLogger(__name__)


def received(dtype: Any) -> Any:
    """Numba's type of a vector that may lie in a received message: read-only, at any byte."""
    return types.Array(dtype, 1, "C", readonly=True, aligned=False)


def readable(dtype: Any) -> Any:
    """Numba's type of a vector that is only read."""
    return types.Array(dtype, 1, "C", readonly=True)


def writable(dtype: Any) -> Any:
    """Numba's type of a vector that is written."""
    return types.Array(dtype, 1, "C")


def compiled(signatures: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function for its signatures, or takes it from numba's cache on disk.

    Fast-math stays off: it would let the compiler fuse, reorder and flush as it likes, differently in a loop's vector
    part and in its rest. `error_model="numpy"` drops Python's check for a division by zero, which prevents vector code.

    Args:
        signatures: Numba's signatures of the function, or its only one.
        function: Code that numba can compile without Python objects. It runs without the GIL.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return _jit(signatures, function, cache=True, **options)
    except Exception as error:
        # No folder for the cache can be written to, or the disk is full, or a file in it is damaged: all of this comes
        # in many types, and none of it is a reason not to start. A fault in the function itself is raised again below.
        logger.warning("numba's cache is of no use (%s): compiling takes a few seconds", type(error).__name__)
        return _jit(signatures, function, cache=False, **options)


def _jit(signatures: Any, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    dispatcher: Callable[..., Any] = _numba.njit(signatures, **options)(function)
    return dispatcher
