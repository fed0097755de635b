"""Sums of squares in numba, float64, beside float32 code: vector code whose order of additions is written out.

A compiler may not reorder additions, and so makes scalar code of a plain sum; where it may (fast-math), it takes an
order of its own on every processor, and cuts a push of odd length as it likes. So the vectors are written out here.
The square of a float32 is exact in float64, and that of any finite one is finite there.
"""

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, register_jitable

from deltaserve_server.adadelta._compiled import types

LANES = 16
"""Sums that are kept side by side: two of the longest vectors that processors have."""

BLOCK = 256
"""Elements that are added up in straight-line code, their sums in registers."""

_CHAINS = 2
"""Vectors of sums of which one addition need not wait for the other's."""

_FLOATS, _DOUBLES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.DoubleType(), LANES)


@register_jitable
def add_squares(values: Any, start: Any, squares: Any) -> None:
    """Adds each value's square to a lane; for use in compiled code.

    The element at absolute position p goes to lane p % 16, in ascending order of p.

    Args:
        values: float32 [n], at any byte.
        start: The position of the first one, uint64.
        squares: The lanes, float64 [16].
    """
    lane = np.int64(start % np.uint64(LANES))
    head = min(values.size, (LANES - lane) % LANES)
    for i in range(head):
        squares[lane + i] += np.float64(values[i]) * np.float64(values[i])
    at = head
    while at + BLOCK <= values.size:
        _add_block(values, at, squares)
        at += BLOCK
    while at + LANES <= values.size:
        _add_group(values, at, squares)
        at += LANES
    for i in range(at, values.size):
        squares[i - at] += np.float64(values[i]) * np.float64(values[i])


@register_jitable
def squared_distance(one: Any, other: Any) -> Any:
    """Adds up the squares, in float64, of the differences, in float32; for use in compiled code.

    The order of the additions depends on the length alone.

    Args:
        one: float32 [n].
        other: float32 [n].

    Returns:
        The sum, float64.
    """
    total = 0.0
    at = 0
    while at + BLOCK <= one.size:
        total += _block_distance(one, other, at)
        at += BLOCK
    for i in range(at, one.size):
        difference = np.float64(one[i] - other[i])
        total += difference * difference
    return total


def _type_add(elements: int) -> Any:
    def typed(_context: Any, values: Any, at: Any, squares: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = _data(context, builder, signature.args[0], arguments[0])
            lanes = builder.bitcast(_data(context, builder, signature.args[2], arguments[2]), _DOUBLES.as_pointer())
            sums = builder.load(lanes, align=8)
            for group in range(0, elements, LANES):
                wide = builder.fpext(_values(builder, data, arguments[1], group), _DOUBLES)
                sums = builder.fadd(sums, builder.fmul(wide, wide))
            builder.store(sums, lanes, align=8)
            return context.get_dummy_value()

        return types.void(values, types.int64, squares), generate

    return typed


def _type_distance(_context: Any, one: Any, other: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = [_data(context, builder, signature.args[k], arguments[k]) for k in range(2)]
        chains = [ir.Constant(_DOUBLES, [0.0] * LANES)] * _CHAINS
        for group in range(0, BLOCK, LANES):
            difference = builder.fsub(*(_values(builder, pointer, arguments[2], group) for pointer in data))
            wide = builder.fpext(difference, _DOUBLES)
            chains = [*chains[1:], builder.fadd(chains[0], builder.fmul(wide, wide))]
        return _folded(builder, functools.reduce(builder.fadd, chains))

    return types.float64(one, other, types.int64), generate


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


def _values(builder: Any, data: Any, at: Any, offset: int) -> Any:
    """Loads 16 float32 at any byte."""
    index = builder.add(at, ir.Constant(at.type, offset))
    pointer = builder.bitcast(builder.gep(data, [index]), _FLOATS.as_pointer())
    return builder.load(pointer, align=1)


def _folded(builder: Any, sums: Any) -> Any:
    """Adds the upper half to the lower one until one sum is left."""
    half = LANES // 2
    while half:
        low, high = (
            builder.shuffle_vector(
                sums, sums, ir.Constant(ir.VectorType(ir.IntType(32), half), [*range(first, first + half)])
            )
            for first in (0, half)
        )
        sums = builder.fadd(low, high)
        half //= 2
    return builder.extract_element(sums, ir.Constant(ir.IntType(32), 0))


_add_block: Any = intrinsic(_type_add(BLOCK))
_add_group: Any = intrinsic(_type_add(LANES))
_block_distance: Any = intrinsic(_type_distance)
