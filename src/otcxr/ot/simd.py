"""Vectors of 64 bytes for numba: sixteen float32 or eight float64, spelled out so that nothing is left to luck.

LLVM cuts them to what the machine has (AVX-512, AVX2, NEON). numba's own loops over short rows spend most of their
time on alias checks and remainders; and it has no vectorised ``exp`` and ``log`` without Intel's library.

    exp(x) = 2^k sum_i r^i / i!         k = round(x / ln 2),  r = x - k ln 2,  |r| <= ln 2 / 2
    log(x) = e ln 2 + 2 atanh(s)        x = m 2^e,  s = (m - 1) / (m + 1),  sqrt(1/2) <= m < sqrt(2)

Relative error of ``exp`` and absolute error of ``log`` are a few units in the last place (tests/test_ot_native.py).
"""

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

__all__ = ["exp", "fetch_add", "fma", "lanes", "largest", "load", "load_part", "log", "magnitude", "maximum",
           "minimum", "smallest", "splat", "store", "store_part", "total", "where_equal"]  # fmt: skip

_BYTES = 64
_I32 = ir.IntType(32)
_FAST = ("contract",)
_NUMBERS = ("nnan",)


class Vector(types.Type):
    """64 bytes of one floating-point type."""

    def __init__(self, scalar: types.Float) -> None:
        self.scalar = scalar
        self.count = _BYTES * 8 // scalar.bitwidth
        super().__init__(name=f"Vector({scalar})")


VECTORS = {scalar: Vector(scalar) for scalar in (types.float32, types.float64)}


def _element(vector: Vector) -> ir.Type:
    return ir.FloatType() if vector.scalar == types.float32 else ir.DoubleType()


def _ir(vector: Vector) -> ir.VectorType:
    return ir.VectorType(_element(vector), vector.count)


def _all(vector: Vector, value: float) -> ir.Constant:
    return ir.Constant(_ir(vector), [float(value)] * vector.count)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, _ir(vector))


def _call(
    builder: Any, name: str, result: ir.Type, arguments: list[Any], suffix: str, fast: tuple[str, ...] = ()
) -> Any:
    kind = ir.FunctionType(result, [x.type for x in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}")
    return builder.call(function, arguments, fastmath=fast)


def _suffix(vector: Vector) -> str:
    return f"v{vector.count}f{vector.scalar.bitwidth}"


# --- memory: a vector at an offset of a contiguous array, counted in elements ----------------------------------------


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    vector = VECTORS[array_type.dtype]
    return builder.bitcast(builder.gep(data, [offset], inbounds=True), _ir(vector).as_pointer())


def _mask(builder: Any, vector: Vector, count: Any) -> Any:
    """Lanes below ``count``."""
    bits = vector.scalar.bitwidth
    wide = ir.VectorType(ir.IntType(bits), vector.count)
    places = ir.Constant(wide, list(range(vector.count)))
    count = builder.trunc(count, ir.IntType(bits)) if bits < 64 else count
    return builder.icmp_signed("<", places, _broadcast(builder, count, wide))


def _broadcast(builder: Any, scalar: Any, kind: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count))


@intrinsic
def lanes(typing: Any, array: Any) -> Any:
    """Number of elements of a vector of this array's type."""
    count = VECTORS[array.dtype].count
    return types.intp(array), lambda context, builder, signature, arguments: ir.Constant(ir.IntType(64), count)


