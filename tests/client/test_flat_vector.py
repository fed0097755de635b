"""FlatVector: several arrays as one vector, read and written in place."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaserve._common import flat_vector
from deltaserve._common.flat_vector import FlatVector, contiguous

Arrays = list[NDArray[np.float32]]

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=8)
chunk_sizes = st.integers(1, 40)


def counted(shapes: list[tuple[int, ...]]) -> Arrays:
    """Returns arrays of these shapes, numbered consecutively across all elements."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum(sizes)
    return [
        np.arange(end - size, end, dtype=np.float32).reshape(shape)
        for shape, size, end in zip(shapes, sizes, ends, strict=True)
    ]


def joined(parts: list[memoryview]) -> NDArray[np.float32]:
    return np.frombuffer(b"".join(parts), "<f4")


@given(shapes=shapes, size=chunk_sizes, data=st.data())
def test_chunks_are_the_arrays_in_order_without_the_absent_ones(
    shapes: list[tuple[int, ...]], size: int, data: st.DataObject
) -> None:
    arrays = counted(shapes)
    absent = data.draw(st.sets(st.integers(0, len(arrays) - 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_vector, "CHUNK_ELEMENTS", size)
        vector = FlatVector(arrays)
        got: list[float] = []
        for offset, parts in vector.chunks(absent):
            values = joined(parts)
            assert 1 <= values.size <= size
            assert values[0] == offset, "an element's value is its place in the flat vector"
            got += values.tolist()
    present = [array for index, array in enumerate(arrays) if index not in absent]
    assert got == [value for array in present for value in array.reshape(-1).tolist()]
    assert vector.size == sum(array.size for array in arrays)


@given(shapes=shapes, size=chunk_sizes)
def test_written_chunks_are_read_back(shapes: list[tuple[int, ...]], size: int) -> None:
    source, target = counted(shapes), [np.full(shape, -1, np.float32) for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_vector, "CHUNK_ELEMENTS", size)
        sink = FlatVector(target)
        for offset, parts in FlatVector(source).chunks():
            sink.write(offset, memoryview(b"".join(parts)))
    for written, expected in zip(target, source, strict=True):
        np.testing.assert_array_equal(written, expected)


@given(shapes=shapes, offset=st.integers(0, 300), count=st.integers(0, 300))
def test_a_write_changes_its_elements_and_no_other(shapes: list[tuple[int, ...]], offset: int, count: int) -> None:
    """A write may also exceed the vector, because the layout can grow after the worker joined."""
    arrays = [np.full(shape, -1, np.float32) for shape in shapes]
    vector = FlatVector(arrays)
    vector.write(offset, memoryview(np.arange(offset, offset + count, dtype="<f4").tobytes()))
    expected = np.full(vector.size, -1, np.float32)
    stop = min(offset + count, vector.size)
    expected[offset:stop] = np.arange(offset, max(stop, offset))
    got = np.concatenate([array.reshape(-1) for array in arrays])
    np.testing.assert_array_equal(got, expected)


def test_a_chunk_is_a_view_of_the_array() -> None:
    array = np.zeros(3, np.float32)
    ((_, parts),) = FlatVector([array]).chunks()
    array[:] = 7
    assert joined(parts).tolist() == [7, 7, 7]


def test_a_chunk_is_a_mebibyte_so_that_it_fits_into_grpcs_default_message() -> None:
    sizes = [sum(part.nbytes for part in parts) for _, parts in FlatVector([np.zeros(600_000, np.float32)]).chunks()]
    assert sizes == [1 << 20, 1 << 20, 600_000 * 4 - (2 << 20)]


def test_no_arrays_and_empty_arrays_make_no_chunk() -> None:
    assert list(FlatVector([]).chunks()) == []
    assert list(FlatVector([np.zeros((0, 3), np.float32), np.zeros(0, np.float32)]).chunks()) == []


def test_read_only_memory_can_be_sent() -> None:
    array = np.ones(4, np.float32)
    array.flags.writeable = False
    ((_, parts),) = FlatVector([array]).chunks()
    assert joined(parts).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((2, 3), np.float32), np.float32(3), np.zeros((3, 0), np.float32), np.ones((4, 4))[::2, ::-1],
        np.arange(6).reshape(2, 3).T, [1, 2.5], 7, np.array([True, False]), np.ones(3, ">f4"), np.ones(3, np.float16),
    ],
)  # fmt: skip
def test_contiguous_keeps_values_and_shape(values: Any) -> None:
    array = contiguous(values)
    assert array.shape == np.shape(values)
    assert array.dtype == np.dtype("<f4")
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, np.asarray(values, np.float32))


def test_contiguous_avoids_a_copy_if_possible() -> None:
    array = np.zeros((2, 3), np.float32)
    assert contiguous(array) is array


@pytest.mark.parametrize("values", [np.ones(2, complex), ["a"], [object()], np.array(["2020-01-01"], "datetime64[D]")])
def test_contiguous_accepts_only_real_numbers(values: Any) -> None:
    with pytest.raises(TypeError, match="expected real numbers, got"):
        contiguous(values)
