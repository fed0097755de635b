"""Small files of JSON with a checksum, and the values in them; all that is read is held against its types."""

from typing import Any, TypeVar

import msgspec
from crc32c import crc32c

from deltaserve_server.durability.errors import CorruptError

T = TypeVar("T")

_DIGITS = 8


def packed(value: Any) -> bytes:
    """Returns a value of dataclasses as JSON in one line, and its CRC-32C in another."""
    body = msgspec.json.encode(value)
    return b"%b\n%08x\n" % (body, crc32c(body))


def unpacked(content: bytes, kind: type[T], where: str) -> T:
    """Returns the value that `packed` has written.

    Args:
        content: A whole file.
        kind: What it is to hold.
        where: The file, for the error.

    Raises:
        CorruptError: It is not what was written.
    """
    body, check = content[: -_DIGITS - 2], content[-_DIGITS - 2 :]
    if check != b"\n%08x\n" % crc32c(body):
        raise CorruptError(where, "its checksum is wrong")
    return decoded(body, kind, where)


def decoded(body: bytes | memoryview, kind: type[T], where: str) -> T:
    """Returns the value of some JSON; raises CorruptError where it is no `kind`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(where, str(error)) from None
