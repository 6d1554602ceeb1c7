"""Bits read as numbers: to say how two tensors differ, and which values are not finite."""

# numpy's own types are written for a newer Python than the oldest that is served here.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmconvert.stored import ITEM_SIZE

Array = NDArray[Any]

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


E4M3 = _e4m3_values()


# The bits of the exponent; all set they mean infinity or NaN.
EXPONENT = {
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
    if dtype not in EXPONENT:
        return None
    item = ITEM_SIZE[dtype]
    bits: Array = np.frombuffer(data, f"<u{item}")
    mask = bits.dtype.type(EXPONENT[dtype])
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
        return E4M3[data]
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}
    kind = kinds.get(dtype, ("<u" if dtype[0] == "U" else "<i") + str(data.itemsize))
    return np.ascontiguousarray(data).view(kind).astype(np.float64)
