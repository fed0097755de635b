"""Random mutations of valid requests."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Messages = list[bytes]

NUMBERS = (0, 1, 2, 3, 127, 128, (1 << 31) - 1, (1 << 32) - 1, (1 << 53) + 1, (1 << 63) - 1, (1 << 64) - 1)
DOUBLES = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e-40, 3.5e38, 1e300, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "m", "m\n", "..", "a" * 300, "\U0001f600" * 90, "%s{model}", "m\0", "w")
_RANGES = {
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_ENUM: (-(1 << 31), (1 << 31) - 1),
}


class Mutator:
    """Mutates requests at random.

    Args:
        seed: Seed of the random source.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def noise(self) -> Messages:
        """Returns messages of random bytes."""
        return [
            self._random.randbytes(self._random.choice((0, 1, 3, 20, 300))) for _ in range(self._random.randint(1, 4))
        ]

    def bits(self, messages: Sequence[Message]) -> Messages:
        """Changes some bytes of one message."""
        encoded = [message.SerializeToString() for message in messages]
        index = self._random.randrange(len(encoded))
        data = bytearray(encoded[index])
        for _ in range(self._random.choice((1, 1, 2, 8))):
            at = self._random.randint(0, len(data))
            actions: tuple[Callable[[int, bytearray], None], ...] = (
                self._flip,
                self._remove,
                self._insert,
                self._repeat,
            )
            self._random.choice(actions)(at, data)
        encoded[index] = bytes(data)
        return encoded

    def order(self, messages: Sequence[Message]) -> Messages:
        """Drops, repeats or swaps messages."""
        encoded = [message.SerializeToString() for message in messages]
        for _ in range(self._random.choice((1, 1, 2))):
            at = self._random.randrange(len(encoded))
            match self._random.randrange(4):
                case 0 if len(encoded) > 1:
                    del encoded[at]
                case 1:
                    encoded.insert(at, encoded[self._random.randrange(len(encoded))])
                case 2:
                    other = self._random.randrange(len(encoded))
                    encoded[at], encoded[other] = encoded[other], encoded[at]
                case _:
                    encoded = encoded[: at + 1]
        return encoded

    def fields(self, messages: Sequence[Message]) -> Messages:
        """Sets some fields to extreme values."""
        copies = [type(message).FromString(message.SerializeToString()) for message in messages]
        for _ in range(self._random.choice((1, 1, 2, 3))):
            self._change(self._random.choice(copies))
        return [copy.SerializeToString() for copy in copies]

    def _change(self, message: Message) -> None:
        if not message.DESCRIPTOR.fields:
            message.SetInParent()
            return
        field: Any = self._random.choice(message.DESCRIPTOR.fields)
        if field.message_type is None:
            self._set(message, field)
        elif field.is_repeated:
            held = getattr(message, field.name)
            self._change(self._random.choice(held) if held and self._random.random() < 0.7 else held.add())
        elif self._random.random() < 0.15:
            message.ClearField(field.name)
        else:
            self._change(getattr(message, field.name))

    def _set(self, message: Message, field: FieldDescriptor) -> None:
        if field.is_repeated:
            getattr(message, field.name).extend(self._value(field) for _ in range(self._random.choice((1, 2, 9))))
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> object:
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                return self._random.choice(TEXTS)
            case FieldDescriptor.TYPE_BYTES:
                return self._random.randbytes(self._random.choice((0, 1, 4, 16, 20, 400)))
            case FieldDescriptor.TYPE_DOUBLE:
                return self._random.choice(DOUBLES)
            case FieldDescriptor.TYPE_BOOL:
                return self._random.random() < 0.5
            case kind:
                low, high = _RANGES[kind]
                number = self._random.choice(NUMBERS) * (1 if low == 0 else self._random.choice((1, -1)))
                return min(max(number, low), high)

    def _flip(self, at: int, data: bytearray) -> None:
        if at < len(data):
            data[at] ^= 1 << self._random.randrange(8)

    def _remove(self, at: int, data: bytearray) -> None:
        del data[at : at + self._random.choice((1, 2, 16))]

    def _insert(self, at: int, data: bytearray) -> None:
        data[at:at] = self._random.choice((b"\xff" * 9 + b"\x01", b"\x80" * 12, self._random.randbytes(3)))

    def _repeat(self, at: int, data: bytearray) -> None:
        data[at:at] = data[at : at + 8] * 3
