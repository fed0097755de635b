"""Explicit vector code for numba functions: 16 lanes at a time, as LLVM instructions.

A compiler that vectorizes a loop may neither reorder additions nor store around the caches; with fast-math it may, but
it picks a different order for each processor. This module states both, so the same bits come out on every processor:
LLVM maps 16 lanes to one, two or four of the processor's longest vectors.

Each operator on `Floats` and `Bits` emits one instruction, rounded as IEEE 754 says. Only `fused` fuses two operations.
"""

from collections.abc import Callable
from typing import Any, Self, TypeVar

from llvmlite import ir

from deltaserve_server.optimizers._compiled import cgutils, types

LANES = 16
"""Elements in a group: as many float32 as the longest vectors of any processor hold."""

AHEAD = 1024
"""Distance in elements from a group to the data that it prefetches: one page of float32. The processor's own prefetcher
stops at the end of a page."""

_READ_TO_NEAREST_CACHE = 0, 3, 1
"""Arguments of llvm.prefetch: for reading, with the highest locality, into the data cache."""

_I16, _I32, _I64, _FLOAT, _DOUBLE = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()

DOUBLES, WORDS, LONGS = (ir.VectorType(element, LANES) for element in (_DOUBLE, _I32, _I64))
"""LLVM's types of 16 float64, 16 integers of 32 bits, and 16 integers of 64 bits."""

_SUFFIXES = {_FLOAT: "f32", _DOUBLE: "f64", _I16: "i16"}
"""The names of elements in those of LLVM's intrinsics."""


_AnyLanes = TypeVar("_AnyLanes", bound="_Lanes")


class _Lanes:
    """Values of one type, while code is generated: LLVM's value of the whole vector, and its builder.

    There are 16, or 4 or 8 where code works on one part of a group after the other.
    """

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    def splatted(self, operand: Any) -> Self:
        """Returns lanes that all hold a plain number; returns lanes unchanged."""
        if isinstance(operand, type(self)):
            return operand
        return type(self)(self.builder, ir.Constant(self.value.type, [operand] * self.value.type.count))

    def _of(self, element: Any) -> Any:
        """Returns LLVM's type of as many lanes of another element type."""
        return ir.VectorType(element, self.value.type.count)

    def where(self, condition: Any, otherwise: Any) -> Self:
        """Returns these lanes where the condition holds, and the others elsewhere."""
        other = self.splatted(otherwise).value
        return type(self)(self.builder, self.builder.select(condition, self.value, other))


def _operator(instruction: str) -> Callable[[_AnyLanes, Any], _AnyLanes]:
    """Returns a method for an operator, which emits one instruction of LLVM's builder."""

    def emit(lanes: _AnyLanes, operand: Any) -> _AnyLanes:
        others = lanes.splatted(operand)
        return type(lanes)(lanes.builder, getattr(lanes.builder, instruction)(lanes.value, others.value))

    return emit


class Floats(_Lanes):
    """Float32 or float64. A comparison with NaN is false."""

    __add__ = _operator("fadd")
    __sub__ = _operator("fsub")
    __mul__ = _operator("fmul")
    __truediv__ = _operator("fdiv")

    def __lt__(self, other: Any) -> Any:
        return self._compared("<", other)

    def __gt__(self, other: Any) -> Any:
        return self._compared(">", other)

    def fused(self, factor: Any, summand: Any) -> "Floats":
        """Returns self * factor + summand, rounded once (fused multiply-add)."""
        return self._intrinsic("fma", self.splatted(factor), self.splatted(summand))

    def root(self) -> "Floats":
        """Returns the square root."""
        return self._intrinsic("sqrt")

    def nan_to_zero(self) -> Self:
        """Replaces NaN by 0."""
        return self.where(self._compared("ord", self), 0.0)

    def doubles(self) -> "Floats":
        """Converts float32 to float64."""
        return Floats(self.builder, self.builder.fpext(self.value, self._of(_DOUBLE)))

    def bits(self) -> "Bits":
        """Reinterprets float32 as their bits."""
        return Bits(self.builder, self.builder.bitcast(self.value, self._of(_I32)))

    def first(self) -> Any:
        """Returns LLVM's value of the first lane."""
        return self.builder.extract_element(self.value, ir.Constant(_I32, 0))

    def total(self) -> Any:
        """Adds the upper half to the lower half until one sum is left; returns LLVM's value of it."""
        return _reduce(self.builder, self.value, self.builder.fadd)

    def _compared(self, operator: str, other: Any) -> Any:
        """Returns the mask of the lanes for which the comparison holds; an operand of NaN makes it false."""
        return self.builder.fcmp_ordered(operator, self.value, self.splatted(other).value)

    def _intrinsic(self, name: str, *operands: Any) -> "Floats":
        lanes = self.value.type
        kind = ir.FunctionType(lanes, [lanes] * (1 + len(operands)))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.{_suffix(lanes)}")
        values = [operand.value for operand in operands]
        return Floats(self.builder, self.builder.call(function, [self.value, *values]))


