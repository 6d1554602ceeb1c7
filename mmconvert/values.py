"""Bits read as numbers: only to say how two tensors differ. The one place that needs numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmconvert.stored import ITEM_SIZE


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
    a = np.frombuffer(left, kind).reshape(-1, cols)
    b = np.frombuffer(right, kind).reshape(-1, cols)
    unequal = a != b
    row, col = (int(x) for x in np.argwhere(unequal)[0])
    x, y = as_floats(a, dtypes[0]), as_floats(b, dtypes[1])
    with np.errstate(all="ignore"):  # NaN and infinity are values like any other here
        sizes = np.abs(x - y)[unequal]
    largest = float(np.nanmax(sizes)) if not np.isnan(sizes).all() else float("nan")
    return Gap(row, col, float(x[row, col]), float(y[row, col]), largest, int(unequal.sum()))


def nonzero(data: memoryview, dtype: str, cols: int) -> Gap | None:
    """Describes the values of a region that are not zero; None if all are (minus zero is)."""
    bits = np.frombuffer(data, f"<u{ITEM_SIZE[dtype]}").reshape(-1, cols)
    values = as_floats(bits, dtype)
    if (values == 0).all():
        return None
    row, col = (int(x) for x in np.argwhere(values != 0)[0])
    largest = float(np.abs(values).max())
    return Gap(row, col, float(values[row, col]), 0.0, largest, int((values != 0).sum()))


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
    bits = np.frombuffer(data, f"<u{item}")
    mask = bits.dtype.type(_EXPONENT[dtype])
    special = (bits & mask) == mask
    if not special.any():
        return None
    row, col = divmod(int(np.argmax(special)), cols)
    magnitude = bits[special] & bits.dtype.type((1 << (8 * item - 1)) - 1)
    infinities = 0 if dtype == "F8_E4M3" else int((magnitude == mask).sum())
    return NotFinite(row, col, int(special.sum()) - infinities, infinities)


def as_floats(data: np.ndarray, dtype: str) -> np.ndarray:
    """The values behind bits, as float64."""
    if dtype == "BF16":  # the upper half of a float32
        return (data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype.startswith("F8"):
        return data.astype(np.float64)  # the raw bits: numpy has no 8-bit floats
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}
    kind = kinds.get(dtype, ("<u" if dtype[0] == "U" else "<i") + str(data.itemsize))
    return np.ascontiguousarray(data).view(kind).astype(np.float64)
