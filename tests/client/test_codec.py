"""StreamCodec encodes and decodes exactly like the generated classes; invalid messages raise DecodeError."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deltaserve._common.codec import Chunk, StreamCodec
from deltaserve.v1 import common_pb2, model_service_pb2, worker_service_pb2

UINT64 = (1 << 64) - 1


def stream_messages() -> Iterator[type[Message]]:
    """Yields the message class of each stream of the contract."""
    for module in (model_service_pb2, worker_service_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if method.client_streaming:
                    yield getattr(module, method.input_type.name)
                if method.server_streaming:
                    yield getattr(module, method.output_type.name)


KINDS = [kind for kind in stream_messages() if "message" in kind.DESCRIPTOR.oneofs_by_name]
VECTORS = [(kind, field.name) for kind in KINDS for field in kind.DESCRIPTOR.fields if field.number > 1]

every_vector = pytest.mark.parametrize(("kind", "vector"), VECTORS, ids=lambda value: getattr(value, "__name__", value))
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)

offsets = st.one_of(st.integers(0, UINT64), st.sampled_from([0, 1, 127, 128, (1 << 32) - 1, 1 << 32, UINT64]))
some_bytes = st.binary(max_size=300)


def with_chunk(kind: type[Message], vector: str, offset: int, data: bytes) -> Any:
    return kind(**{vector: common_pb2.Chunk(offset=offset, data=data)})


def varint(value: int, padding: int = 0) -> bytes:
    """Encodes a varint with `padding` redundant bytes, which is legal up to ten bytes in all."""
    groups = [value >> shift & 0x7F for shift in range(0, 64, 7)]
    while len(groups) > 1 and not groups[-1]:
        groups.pop()
    groups += [0] * min(padding, 10 - len(groups))
    return bytes(group | 0x80 for group in groups[:-1]) + bytes(groups[-1:])


def oracle(kind: type[Message], message: bytes) -> object:
    """Decodes a message with the generated class, as the codec would; returns DecodeError if it is invalid."""
    try:
        parsed: Any = kind.FromString(message)
    except DecodeError:
        return DecodeError
    name = parsed.WhichOneof("message")
    if name is None:
        return DecodeError
    inner = getattr(parsed, name)
    return (name, inner.offset, inner.data) if isinstance(inner, common_pb2.Chunk) else inner


def decoded(kind: type[Message], message: bytes) -> object:
    try:
        result = StreamCodec(kind).decode(message)
    except DecodeError:
        return DecodeError
    return (result.vector, result.offset, bytes(result.data)) if isinstance(result, Chunk) else result


def test_every_stream_of_vectors_is_tested() -> None:
    """The tests find streams of vectors by their form: a oneof of a header and chunks."""
    assert {kind.__name__ for kind in stream_messages()} - {kind.__name__ for kind in KINDS} == {"WatchModelResponse"}
    names = {kind.__name__ for kind in KINDS}
    assert names == {
        "CreateModelRequest", "ExtendModelRequest", "PullStateResponse", "PutStateRequest",
        "StreamStepRequest", "StreamStepResponse", "PullResponse",
    }  # fmt: skip
    for kind in KINDS:
        assert [oneof.name for oneof in kind.DESCRIPTOR.oneofs] == ["message"]
        assert {field.number for field in kind.DESCRIPTOR.fields} == set(range(1, len(kind.DESCRIPTOR.fields) + 1))


@every_vector
@given(offset=offsets, parts=st.lists(some_bytes, max_size=4))
def test_a_chunk_is_encoded_as_the_generated_class_does(
    kind: type[Message], vector: str, offset: int, parts: list[bytes]
) -> None:
    data = b"".join(parts)
    assume(data)  # an empty chunk is never sent; protobuf leaves its field out
    mine = StreamCodec(kind).chunk(vector, offset, [memoryview(part) for part in parts])
    assert mine == with_chunk(kind, vector, offset, data).SerializeToString()


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, (1 << 21) - 1, 1 << 21])
def test_the_length_of_a_chunk_may_take_any_number_of_bytes(size: int) -> None:
    data = bytes(size)
    message = with_chunk(worker_service_pb2.StreamStepRequest, "gradient", 7, data).SerializeToString()
    codec = StreamCodec(worker_service_pb2.StreamStepRequest)
    assert codec.chunk("gradient", 7, [memoryview(data)]) == message
    assert codec.decode(message) == ("gradient", 7, data)


@every_vector
@given(offset=offsets, data=some_bytes)
def test_a_chunk_of_the_generated_class_is_decoded(kind: type[Message], vector: str, offset: int, data: bytes) -> None:
    message = with_chunk(kind, vector, offset, data).SerializeToString()
    assert decoded(kind, message) == (vector, offset, data)


def test_a_decoded_chunk_is_the_message_itself_and_no_copy() -> None:
    message = with_chunk(worker_service_pb2.PullResponse, "weights", 3, b"abcd" * 100).SerializeToString()
    piece = StreamCodec(worker_service_pb2.PullResponse).decode(message)
    assert piece.data.obj is message


@every_kind
def test_a_header_is_encoded_and_decoded(kind: type[Message]) -> None:
    field = kind.DESCRIPTOR.fields_by_number[1]
    message: Any = kind()
    getattr(message, field.name).SetInParent()
    header = getattr(message, field.name)
    for inner in header.DESCRIPTOR.fields:
        if inner.cpp_type == inner.CPPTYPE_STRING and inner.type == inner.TYPE_STRING and not inner.is_repeated:
            setattr(header, inner.name, "name")
    assert StreamCodec(kind).header(header) == message.SerializeToString()
    assert StreamCodec(kind).decode(message.SerializeToString()) == header


@every_vector
@given(
    offset=st.none() | offsets,
    data=some_bytes,
    padding=st.tuples(*[st.integers(0, 9)] * 3),
    order=st.booleans(),
    unknown=st.sampled_from([b"", b"\x78\x01", b"\xa2\x06\x03abc", b"\x7d\x00\x00\x00\x00"]),
    place=st.integers(0, 3),
)
def test_every_legal_encoding_of_a_chunk_is_decoded(
    kind: type[Message],
    vector: str,
    offset: int | None,
    data: bytes,
    padding: tuple[int, int, int],
    order: bool,
    unknown: bytes,
    place: int,
) -> None:
    """Covers any order of fields, padded varints, unknown fields anywhere, and a missing or zero offset."""
    fields = [b"\x12" + varint(len(data), padding[0]) + data]
    if offset is not None:
        fields.insert(order, b"\x08" + varint(offset, padding[1]))
    if place < 2:
        fields.insert(place, unknown)
    inner = b"".join(fields)
    tag = kind.DESCRIPTOR.fields_by_name[vector].number << 3 | 2
    message = bytes([tag]) + varint(len(inner), padding[2]) + inner
    message = unknown + message if place == 2 else message + unknown if place == 3 else message
    # protobuf accepts at most five bytes for a length, and ten for any other number.
    legal = max(len(varint(len(data), padding[0])), len(varint(len(inner), padding[2]))) <= 5
    assert decoded(kind, message) == oracle(kind, message)
    assert decoded(kind, message) == ((vector, offset or 0, data) if legal else DecodeError)


@every_vector
@given(offset=offsets, data=st.binary(min_size=1, max_size=40), change=st.data())
def test_a_damaged_chunk_is_read_as_the_generated_class_reads_it(
    kind: type[Message], vector: str, offset: int, data: bytes, change: st.DataObject
) -> None:
    """Damages a message: it is truncated, extended, doubled, or has one changed byte."""
    message = bytearray(with_chunk(kind, vector, offset, data).SerializeToString())
    how = change.draw(st.sampled_from(["cut", "append", "double", "set"]))
    if how == "cut":
        del message[change.draw(st.integers(0, len(message) - 1)) :]
    elif how == "append":
        message += change.draw(st.binary(max_size=8))
    elif how == "double":
        message = message * 2
    else:
        message[change.draw(st.integers(0, len(message) - 1))] = change.draw(st.integers(0, 255))
    assert decoded(kind, bytes(message)) == oracle(kind, bytes(message))


@every_kind
@settings(max_examples=300)
@given(message=st.binary(max_size=60))
def test_random_bytes_raise_only_decode_errors(kind: type[Message], message: bytes) -> None:
    assert decoded(kind, message) == oracle(kind, message)


@every_kind
@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        b"\x12",
        b"\x12\x05abc",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x00",
        b"\x13",
        b"\x78\x01",
    ],
)
def test_an_invalid_message_is_a_decode_error(kind: type[Message], message: bytes) -> None:
    with pytest.raises(DecodeError):
        StreamCodec(kind).decode(message)
