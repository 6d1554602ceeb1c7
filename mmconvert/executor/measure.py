"""How far apart two runs of elements are, as sums in float64. Needs numpy."""

# numpy's own types are written for a newer Python than the oldest that is served here.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np

from mmconvert.executor.values import Array, as_floats
from mmconvert.stored import ITEM_SIZE

# Elements taken at a time. With few, threads wait for the interpreter's lock between the steps:
# at 12,288 two threads were slower than one. Beyond this nothing was gained.
STEP = 64 << 10


class _Room(threading.local):
    """Arrays of one thread: fresh ones of this size would cost page faults at every step."""

    def __init__(self) -> None:
        self.x, self.y, self.gap = np.empty((3, STEP))
        self.bits = np.empty(STEP, np.uint32)
        self.flags = np.empty(STEP, np.bool_)


_ROOM = _Room()
_VIEWS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


class Measured(NamedTuple):
    """The comparison of two runs of equally many elements.

    An element that is NaN or infinite on either side is in no sum and is no largest difference;
    it is counted. Two NaNs are equal, and so are two equal infinities.

    Attributes:
        square_gap: sum of the squares of a - b.
        square_a: sum of the squares of a.
        different: number of elements that differ as numbers.
        largest: the largest absolute difference.
        place: where that is, counted from 0; -1 if nothing differs.
        a, b: the values there.
        nan_a, inf_a, nan_b, inf_b: how many elements are NaN, and how many infinite.
    """

    square_gap: float = 0.0
    square_a: float = 0.0
    different: int = 0
    largest: float = 0.0
    place: int = -1
    a: float = 0.0
    b: float = 0.0
    nan_a: int = 0
    inf_a: int = 0
    nan_b: int = 0
    inf_b: int = 0


def measure(left: memoryview, right: memoryview, dtypes: tuple[str, str]) -> Measured:
    """Compares the elements of two buffers."""
    a, b = (
        np.frombuffer(data, f"<u{ITEM_SIZE[dtype]}")
        for data, dtype in zip((left, right), dtypes, strict=True)
    )
    found = Measured()
    # Only values that are no numbers make warnings here, and they are counted.
    with np.errstate(all="ignore"):
        for start in range(0, a.size, STEP):
            stop = start + STEP
            found = add(found, _measure(a[start:stop], b[start:stop], dtypes), start)
    return found


def add(first: Measured, second: Measured, start: int) -> Measured:
    """Both runs as one; ``second`` begins at element ``start`` of it."""
    later = second.place >= 0 and (first.place < 0 or second.largest > first.largest)
    most = second._replace(place=second.place + start) if later else first
    return most._replace(
        square_gap=first.square_gap + second.square_gap,
        square_a=first.square_a + second.square_a,
        different=first.different + second.different,
        nan_a=first.nan_a + second.nan_a,
        inf_a=first.inf_a + second.inf_a,
        nan_b=first.nan_b + second.nan_b,
        inf_b=first.inf_b + second.inf_b,
    )


def _measure(a: Array, b: Array, dtypes: tuple[str, str]) -> Measured:
    x = _load(a, dtypes[0], _ROOM.x)
    square = _sum_of_squares(x)
    same = dtypes[0] == dtypes[1]
    if same and math.isfinite(square) and np.array_equal(a, b):
        return Measured(square_a=square)
    y = _load(b, dtypes[1], _ROOM.y)
    gap = np.subtract(x, y, out=_ROOM.gap[: x.size])
    total = _sum_of_squares(gap)
    if not (math.isfinite(square) and math.isfinite(total)):
        return _measure_odd(x, y)
    # Of integers beyond 2**53 float64 does not see every difference; their bits do.
    integers = same and dtypes[0][0] in "IU"
    left, right = (a, b) if integers else (x, y)
    different = int(np.count_nonzero(np.not_equal(left, right, out=_ROOM.flags[: x.size])))
    return _with_largest(x, y, gap, Measured(total, square, different))


def _load(data: Array, dtype: str, out: Array) -> Array:
    """The values behind bits, as float64, at the beginning of ``out``."""
    out = out[: data.size]
    if dtype == "BF16":  # by far the most: the upper half of a float32, without fresh arrays
        bits = np.left_shift(data, 16, out=_ROOM.bits[: data.size], dtype=np.uint32)
        out[:] = bits.view(np.float32)
    elif dtype in _VIEWS:
        out[:] = data.view(_VIEWS[dtype])
    else:
        out[:] = as_floats(data, dtype)
    return out


def _sum_of_squares(values: Array) -> float:
    return float(np.einsum("i,i->", values, values))  # one pass, no array in between


def _with_largest(x: Array, y: Array, gap: Array, found: Measured) -> Measured:
    if not found.different:
        return found
    np.abs(gap, out=gap)
    place = int(gap.argmax())
    return found._replace(
        largest=float(gap[place]), place=place, a=float(x[place]), b=float(y[place])
    )


def _measure_odd(x: Array, y: Array) -> Measured:
    """The same where some values are NaN or infinite, or too large to be squared."""
    nan_x, nan_y = np.isnan(x), np.isnan(y)
    inf_x, inf_y = np.isinf(x), np.isinf(y)
    different = int(np.count_nonzero((x != y) & ~(nan_x & nan_y)))
    odd = nan_x | nan_y | inf_x | inf_y
    plain_x, plain_y = np.where(odd, 0.0, x), np.where(odd, 0.0, y)
    gap = plain_x - plain_y
    found = Measured(
        _sum_of_squares(gap),
        _sum_of_squares(plain_x),
        different,
        nan_a=int(nan_x.sum()),
        inf_a=int(inf_x.sum()),
        nan_b=int(nan_y.sum()),
        inf_b=int(inf_y.sum()),
    )
    return _with_largest(plain_x, plain_y, gap, found) if gap.any() else found