@intrinsic
def load(typing: Any, array: Any, offset: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        align = array.dtype.bitwidth // 8
        return builder.load(_pointer(context, builder, array, *arguments), align=align)

    return VECTORS[array.dtype](array, types.intp), code


@intrinsic
def store(typing: Any, array: Any, offset: Any, vector: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        align = array.dtype.bitwidth // 8
        builder.store(arguments[2], _pointer(context, builder, array, *arguments[:2]), align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def load_part(typing: Any, array: Any, offset: Any, count: Any, rest: Any) -> Any:
    """The first ``count`` lanes from memory, the scalar ``rest`` in the others."""
    vector = VECTORS[array.dtype]

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, *arguments[:2])
        fill = _broadcast(builder, arguments[3], _ir(vector))
        parts = [pointer, ir.Constant(_I32, array.dtype.bitwidth // 8), _mask(builder, vector, arguments[2]), fill]
        return _call(builder, "masked.load", _ir(vector), parts, f"{_suffix(vector)}.p0")

    return vector(array, types.intp, types.intp, vector.scalar), code


@intrinsic
def store_part(typing: Any, array: Any, offset: Any, vector: Any, count: Any) -> Any:
    """Store only the first ``count`` lanes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, *arguments[:2])
        align = ir.Constant(_I32, array.dtype.bitwidth // 8)
        parts = [arguments[2], pointer, align, _mask(builder, vector, arguments[3])]
        _call(builder, "masked.store", ir.VoidType(), parts, f"{_suffix(vector)}.p0")
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.intp), code


@intrinsic
def fetch_add(typing: Any, counter: Any, amount: Any) -> Any:
    """Add to the first element of an int64 array and return what it was, safely among threads."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(counter)(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, arguments[1], "monotonic")

    return types.int64(counter, types.int64), code


# --- arithmetic ------------------------------------------------------------------------------------------------------


@intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    vector = VECTORS[scalar]
    return vector(scalar), lambda context, builder, signature, arguments: _broadcast(builder, arguments[0], _ir(vector))


def _binary(build: Any) -> Any:
    @intrinsic
    def operation(typing: Any, x: Any, y: Any) -> Any:
        return x(x, y), lambda context, builder, signature, arguments: build(builder, x, *arguments)

    return operation


_add = _binary(lambda builder, vector, x, y: builder.fadd(x, y, flags=_FAST))
_sub = _binary(lambda builder, vector, x, y: builder.fsub(x, y, flags=_FAST))
_mul = _binary(lambda builder, vector, x, y: builder.fmul(x, y, flags=_FAST))
_div = _binary(lambda builder, vector, x, y: builder.fdiv(x, y, flags=_FAST))
# costs and masses are numbers (checked in front): saying so makes each of these a single instruction
maximum = _binary(lambda builder, vector, x, y: _call(builder, "maxnum", x.type, [x, y], _suffix(vector), _NUMBERS))
minimum = _binary(lambda builder, vector, x, y: _call(builder, "minnum", x.type, [x, y], _suffix(vector), _NUMBERS))


def _operator(sign: Any, operation: Any) -> None:
    @overload(sign)
    def implementation(x, y):  # type: ignore[no-untyped-def]  # numba compares the signatures, annotations included
        if isinstance(x, Vector) and x == y:
            return lambda x, y: operation(x, y)
        return None


for _sign, _operation in ((operator.add, _add), (operator.sub, _sub), (operator.mul, _mul), (operator.truediv, _div)):
    _operator(_sign, _operation)


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z."""
    return x(x, x, x), lambda context, builder, signature, arguments: _call(
        builder, "fma", _ir(x), list(arguments), _suffix(x)
    )


@intrinsic
def magnitude(typing: Any, x: Any) -> Any:
    """|x| of every lane."""
    return x(x), lambda context, builder, signature, arguments: _call(
        builder, "fabs", _ir(x), list(arguments), _suffix(x)
    )


@intrinsic
def where_equal(typing: Any, x: Any, y: Any, z: Any, rest: Any) -> Any:
    """z where x equals y, the rest elsewhere."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered("==", *arguments[:2]), *arguments[2:])

    return x(x, x, x, x), code


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """Sum of the lanes, in whatever order is fastest."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = ir.Constant(_element(x), -0.0)
        return _call(builder, "vector.reduce.fadd", _element(x), [start, *arguments], _suffix(x), ("reassoc",))

    return x.scalar(x), code


def _reduction(name: str) -> Any:
    @intrinsic
    def reduction(typing: Any, x: Any) -> Any:
        return x.scalar(x), lambda context, builder, signature, arguments: _call(
            builder, f"vector.reduce.{name}", _element(x), list(arguments), _suffix(x), _NUMBERS
        )

    return reduction


largest = _reduction("fmax")
smallest = _reduction("fmin")


# --- exponential and logarithm ---------------------------------------------------------------------------------------


def _layout(vector: Vector) -> tuple[ir.VectorType, int, int]:
    """Integer vector of the same width, bits of the mantissa, bias of the exponent."""
    bits = vector.scalar.bitwidth
    return ir.VectorType(ir.IntType(bits), vector.count), (23 if bits == 32 else 52), (127 if bits == 32 else 1023)


def _horner(builder: Any, vector: Vector, x: Any, coefficients: list[float]) -> Any:
    """Polynomial with the highest coefficient first."""
    out = _all(vector, coefficients[0])
    for coefficient in coefficients[1:]:
        out = _call(builder, "fma", _ir(vector), [out, x, _all(vector, coefficient)], _suffix(vector))
    return out


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """e^x of every lane; exactly 0 below the smallest normal number, and held at the largest power of e above."""
    single = x.scalar == types.float32
    low, high, degree = (-87.0, 88.0, 7) if single else (-708.0, 709.0, 13)
    # ln 2 in two parts: k times the first is exact
    coarse = 0.693359375 if single else 0.6931471803691238
    fine = math.log(2) - coarse if single else 1.9082149292705877e-10

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (given,) = arguments
        suffix, kind = _suffix(x), _ir(x)
        integer, mantissa, bias = _layout(x)

        def call(name: str, *parts: Any) -> Any:
            return _call(builder, name, kind, list(parts), suffix, _NUMBERS if name.endswith("num") else ())

        held = call("minnum", call("maxnum", given, _all(x, low)), _all(x, high))
        k = call("rint", builder.fmul(held, _all(x, 1 / math.log(2))))
        r = call("fma", k, _all(x, -coarse), held)
        r = call("fma", k, _all(x, -fine), r)
        series = _horner(builder, x, r, [1 / math.factorial(i) for i in range(degree, -1, -1)])
        shifted = builder.add(builder.fptosi(k, integer), ir.Constant(integer, [bias] * x.count))
        power = builder.bitcast(builder.shl(shifted, ir.Constant(integer, [mantissa] * x.count)), kind)
        present = builder.fcmp_ordered(">=", given, _all(x, low))
        return builder.select(present, builder.fmul(series, power), _all(x, 0.0))

    return x(x), code


@intrinsic
def log(typing: Any, x: Any) -> Any:
    """ln x of every lane; zero and denormal numbers count as the smallest normal one."""
    single = x.scalar == types.float32
    tiny, terms = (1.1754943508222875e-38, 5) if single else (2.2250738585072014e-308, 11)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        suffix, kind = _suffix(x), _ir(x)
        integer, mantissa, _ = _layout(x)
        given = _call(builder, "maxnum", kind, [arguments[0], _all(x, tiny)], suffix, _NUMBERS)
        bits = builder.bitcast(given, integer)
        # subtracting the bits of sqrt(1/2) first puts the mantissa into [sqrt(1/2), sqrt(2))
        half = 0x3F3504F3 if single else 0x3FE6A09E667F3BCD
        raised = builder.sub(bits, ir.Constant(integer, [half] * x.count))
        exponent = builder.ashr(raised, ir.Constant(integer, [mantissa] * x.count))
        kept = builder.sub(bits, builder.shl(exponent, ir.Constant(integer, [mantissa] * x.count)))
        m = builder.bitcast(kept, kind)
        s = builder.fdiv(builder.fsub(m, _all(x, 1.0)), builder.fadd(m, _all(x, 1.0)))
        square = builder.fmul(s, s)
        series = _horner(builder, x, square, [2 / (2 * i + 1) for i in range(terms, -1, -1)])
        e = builder.sitofp(exponent, kind)
        return _call(builder, "fma", kind, [e, _all(x, math.log(2)), builder.fmul(s, series)], suffix)

    return x(x), code
