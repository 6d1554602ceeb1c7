"""Values in another dtype, each rounded once."""

# numpy's own types are written for a newer Python than the oldest that is served here.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from mmconvert.executor.values import E4M3, EXPONENT, Array
from mmconvert.stored import ITEM_SIZE

ROUNDED = 16 << 10  # values that are rounded at a time: in the processor's nearest cache


class Cast(NamedTuple):
    """Values in another dtype, and what that cost.

    Attributes:
        bits: the values' bits.
        overflowed: number of finite values that became infinite.
        underflowed: number of values other than zero that became zero.
    """

    bits: memoryview
    overflowed: int
    underflowed: int


def cast(data: memoryview, old: str, new: str) -> Cast:
    """Values in another dtype, each rounded once, to the nearest, ties to even (IEEE 754).

    Args:
        data: the bits of the values.
        old, new: dtypes among F16, BF16, F32 and F64.
    """
    if ITEM_SIZE[old] > 2 or (old, new) == ("BF16", "F32"):
        return _cast(floats(data, old), new)
    bits, overflows, underflows = _every_value(old, new)
    values = np.frombuffer(data, "<u2")
    lost = (int(np.count_nonzero(f[values])) if f.any() else 0 for f in (overflows, underflows))
    return Cast(bits[values].data.cast("B"), *lost)


@cache
def _every_value(old: str, new: str) -> tuple[Array, Array, Array]:
    """What becomes of each of the 65,536 values of a dtype of two bytes: its bits, and whether it
    overflows or underflows. Looked up, values take a seventh of the time.
    """
    each = np.arange(1 << 16, dtype="<u2")
    values = floats(each.data.cast("B"), old)
    bits, result = from_floats(values, new)
    return np.frombuffer(bits, f"<u{ITEM_SIZE[new]}"), *_lost(values, result)


def dequantise(
    data: memoryview, scales: memoryview, dtype: str, blocks: BlockNumbers, new: str
) -> Cast:
    """F8_E4M3 values times the scales of their blocks, each product rounded once.

    A product of the two has 28 bits at most: float64 holds it.

    Args:
        data: the values' bits, row by row.
        scales: the bits of the scales of all blocks that they meet, row by row.
        dtype: of the scales.
        blocks: which scale belongs to which row and column.
        new: among F16, BF16 and F32.
    """
    bits: Array = np.frombuffer(data, "<u1").reshape(len(blocks.rows), len(blocks.cols))
    rows, cols = np.asarray(blocks.rows), np.asarray(blocks.cols)
    factors = floats(scales, dtype).astype("<f8").reshape(rows[-1] + 1, cols[-1] + 1)
    with np.errstate(all="ignore"):
        values = (E4M3[bits] * factors[rows][:, cols]).ravel()
    return _cast(values, new)


class BlockNumbers(NamedTuple):
    """The number of the block that each row and each column of a region is in."""

    rows: list[int]
    cols: list[int]


def _cast(values: Array, new: str) -> Cast:
    bits, result = from_floats(values, new)
    return Cast(bits, *(int(flags.sum()) for flags in _lost(values, result)))


def _lost(values: Array, result: Array) -> tuple[Array, Array]:
    """Which of some values became infinite, and which became zero, by a cast."""
    return np.isinf(result) & np.isfinite(values), (result == 0) & (values != 0)


def from_floats(values: Array, dtype: str) -> tuple[memoryview, Array]:
    """The bits of values in a dtype, each rounded once, and the values that they have then."""
    with np.errstate(all="ignore"):  # overflow and underflow are counted, not printed
        if dtype == "BF16":
            bits = _to_bf16(values)
            result = floats(bits.data.cast("B"), dtype)
        else:
            result = values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
            bits = result
    return np.ascontiguousarray(bits).data.cast("B"), result


def floats(data: memoryview, dtype: str) -> Array:
    """The values behind bits in the smallest numpy type that holds them all."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])


def rounded(data: memoryview, out: memoryview) -> bool:
    """Rounds float32 values to bfloat16, as :func:`cast` does, without memory of its own: fresh
    pages would take longer than the arithmetic.

    Args:
        data: the bits of the values.
        out: receives those of the rounded ones.

    Returns:
        False: there is a NaN among them, which this does not keep.
    """
    values: Array = np.frombuffer(data, "<f4")
    scratch: Array = np.empty(ROUNDED, "<u4")
    for start in range(0, len(values), ROUNDED):
        part = values[start : start + ROUNDED]
        bits = scratch[: len(part)]
        np.bitwise_and(part.view("<u4"), 0x7FFF_FFFF, out=bits)
        if bits.max() > EXPONENT["F32"]:
            return False
        narrow(part, bits, out[2 * start : 2 * (start + len(part))])
    return True


def widen(data: memoryview, out: Array) -> None:
    """Puts bfloat16 values, by their bits, into a float32 matrix."""
    bits = out.view("<u4")
    bits[:] = np.frombuffer(data, "<u2").reshape(out.shape)
    np.left_shift(bits, 16, out=bits)


def small(values: Array) -> bool:
    """Whether float32 values are finite, and surely so in bfloat16: their squares can be summed."""
    flat = values.reshape(-1)
    with np.errstate(all="ignore"):
        return values.dtype.itemsize == 4 and bool(np.isfinite(np.dot(flat, flat)))


def narrow(values: Array, scratch: Array, out: memoryview) -> memoryview:
    """The bits of float32 values, none of them NaN, in bfloat16, each rounded to the nearest, ties
    to even.

    Args:
        scratch: integers of the values' shape.
        out: receives the bits.
    """
    bits = values.view("<u4")
    np.right_shift(bits, 16, out=scratch)
    np.bitwise_and(scratch, 1, out=scratch)
    np.add(scratch, 0x7FFF, out=scratch)
    np.add(scratch, bits, out=scratch)
    np.right_shift(scratch, 16, out=scratch)
    np.frombuffer(out, "<u2").reshape(values.shape)[:] = scratch
    return out


def _to_bf16(values: Array) -> Array:
    """The bits of bfloat16 values."""
    wide = values.astype("<f4")
    if values.dtype.itemsize > wide.dtype.itemsize:
        # Rounding twice can go wrong: cut to float32 with the last bit set if anything was lost
        # ("round to odd", Boldo and Melquiond 2008), so that the second rounding sees it.
        past = np.abs(wide.astype("<f8")) > np.abs(values)
        wide = np.where(past, np.nextafter(wide, np.float32(0)), wide)
        lost = (wide.astype("<f8") != values) & ~np.isnan(values)
        wide = (wide.view("<u4") | lost).astype("<u4").view("<f4")
    bits = wide.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # a NaN must not be rounded to infinity
    return np.where(np.isnan(wide), quiet, rounded).astype("<u2")
