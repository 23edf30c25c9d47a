"""What numba does not make vectors of by itself: sums of look-ups, eight side by side."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range
from numba.extending import intrinsic

__all__ = ["LANES", "add_rows", "keep_lower"]

LANES = 8


_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)


def _arrays(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    return [
        context.make_array(kind)(context, builder, value=value)
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


_variable: Any = alloca_once_value


def _load(builder: Any, place: Any, vector: ir.VectorType) -> Any:
    return builder.load(builder.bitcast(place, vector.as_pointer()), align=4)


def _store(builder: Any, value: Any, place: Any) -> None:
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=4)


def _add_rows(typing: Any, table: Any, rows: Any, weights: Any, total: Any) -> Any:
    """``total[lane] = sum_k table[rows[k], lane] * weights[k]``, added in the order of k.

    Every product and every sum rounds to float32: these are plain ``fmul`` and ``fadd`` of LLVM
    without flags, on vectors of eight.

    Parameters
    ----------
    table : float32 array, shape (rows, 8)
    rows : unsigned array, shape (terms,)
    weights : float32 array, shape (terms,)
    total : float32 array, shape (8,)
        Written. All arrays are contiguous.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = _arrays(context, builder, signature, arguments)
        table_at, rows_at, weights_at, total_at = (array.data for array in arrays)
        terms = builder.extract_value(arrays[1].shape, 0)
        vector, whole = _FLOATS, _INTEGERS
        anything, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(whole, [0] * LANES)
        total_now = _variable(builder, ir.Constant(vector, [0.0] * LANES))
        with for_range(builder, terms) as loop:
            row = builder.zext(builder.load(builder.gep(rows_at, [loop.index])), loop.index.type)
            place = builder.gep(table_at, [builder.mul(row, row.type(LANES))])
            values = _load(builder, place, vector)
            weight = builder.load(builder.gep(weights_at, [loop.index]))
            first = builder.insert_element(anything, weight, ir.IntType(32)(0))
            values = builder.fmul(values, builder.shuffle_vector(first, anything, zeros))
            builder.store(builder.fadd(builder.load(total_now), values), total_now)
        _store(builder, builder.load(total_now), total_at)
        return context.get_dummy_value()

    return types.void(table, rows, weights, total), generate


def _keep_lower(typing: Any, total: Any, lowest: Any, where: Any, number: Any) -> Any:
    """In each lane where ``total < lowest``: ``lowest = total`` and ``where = number``.

    Parameters
    ----------
    total : float32 array, shape (8,)
    lowest : float32 array, shape (8,)
        Modified.
    where : int32 array, shape (8,)
        Modified. All arrays are contiguous.
    number : int32 array, shape (8,)
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places = [array.data for array in _arrays(context, builder, signature, arguments)]
        value, least = (_load(builder, place, _FLOATS) for place in places[:2])
        before, now = (_load(builder, place, _INTEGERS) for place in places[2:])
        lower = builder.fcmp_ordered("<", value, least)
        _store(builder, builder.select(lower, value, least), places[1])
        _store(builder, builder.select(lower, now, before), places[2])
        return context.get_dummy_value()

    return types.void(total, lowest, where, number), generate


add_rows: Any = intrinsic(_add_rows)
keep_lower: Any = intrinsic(_keep_lower)
