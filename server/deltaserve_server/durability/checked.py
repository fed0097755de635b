"""Small JSON files with a checksum. Every value read is checked against its type."""

from typing import Any, TypeVar

import msgspec
from crc32c import crc32c

from deltaserve._common.optimizers import OPTIMIZERS
from deltaserve._common.optimizers.definition import hyperparameters
from deltaserve_server.durability.errors import CorruptError

T = TypeVar("T")

_CHECKSUM_LINE_BYTES = len("\n12345678\n")
_SHOWN_CHARACTERS = 40
_KEYS = {kind: {"kind", *hyperparameters(optimizer)} for kind, optimizer in OPTIMIZERS.items()}


def packed(value: Any) -> bytes:
    """Returns a value as one line of JSON, followed by a line with its CRC-32C."""
    body = msgspec.json.encode(value)
    return b"%b\n%08x\n" % (body, crc32c(body))


def unpacked(content: bytes, kind: type[T], where: str) -> T:
    """Returns the value that `packed` encoded as the whole `content` of the file `where`.

    Raises:
        CorruptError: The checksum is wrong, or the value is not a `kind`.
    """
    body, checksum = content[:-_CHECKSUM_LINE_BYTES], content[-_CHECKSUM_LINE_BYTES:]
    if checksum != b"\n%08x\n" % crc32c(body):
        raise CorruptError(where, "its checksum is wrong")
    return decoded(body, kind, where)


def decoded(body: bytes | memoryview, kind: type[T], where: str) -> T:
    """Decodes JSON; raises CorruptError unless it is a `kind`."""
    try:
        return msgspec.json.decode(body, type=kind, dec_hook=_optimizer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(where, str(error)) from None


def _optimizer(_: type, value: Any) -> Any:
    """Returns the optimizer that msgspec encoded with its kind; raises ValueError for anything else.

    msgspec calls this where a type contains `Optimizer`, an abstract class that it cannot decode by itself.
    """
    if not isinstance(value, dict):
        raise ValueError("expected an optimizer")
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in OPTIMIZERS:
        raise ValueError(f"optimizer of an unknown kind {str(kind)[:_SHOWN_CHARACTERS]!r}")
    # msgspec would give a missing hyperparameter its default, and ignore what it does not know.
    if value.keys() != _KEYS[kind]:
        raise ValueError(f"other hyperparameters than those of {kind}")
    return msgspec.convert(value, OPTIMIZERS[kind])
