"""Vector code that is written out: 16 lanes at a time, as LLVM's own instructions, to be called in functions of numba.

A compiler that makes vector code of a loop may not reorder additions, nor store around the caches; where it may
(fast-math), it takes an order of its own on every processor. Here both are said, and so the same bits come out on each
of them: LLVM makes of 16 lanes what the processor's longest vectors are, one, two or four of them.

Operators on `Floats` and `Bits` are instructions, each rounded as IEEE 754 says, and none is fused but `fused`.
"""

from collections.abc import Callable
from typing import Any, Self

from llvmlite import ir

from deltaserve_server.adadelta._compiled import cgutils, types

LANES = 16
"""Elements that are worked on side by side: one of the longest vectors that processors have."""

AHEAD = 1024
"""Elements between what is worked on and what is fetched: a page of memory of float32. What the processor fetches by
itself ends with the page."""

_READ_TO_NEAREST_CACHE = 0, 3, 1
"""LLVM's way to say this: not to be written, to be kept, data."""

_I16, _I32, _I64, _FLOAT, _DOUBLE = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()

DOUBLES, WORDS, LONGS = (ir.VectorType(element, LANES) for element in (_DOUBLE, _I32, _I64))
"""Types of 16 float64, 16 unsigned integers of 32 bits, and 16 of 64."""

_FLOATS, _SHORTS, _HALVES = (ir.VectorType(element, LANES) for element in (_FLOAT, _I16, ir.HalfType()))
_SUFFIXES = {_FLOATS: "v16f32", DOUBLES: "v16f64", _SHORTS: "v16i16"}
"""What they are called in the names of LLVM's functions."""


class _Lanes:
    """Sixteen values of one type.

    Args:
        builder: Where instructions go.
        value: What they are to LLVM.
    """

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    def _made(self, operation: str, *operands: Any) -> Self:
        others = [self.splatted(operand).value for operand in operands]
        return type(self)(self.builder, getattr(self.builder, operation)(self.value, *others))

    def splatted(self, operand: Any) -> Self:
        """Puts a plain number into each lane; lanes stay what they are."""
        if isinstance(operand, type(self)):
            return operand
        return type(self)(self.builder, ir.Constant(self.value.type, [operand] * LANES))

    def where(self, condition: Any, otherwise: Any) -> Self:
        """Keeps the lanes in which the condition holds."""
        other = self.splatted(otherwise).value
        return type(self)(self.builder, self.builder.select(condition, self.value, other))


class Floats(_Lanes):
    """Sixteen float32 or float64; comparisons with a NaN are false."""

    def __add__(self, other: Any) -> Self:
        return self._made("fadd", other)

    def __sub__(self, other: Any) -> Self:
        return self._made("fsub", other)

    def __mul__(self, other: Any) -> Self:
        return self._made("fmul", other)

    def __truediv__(self, other: Any) -> Self:
        return self._made("fdiv", other)

    def compared(self, operator: str, other: Any) -> Any:
        """Returns a condition: whether each lane compares so with the other, and neither is a NaN."""
        return self.builder.fcmp_ordered(operator, self.value, self.splatted(other).value)

    def fused(self, factor: Any, summand: Any) -> "Floats":
        """Returns self * factor + summand, rounded once."""
        return self._called("fma", self.splatted(factor), self.splatted(summand))

    def root(self) -> "Floats":
        """Returns the square root."""
        return self._called("sqrt")

    def at_most(self, limit: float) -> Self:
        """Cuts off what is larger; a NaN stays."""
        return self.splatted(limit).where(self.compared(">", limit), self)

    def bounded(self, limit: float) -> Self:
        """Cuts off what is of a larger magnitude; a NaN stays."""
        cut = self.at_most(limit)
        return self.splatted(-limit).where(cut.compared("<", -limit), cut)

    def numbers(self) -> Self:
        """Makes 0 of every NaN."""
        return self.where(self.compared("ord", self), 0.0)

    def doubles(self) -> "Floats":
        """Makes float64 of float32."""
        return Floats(self.builder, self.builder.fpext(self.value, DOUBLES))

    def bits(self) -> "Bits":
        """Returns the bits of float32."""
        return Bits(self.builder, self.builder.bitcast(self.value, WORDS))

    def total(self) -> Any:
        """Adds the upper half to the lower one until one sum is left; returns LLVM's value of it."""
        return _folded(self.builder, self.value, self.builder.fadd)

    def _called(self, name: str, *operands: Any) -> "Floats":
        lanes = self.value.type
        kind = ir.FunctionType(lanes, [lanes] * (1 + len(operands)))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.{_SUFFIXES[lanes]}")
        values = [operand.value for operand in operands]
        return Floats(self.builder, self.builder.call(function, [self.value, *values]))


