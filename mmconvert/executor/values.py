"""Bits read as numbers: to say how two tensors differ, and to cast. The one place for numpy."""

# numpy's own types are written for a newer Python than the oldest that is served here.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmconvert.stored import ITEM_SIZE

Array = NDArray[Any]

ROUNDED = 16 << 10  # values that are rounded at a time: in the processor's nearest cache
TILE = 16  # rows that are exchanged with columns at a time: their elements share cache lines


class Gap(NamedTuple):
    """Where two equally large regions differ in value, and by how much.

    Attributes:
        row, col: of the first difference.
        left, right: the values there.
        largest: the largest absolute difference; NaN if only NaNs differ.
        elements: number of elements that differ.
    """

    row: int
    col: int
    left: float
    right: float
    largest: float
    elements: int


def gaps(left: memoryview, right: memoryview, dtypes: tuple[str, str], cols: int) -> Gap:
    """Describes the difference of two regions of ``cols`` columns whose bits are not equal."""
    kind = f"<u{ITEM_SIZE[dtypes[0]]}"
    a: Array = np.frombuffer(left, kind).reshape(-1, cols)
    b: Array = np.frombuffer(right, kind).reshape(-1, cols)
    unequal = a != b
    row, col = (int(x) for x in np.argwhere(unequal)[0])
    x, y = as_floats(a, dtypes[0]), as_floats(b, dtypes[1])
    with np.errstate(all="ignore"):  # NaN and infinity are values like any other here
        sizes = np.abs(x - y)[unequal]
    largest = float(np.nanmax(sizes)) if not np.isnan(sizes).all() else float("nan")
    return Gap(row, col, float(x[row, col]), float(y[row, col]), largest, int(unequal.sum()))


def nonzero(data: memoryview, dtype: str, cols: int) -> Gap | None:
    """Describes the values of a region that are not zero; None if all are (minus zero is)."""
    bits: Array = np.frombuffer(data, f"<u{ITEM_SIZE[dtype]}").reshape(-1, cols)
    values = as_floats(bits, dtype)
    if (values == 0).all():
        return None
    row, col = (int(x) for x in np.argwhere(values != 0)[0])
    largest = float(np.abs(values).max())
    return Gap(row, col, float(values[row, col]), 0.0, largest, int((values != 0).sum()))


def exchange(
    data: memoryview, shape: tuple[int, int], item: int, out: memoryview, place: tuple[int, int]
) -> None:
    """Writes a matrix with rows and columns exchanged.

    Args:
        data: its elements, of ``item`` bytes each, in rows and columns as ``shape`` says.
        out: receives it.
        place: the byte where its first row begins there, and the bytes to the next row.
    """
    bits: Array = np.frombuffer(data, f"<u{item}").reshape(shape)
    first, stride = place
    turned: Array = np.ndarray(shape[::-1], bits.dtype, out, first, (stride, item))
    for row in range(0, shape[0], TILE):
        turned[:, row : row + TILE] = bits[row : row + TILE].T


def _e4m3_values() -> Array:
    """The value of each of the 256 bytes of F8_E4M3: bias 7, no infinity, NaN is all ones.

    Source: the OCP 8-bit floating point specification (OFP8), revision 1.0, section 5.
    """
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    sizes = np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    sizes[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -sizes, sizes)


_E4M3 = _e4m3_values()


# The bits of the exponent; all set they mean infinity or NaN.
_EXPONENT = {
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F80_0000,
    "F64": 0x7FF0_0000_0000_0000,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,  # it has no infinity: only all bits set are NaN
}


class NotFinite(NamedTuple):
    """NaN and infinity in a region: the first one's place, and how many of each there are."""

    row: int
    col: int
    nans: int
    infinities: int


def not_finite(data: memoryview, dtype: str, cols: int) -> NotFinite | None:
    """NaN and infinity among the values of a region of ``cols`` columns; None if there are none."""
    if dtype not in _EXPONENT:
        return None
    item = ITEM_SIZE[dtype]
    bits: Array = np.frombuffer(data, f"<u{item}")
    mask = bits.dtype.type(_EXPONENT[dtype])
    special = (bits & mask) == mask
    if not special.any():
        return None
    row, col = divmod(int(np.argmax(special)), cols)
    magnitude = bits[special] & bits.dtype.type((1 << (8 * item - 1)) - 1)
    infinities = 0 if dtype == "F8_E4M3" else int((magnitude == mask).sum())
    return NotFinite(row, col, int(special.sum()) - infinities, infinities)


def as_floats(data: Array, dtype: str) -> Array:
    """The values behind bits, as float64."""
    if dtype == "BF16":  # the upper half of a float32
        return (data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (data.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    if dtype == "F8_E4M3":
        return _E4M3[data]
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}
    kind = kinds.get(dtype, ("<u" if dtype[0] == "U" else "<i") + str(data.itemsize))
    return np.ascontiguousarray(data).view(kind).astype(np.float64)


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
        values = (_E4M3[bits] * factors[rows][:, cols]).ravel()
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
        if bits.max() > _EXPONENT["F32"]:
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
