"""Encoding of stream messages: headers through protobuf, chunks of vectors without an extra copy.

The bytes are those of the .proto. Every stream message is a oneof: field 1 is the header, and each further field is a
`Chunk {offset = 1, data = 2}` of the vector that the field is named after.
"""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

M = TypeVar("M", bound=Message)

_LENGTH_DELIMITED = 2
_OFFSET_TAG = 1 << 3
_DATA_TAG = 2 << 3 | _LENGTH_DELIMITED

# The longest varints that protobuf accepts.
_LENGTH_BYTES = 5
_OFFSET_BYTES = 10


class Chunk(NamedTuple):
    """A received chunk: raw bytes of the elements of `vector` from `offset` on."""

    vector: str
    offset: int
    data: memoryview


class StreamCodec(Generic[M]):
    """Encodes and decodes the messages of one stream.

    Args:
        kind: The stream's message class.
    """

    def __init__(self, kind: type[M]) -> None:
        self.kind = kind
        self._header: str = kind.DESCRIPTOR.fields_by_number[1].name
        self._vectors: dict[int, str] = {f.number: f.name for f in kind.DESCRIPTOR.fields if f.number > 1}
        self._numbers = {name: number for number, name in self._vectors.items()}

    def header(self, header: Message) -> bytes:
        """Returns the stream's first message."""
        message = self.kind()
        getattr(message, self._header).CopyFrom(header)
        return message.SerializeToString()

    def chunk(self, vector: str, offset: int, parts: Sequence[memoryview]) -> bytes:
        """Returns the message of a chunk: the bytes of `parts` joined; `offset` in elements."""
        size = sum(part.nbytes for part in parts)
        # Protobuf leaves out a field whose value is 0.
        inner = (bytes([_OFFSET_TAG]) + _varint(offset) if offset else b"") + bytes([_DATA_TAG]) + _varint(size)
        tag = self._numbers[vector] << 3 | _LENGTH_DELIMITED
        # gRPC takes nothing but bytes, so this copies the vector once.
        return b"".join([bytes([tag]), _varint(len(inner) + size), inner, *parts])

    def decode(self, message: bytes) -> Any:
        """Returns a Chunk, or the header's own message.

        Raises:
            DecodeError: The bytes are not a message of this stream, or no field is set.
        """
        # Nearly all bytes are chunks in our own form, which protobuf would copy; other languages may write other forms.
        return self._chunk(message) or self._parsed(message)

    def _chunk(self, message: bytes) -> Chunk | None:
        """Decodes a chunk in the form that `chunk` writes; returns None for any other bytes, valid or not."""
        vector = self._vectors.get(message[0] >> 3) if message and message[0] & 7 == _LENGTH_DELIMITED else None
        if vector is None:
            return None
        size, at = _read_varint(message, 1, _LENGTH_BYTES)
        # A further field follows, or the message is cut off: protobuf decides.
        if at + size != len(message) or at == len(message):
            return None
        offset = 0
        if message[at] == _OFFSET_TAG:
            offset, at = _read_varint(message, at + 1, _OFFSET_BYTES)
        if at >= len(message) or message[at] != _DATA_TAG:
            return None
        size, at = _read_varint(message, at + 1, _LENGTH_BYTES)
        return Chunk(vector, offset, memoryview(message)[at:]) if at + size == len(message) else None

    def _parsed(self, message: bytes) -> Any:
        parsed = self.kind.FromString(message)
        name = parsed.WhichOneof("message")
        if name is None:
            raise DecodeError("nothing is set")
        inner = getattr(parsed, name)
        return inner if name == self._header else Chunk(name, inner.offset, memoryview(inner.data))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int, longest: int) -> tuple[int, int]:
    """Returns the number at `at` and the index after it; an index beyond the message if it is not a 64-bit varint."""
    value = 0
    for index in range(longest):
        if at + index >= len(message):
            break
        byte = message[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return (value, at + index + 1) if value < 1 << 64 else (0, len(message) + 1)
    return 0, len(message) + 1
