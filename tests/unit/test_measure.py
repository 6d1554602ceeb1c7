"""Sums of differences against exact arithmetic, and against torch's reading of every dtype."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmconvert.executor.distance import cut
from mmconvert.executor.measure import STEP, Measured, add, measure
from mmconvert.executor.values import as_floats
from mmconvert.plan.plan import Copy
from mmconvert.stored import ITEM_SIZE
from nights import examples

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
FLOATS = ["BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"]


def numbers(data: bytes, dtype: str) -> list[float]:
    return torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).double().tolist()


@pytest.mark.parametrize("dtype", TORCH)
def test_bits_are_read_as_torch_reads_them(dtype: str) -> None:
    size = ITEM_SIZE[dtype]
    if size == 1:
        raw = bytes(range(256))
    elif size == 2:
        raw = np.arange(1 << 16, dtype="<u2").tobytes()
    else:
        raw = np.random.default_rng(1).bytes(8000)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        got = as_floats(np.frombuffer(raw, f"<u{size}"), dtype)
    want = np.array(numbers(raw, dtype))
    assert np.array_equal(got, want, equal_nan=True)
    assert np.array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0]))


def measured(left: bytes, right: bytes, one: str, two: str) -> Measured:
    return measure(memoryview(left), memoryview(right), (one, two))


def expected(x: list[float], y: list[float]) -> Measured:
    """The same figures in exact arithmetic, one element at a time."""
    gap = square = Fraction(0)
    different, largest, place = 0, 0.0, -1
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        different += a != b and not (math.isnan(a) and math.isnan(b))
        if not (math.isfinite(a) and math.isfinite(b)):
            continue
        gap += (Fraction(a) - Fraction(b)) ** 2
        square += Fraction(a) ** 2
        if abs(a - b) > largest:
            largest, place = abs(a - b), i
    counts = (sum(f(v) for v in values) for values in (x, y) for f in (math.isnan, math.isinf))
    at = (x[place], y[place]) if place >= 0 else (0.0, 0.0)
    return Measured(float(gap), float(square), different, largest, place, *at, *counts)


@examples(70, nightly=200)
@given(st.data(), st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(1, 40))
def test_every_bit_pattern_of_two_dtypes(
    data: st.DataObject, one: str, two: str, count: int
) -> None:
    left = data.draw(st.binary(min_size=count * ITEM_SIZE[one], max_size=count * ITEM_SIZE[one]))
    same = one == two and data.draw(st.booleans())
    size = count * ITEM_SIZE[two]
    right = left if same else data.draw(st.binary(min_size=size, max_size=size))
    got = measured(left, right, one, two)
    want = expected(numbers(left, one), numbers(right, two))
    assert got[2:] == want[2:]
    assert got.square_gap == pytest.approx(want.square_gap, rel=1e-12)
    assert got.square_a == pytest.approx(want.square_a, rel=1e-12)


def test_more_elements_than_one_step() -> None:
    """NaN, infinity and the largest difference beyond the first portion; ties keep the first."""
    x = torch.linspace(-1, 1, 2 * STEP + 77)
    y = x.clone()
    for i in (STEP + 5, 2 * STEP + 9):
        x[i], y[i] = 1.0, 4.0
    y[3] = math.nan
    x[7] = y[7] = math.inf
    x[2 * STEP] = -math.inf
    got = measured(x.numpy().tobytes(), y.numpy().tobytes(), "F32", "F32")
    want = expected(x.double().tolist(), y.double().tolist())
    assert got[2:] == want[2:]
    assert (got.place, got.different, got.nan_b, got.inf_a, got.inf_b) == (STEP + 5, 4, 1, 2, 1)
    assert got[:2] == pytest.approx(want[:2], rel=1e-12)


def test_integers_beyond_float64_differ_by_their_bits() -> None:
    raw = [np.array([1 << 60, v], "<i8").tobytes() for v in ((1 << 60) + 1, 1 << 60)]
    assert measured(raw[0], raw[1], "I64", "I64").different == 1


def test_sums_that_float64_cannot_hold_do_not_hide_the_difference() -> None:
    raw = [np.array([1e300, v]).tobytes() for v in (1.0, 2.0)]
    got = measured(raw[0], raw[1], "F64", "F64")
    assert (got.different, got.largest, got.square_a) == (1, 1.0, math.inf)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 30))
def test_a_copy_is_cut_into_parts_that_tile_it(rows: int, cols: int, most: int) -> None:
    seen: list[tuple[int, int]] = []
    for part in cut(Copy(0, 2, 3, 1, 5, 7, rows, cols), most):
        assert 0 < part.rows * part.cols <= most
        assert (part.dst_row - part.src_row, part.dst_col - part.src_col) == (3, 4)
        seen += [
            (part.src_row + r, part.src_col + c) for r in range(part.rows) for c in range(part.cols)
        ]
    assert sorted(seen) == [(2 + r, 3 + c) for r in range(rows) for c in range(cols)]


def test_parts_add_up_in_any_grouping() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.integers(-50, 50, (2, 300)).astype("<f4")
    whole = measured(x.tobytes(), y.tobytes(), "F32", "F32")
    found = Measured()
    for start in range(0, 300, 70):
        a, b = (v[start : start + 70].tobytes() for v in (x, y))
        found = add(found, measured(a, b, "F32", "F32"), start)
    assert found == whole