class Bits(_Lanes):
    """Sixteen unsigned integers, modulo 2 to the number of their bits."""

    def __add__(self, other: Any) -> Self:
        return self._made("add", other)

    def __mul__(self, other: Any) -> Self:
        return self._made("mul", other)

    def __xor__(self, other: Any) -> Self:
        return self._made("xor", other)

    def __and__(self, other: Any) -> Self:
        return self._made("and_", other)

    def __or__(self, other: Any) -> Self:
        return self._made("or_", other)

    def __lshift__(self, other: Any) -> Self:
        return self._made("shl", other)

    def __rshift__(self, other: Any) -> Self:
        return self._made("lshr", other)

    def compared(self, operator: str, other: Any) -> Any:
        """Returns a condition: whether each lane compares so with the other."""
        return self.builder.icmp_unsigned(operator, self.value, self.splatted(other).value)

    def at_least(self, other: Any) -> Self:
        """Returns the larger of the two."""
        return self.where(self.compared(">", other), other)

    def longs(self) -> "Bits":
        """Makes integers of 64 bits of these."""
        return Bits(self.builder, self.builder.zext(self.value, LONGS))

    def words(self) -> "Bits":
        """Makes integers of 32 bits of 16."""
        return Bits(self.builder, self.builder.zext(self.value, WORDS))

    def shorts(self) -> "Bits":
        """Drops all but 16 bits."""
        return Bits(self.builder, self.builder.trunc(self.value, _SHORTS))

    def halves(self) -> Floats:
        """Takes 16 bits for a float16's, and makes float32 of them."""
        return Floats(self.builder, self.builder.fpext(self.builder.bitcast(self.value, _HALVES), _FLOATS))

    def floats(self) -> Floats:
        """Takes 32 bits for a float32's."""
        return Floats(self.builder, self.builder.bitcast(self.value, _FLOATS))

    def total(self) -> Any:
        """Adds the lanes up; returns LLVM's value of the sum."""
        return _folded(self.builder, self.value, self.builder.add)

    def largest(self) -> Any:
        """Returns LLVM's value of the largest lane."""
        builder = self.builder
        return _folded(builder, self.value, lambda x, y: builder.select(builder.icmp_unsigned(">", x, y), x, y))


class StoredModel:
    """Lanes that are kept from one group of elements to the next.

    Args:
        first: What they are before the first one.
    """

    def __init__(self, first: Any) -> None:
        self._kind, self._builder = type(first), first.builder
        self._place = cgutils.alloca_once_value(first.builder, first.value)

    @property
    def lanes(self) -> Any:
        """What they are now."""
        return self._kind(self._builder, self._builder.load(self._place))

    @lanes.setter
    def lanes(self, lanes: _Lanes) -> None:
        self._builder.store(lanes.value, self._place)


def zeros(kind: Any) -> Any:
    """Returns LLVM's constant of that type whose lanes are 0."""
    return ir.Constant(kind, None)


def splat(builder: Any, value: Any) -> Any:
    """Puts one of LLVM's values into each lane."""
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(WORDS, [0] * LANES))


def floats_from_bfloat16(bits: Bits) -> Floats:
    """Widens 16 bits that are those of a bfloat16."""
    return (bits.words() << 16).floats()


def floats_from_float16(bits: Bits) -> Floats:
    """Widens 16 bits that are those of a float16, with what every processor has."""
    words = bits.words()
    shifted = (words & 0x7FFF) << 13
    # The exponent of a normal number differs by 127 - 15, that of an infinity or NaN by 255 - 31. A denormal number is
    # put behind the leading 1 of 2**-14, which is then taken off it.
    normal = (shifted + (112 << 23)).floats()
    denormal = ((shifted + (113 << 23)).floats()) - 2.0**-14
    special = (shifted + (224 << 23)).floats()
    made = special.where(shifted.compared(">=", 0x7C00 << 13), normal)
    made = denormal.where(shifted.compared("<", 0x0400 << 13), made)
    return (made.bits() | ((words & 0x8000) << 16)).floats()


def _widening(context: Any, dtype: Any) -> Callable[[Bits], Floats] | None:
    """Returns what makes float32 of a format of 16 bits; None for float32 itself."""
    if dtype == types.float32:
        return None
    if dtype == types.uint16:
        return floats_from_bfloat16
    triple, _, features = context.codegen().magic_tuple()
    # Elsewhere LLVM would call a function that need not be there.
    return Bits.halves if "+f16c" in features or triple.startswith("aarch64") else floats_from_float16