class FloatOperations:
    """The operations of the optimizers' definitions, on `Floats`."""

    def fma(self, a: Floats, b: Any, c: Any) -> Floats:
        """Returns a * b + c, rounded once."""
        return a.fused(b, c)

    def sqrt(self, x: Floats) -> Floats:
        """Returns the square root."""
        return x.root()

    def where(self, condition: Any, x: Any, y: Any) -> Floats:
        """Returns x where the condition holds, else y; one of them may be a plain number."""
        chosen: Floats = (x if isinstance(x, Floats) else y.splatted(x)).where(condition, y)
        return chosen


class Bits(_Lanes):
    """Unsigned integers of one width; arithmetic wraps around."""

    __add__ = _operator("add")
    __mul__ = _operator("mul")
    __xor__ = _operator("xor")
    __and__ = _operator("and_")
    __or__ = _operator("or_")
    __lshift__ = _operator("shl")
    __rshift__ = _operator("lshr")

    def compared(self, operator: str, other: Any) -> Any:
        """Returns the mask of the lanes for which the comparison holds."""
        return self.builder.icmp_unsigned(operator, self.value, self.splatted(other).value)

    def at_least(self, other: Any) -> Self:
        """Returns the larger value in each lane."""
        return self.where(self.compared(">", other), other)

    def longs(self) -> "Bits":
        """Extends to 64 bits with zeros."""
        return Bits(self.builder, self.builder.zext(self.value, self._of(_I64)))

    def words(self) -> "Bits":
        """Extends 16 bits to 32 with zeros."""
        return Bits(self.builder, self.builder.zext(self.value, self._of(_I32)))

    def shorts(self) -> "Bits":
        """Keeps the lower 16 bits."""
        return Bits(self.builder, self.builder.trunc(self.value, self._of(_I16)))

    def float16_to_floats(self) -> Floats:
        """Reinterprets 16 bits as float16 and converts to float32, with the processor's own instruction."""
        halves = self.builder.bitcast(self.value, self._of(ir.HalfType()))
        return Floats(self.builder, self.builder.fpext(halves, self._of(_FLOAT)))

    def floats(self) -> Floats:
        """Reinterprets 32 bits as float32."""
        return Floats(self.builder, self.builder.bitcast(self.value, self._of(_FLOAT)))

    def total(self) -> Any:
        """Returns LLVM's value of the sum of all lanes."""
        return _reduce(self.builder, self.value, self.builder.add)

    def largest(self) -> Any:
        """Returns LLVM's value of the largest lane."""
        builder = self.builder
        return _reduce(builder, self.value, lambda x, y: builder.select(builder.icmp_unsigned(">", x, y), x, y))


class Accumulator:
    """Lanes whose value carries over from one group of elements to the next, starting with `initial`."""

    def __init__(self, initial: Any) -> None:
        self._kind, self._builder = type(initial), initial.builder
        # A stack slot, which LLVM turns into registers: generated loops have no other mutable variables.
        self._slot = cgutils.alloca_once_value(initial.builder, initial.value)

    @property
    def lanes(self) -> Any:
        """The current value."""
        return self._kind(self._builder, self._builder.load(self._slot))

    @lanes.setter
    def lanes(self, lanes: _Lanes) -> None:
        self._builder.store(lanes.value, self._slot)


def branched(builder: Any, condition: Any, then: Callable[[], _AnyLanes], otherwise: Callable[[], _AnyLanes]) -> Any:
    """Generates a branch on one condition for all lanes; returns the lanes that the taken side computes."""
    with builder.if_else(condition) as sides:
        with sides[0]:
            first, first_block = then(), builder.block
        with sides[1]:
            second, second_block = otherwise(), builder.block
    merged = builder.phi(first.value.type)
    merged.add_incoming(first.value, first_block)
    merged.add_incoming(second.value, second_block)
    return type(first)(builder, merged)


def zeros(kind: Any) -> Any:
    """Returns LLVM's constant of a vector type with all lanes 0."""
    return ir.Constant(kind, None)


def splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """Copies one of LLVM's scalar values into all lanes."""
    first = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(_I32, 0)
    )
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def part(builder: Any, value: Any, first: int, lanes: int) -> Any:
    """Returns LLVM's value of some of the lanes of a vector."""
    return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, lanes), [*range(first, first + lanes)]))


def joined(builder: Any, parts: list[Any]) -> Any:
    """Returns LLVM's value of the lanes of several vectors of one type, one after the other: 1, 2, 4, ... of them."""
    while len(parts) > 1:
        indices = ir.Constant(ir.VectorType(_I32, 2 * parts[0].type.count), [*range(2 * parts[0].type.count)])
        parts = [builder.shuffle_vector(low, high, indices) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def lanes_of_a_vector(context: Any) -> int:
    """Returns how many float32 the longest vectors of the processor hold."""
    features = context.codegen().magic_tuple()[2].split(",")
    return 16 if "+avx512f" in features else 8 if "+avx2" in features else 4


def _suffix(kind: Any) -> str:
    return f"v{kind.count}{_SUFFIXES[kind.element]}"


def floats_from_bfloat16(bits: Bits) -> Floats:
    """Converts bfloat16, given as 16 bits, to float32."""
    return (bits.words() << 16).floats()


def floats_from_float16(bits: Bits) -> Floats:
    """Converts float16, given as 16 bits, to float32 with instructions that every processor has."""
    words = bits.words()
    shifted = (words & 0x7FFF) << 13
    # The exponent's bias grows by 127 - 15 for a normal number, and by 255 - 31 for infinity and NaN. A denormal number
    # becomes the fraction of a number with the exponent of 2**-14, and subtracting 2**-14 leaves its value.
    normal = (shifted + (112 << 23)).floats()
    denormal = ((shifted + (113 << 23)).floats()) - 2.0**-14
    special = (shifted + (224 << 23)).floats()
    magnitude = special.where(shifted.compared(">=", 0x7C00 << 13), normal)
    magnitude = denormal.where(shifted.compared("<", 0x0400 << 13), magnitude)
    return (magnitude.bits() | ((words & 0x8000) << 16)).floats()


def _widening(context: Any, dtype: Any) -> Callable[[Bits], Floats] | None:
    """Returns the conversion of an element type to float32, or None for float32 itself."""
    if dtype == types.float32:
        return None
    if dtype == types.uint16:
        return floats_from_bfloat16
    triple, _, features = context.codegen().magic_tuple()
    # Without the instruction, LLVM would call a runtime function that numba does not link.
    return Bits.float16_to_floats if "+f16c" in features or triple.startswith("aarch64") else floats_from_float16


class Memory:
    """A vector in memory: float32, float16 as int16, or bfloat16 as uint16.

    Args:
        context: Numba's target context.
        builder: LLVM's builder, which appends the instructions.
        kind: Numba's type of the array.
        array: LLVM's value of the array.
        lanes: Elements that are loaded and stored at a time: 16, or fewer to work on a part of a group.
    """

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any, lanes: int = LANES) -> None:
        fields = context.make_array(kind)(context, builder, array)
        self.size = fields.nitems
        self._builder = builder
        self._data = fields.data
        self._widen = _widening(context, kind.dtype)
        self._align = kind.dtype.bitwidth // 8 if kind.aligned else 1
        self._type = ir.VectorType(_FLOAT if kind.dtype == types.float32 else _I16, lanes)

    def load(self, at: Any, mask: Any) -> Floats:
        """Loads values from element `at` on as float32, and 0 where the mask is false; None means no mask."""
        place, align = self._place(at), ir.Constant(_I32, self._align)
        if mask is None:
            loaded = self._builder.load(place, align=self._align)
        else:
            function = self._masked("load", self._type, [place.type, _I32, mask.type, self._type])
            loaded = self._builder.call(function, [place, align, mask, zeros(self._type)])
        return self._widen(Bits(self._builder, loaded)) if self._widen else Floats(self._builder, loaded)

    def splats(self, count: int) -> list[Floats]:
        """Returns the first elements of a vector of float32, each in all lanes."""
        places = (self._builder.gep(self._data, [_long(k)]) for k in range(count))
        lanes = self._type.count
        return [Floats(self._builder, splat(self._builder, self._builder.load(place), lanes)) for place in places]

    def store(self, at: Any, values: _Lanes, mask: Any) -> None:
        """Stores values from element `at` on, without the lanes that a mask excludes."""
        if mask is None:
            self._builder.store(values.value, self._place(at), align=self._align)
            return
        function = self._masked("store", ir.VoidType(), [self._type, self._place(at).type, _I32, mask.type])
        self._builder.call(function, [values.value, self._place(at), ir.Constant(_I32, self._align), mask])

    def stream(self, at: Any, values: _Lanes) -> None:
        """Stores values around the caches. Their address must be a multiple of their size."""
        stored = self._builder.store(values.value, self._place(at), align=4 * values.value.type.count)
        stored.set_metadata("nontemporal", self._builder.module.add_metadata([ir.Constant(_I32, 1)]))

    def prefetch(self, at: Any) -> None:
        """Prefetches the data `AHEAD` elements further on. An address beyond the end is harmless."""
        place = self._builder.gep(self._data, [self._builder.add(at, _long(AHEAD))])
        pointer = self._builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self._builder.module, kind, "llvm.prefetch.p0")
        self._builder.call(function, [pointer, *(ir.Constant(_I32, x) for x in _READ_TO_NEAREST_CACHE)])

    def starts_at_cache_line(self) -> Any:
        """Returns LLVM's condition that the vector starts at a multiple of 64 bytes."""
        address = self._builder.ptrtoint(self._data, _I64)
        return self._builder.icmp_unsigned("==", self._builder.and_(address, ir.Constant(_I64, 63)), _long(0))

    def _place(self, at: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(self._data, [at]), self._type.as_pointer())

    def _masked(self, name: str, result: Any, parameters: list[Any]) -> Any:
        kind = ir.FunctionType(result, parameters)
        return cgutils.get_or_insert_function(
            self._builder.module, kind, f"llvm.masked.{name}.{_suffix(self._type)}.p0"
        )