class Memory:
    """A vector in memory: float32, float16 as signed integers of 16 bits, or bfloat16 as unsigned ones.

    Args:
        context: Numba's.
        builder: Where instructions go.
        kind: Numba's type of the array.
        array: LLVM's value of it.
    """

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        made = context.make_array(kind)(context, builder, array)
        self.size = made.nitems
        self._builder = builder
        self._data = made.data
        self._widened = _widening(context, kind.dtype)
        self._align = kind.dtype.bitwidth // 8 if kind.aligned else 1
        self._type = _FLOATS if kind.dtype == types.float32 else _SHORTS

    def load(self, at: Any, mask: Any) -> Floats:
        """Returns 16 values from element `at` on, as float32; 0 where the mask, if there is one, does not hold."""
        loaded = self._loaded(at, mask)
        return self._widened(Bits(self._builder, loaded)) if self._widened else Floats(self._builder, loaded)

    def store(self, at: Any, values: _Lanes, mask: Any) -> None:
        """Writes 16 values from element `at` on; only those where the mask, if there is one, holds."""
        if mask is None:
            self._builder.store(values.value, self._place(at), align=self._align)
            return
        function = self._masked("store", ir.VoidType(), [self._type, self._place(at).type, _I32, mask.type])
        self._builder.call(function, [values.value, self._place(at), ir.Constant(_I32, self._align), mask])

    def stream(self, at: Any, values: _Lanes) -> None:
        """Writes 16 values around the caches; the address is a multiple of 64."""
        stored = self._builder.store(values.value, self._place(at), align=64)
        stored.set_metadata("nontemporal", self._builder.module.add_metadata([ir.Constant(_I32, 1)]))

    def fetch(self, at: Any) -> None:
        """Has the processor fetch what lies `AHEAD` elements further on, which may be beyond the end."""
        place = self._builder.gep(self._data, [self._builder.add(at, _long(AHEAD))])
        pointer = self._builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self._builder.module, kind, "llvm.prefetch.p0")
        self._builder.call(function, [pointer, *(ir.Constant(_I32, x) for x in _READ_TO_NEAREST_CACHE)])

    def at_line(self) -> Any:
        """Returns whether the vector begins at a multiple of 64 bytes."""
        address = self._builder.ptrtoint(self._data, _I64)
        return self._builder.icmp_unsigned("==", self._builder.and_(address, ir.Constant(_I64, 63)), _long(0))

    def _loaded(self, at: Any, mask: Any) -> Any:
        if mask is None:
            return self._builder.load(self._place(at), align=self._align)
        function = self._masked("load", self._type, [self._place(at).type, _I32, mask.type, self._type])
        return self._builder.call(function, [self._place(at), ir.Constant(_I32, self._align), mask, zeros(self._type)])

    def _place(self, at: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(self._data, [at]), self._type.as_pointer())

    def _masked(self, name: str, result: Any, parameters: list[Any]) -> Any:
        kind = ir.FunctionType(result, parameters)
        return cgutils.get_or_insert_function(
            self._builder.module, kind, f"llvm.masked.{name}.{_SUFFIXES[self._type]}.p0"
        )


def each_group(builder: Any, size: Any, body: Callable[[Any, Any], None], head: Any = None) -> None:
    """Goes through a vector 16 elements at a time, in ascending order.

    Args:
        builder: Where instructions go.
        size: Elements of the vector; LLVM's value, 64 bits.
        body: Makes the code for the group that begins at an element, with a mask where it is not whole, else None.
        head: How many elements of the first group lie before the vector, 0 to 15; likewise. None means 0.
    """
    lanes = ir.Constant(LONGS, list(range(LANES)))

    def edge(at: Any) -> None:
        places = builder.add(splat(builder, at), lanes)
        # Unsigned: what lies before the vector is beyond its end.
        body(at, builder.icmp_unsigned("<", places, splat(builder, size)))

    first = _long(0)
    if head is not None:
        cut = builder.icmp_unsigned("!=", head, first)
        with builder.if_then(cut):
            edge(builder.neg(head))
        first = builder.select(cut, builder.sub(_long(LANES), head), first)
    left = builder.sub(size, first)
    left = builder.select(builder.icmp_signed("<", left, _long(0)), _long(0), left)
    end = builder.add(first, builder.and_(left, _long(-LANES)))
    with cgutils.for_range_slice(builder, first, end, _long(LANES), _I64, inc=True) as (at, _):
        body(at, None)
    with builder.if_then(builder.icmp_signed("<", end, size)):
        edge(end)


def _long(value: int) -> Any:
    return ir.Constant(_I64, value)


def _folded(builder: Any, value: Any, operation: Callable[[Any, Any], Any]) -> Any:
    """Puts the upper half and the lower one together until one is left."""
    half = LANES // 2
    while half:
        low, high = (
            builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, half), [*range(first, first + half)]))
            for first in (0, half)
        )
        value = operation(low, high)
        half //= 2
    return builder.extract_element(value, ir.Constant(_I32, 0))