def each_group(builder: Any, size: Any, body: Callable[[Any, Any], None], head: Any = None) -> None:
    """Generates a loop over a vector, 16 elements at a time, in ascending order.

    Args:
        builder: LLVM's builder, which appends the instructions.
        size: LLVM's value of the vector's number of elements, 64 bits.
        body: Generates the code of one group from its first element and its mask, which is None for a whole group.
        head: LLVM's value of the number of lanes of the first group that lie before the vector, 0 to 15, so that lanes
            stay tied to positions in a larger vector. None means 0.
    """
    lanes = ir.Constant(LONGS, list(range(LANES)))

    def partial_group(at: Any) -> None:
        places = builder.add(splat(builder, at), lanes)
        # The comparison is unsigned, so a negative index counts as out of range.
        body(at, builder.icmp_unsigned("<", places, splat(builder, size)))

    first = _long(0)
    if head is not None:
        is_partial = builder.icmp_unsigned("!=", head, first)
        with builder.if_then(is_partial):
            partial_group(builder.neg(head))
        first = builder.select(is_partial, builder.sub(_long(LANES), head), first)
    remaining = builder.sub(size, first)
    # Negative where the vector ends inside its first, partial group.
    remaining = builder.select(builder.icmp_signed("<", remaining, _long(0)), _long(0), remaining)
    end = builder.add(first, builder.and_(remaining, _long(-LANES)))
    with cgutils.for_range_slice(builder, first, end, _long(LANES), _I64, inc=True) as (at, _):
        body(at, None)
    with builder.if_then(builder.icmp_signed("<", end, size)):
        partial_group(end)


def _long(value: int) -> Any:
    return ir.Constant(_I64, value)


def _reduce(builder: Any, value: Any, operation: Callable[[Any, Any], Any]) -> Any:
    """Combines the upper half with the lower half until one element is left."""
    half = LANES // 2
    while half:
        low, high = (
            builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, half), [*range(first, first + half)]))
            for first in (0, half)
        )
        value = operation(low, high)
        half //= 2
    return builder.extract_element(value, ir.Constant(_I32, 0))
