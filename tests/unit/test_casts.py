"""Casts: every value rounded once, as torch does it; what is lost is counted."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmconvert.executor.casts import DTYPES, Loss, Losses
from mmconvert.executor.rounding import Cast, cast, rounded
from mmconvert.plan.dtypes import cast_dtype
from mmconvert.stored import FLOATS, ITEM_SIZE, SCALED
from nights import examples

TORCH = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Of each format: bits of the significand, exponent of the smallest normal number, largest number.
FORMATS = {
    "F16": (11, -14, Fraction(65504)),
    "BF16": (8, -126, Fraction((2**8 - 1) * 2**120)),
    "F32": (24, -126, Fraction((2**24 - 1) * 2**104)),
}
PAIRS = [(old, new) for old in TORCH for new in FORMATS if old != new]


def tensor(data: bytes | memoryview, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=TORCH[dtype])


def bits(values: torch.Tensor) -> list[int]:
    """The bit patterns; all NaNs are one."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    nan = torch.full_like(values, float("nan"))
    return torch.where(values.isnan(), nan, values).view(kind).tolist()


def as_torch(data: bytes, old: str, new: str) -> Cast:
    """What torch makes of the values, and what that loses."""
    values = tensor(data, old)
    result = values.to(TORCH[new])
    overflowed = int((result.isinf() & values.isfinite()).sum())
    underflowed = int(((result == 0) & (values != 0)).sum())
    raw = result.view(torch.uint8).numpy().tobytes()
    return Cast(memoryview(raw), overflowed, underflowed)


def same(data: bytes, old: str, new: str) -> Cast:
    """The cast, once it is known to be torch's."""
    found, expected = cast(memoryview(data), old, new), as_torch(data, old, new)
    assert bits(tensor(found.bits, new)) == bits(tensor(expected.bits, new))
    assert (found.overflowed, found.underflowed) == (expected.overflowed, expected.underflowed)
    return found


def nearest(value: float, dtype: str) -> float:
    """`value` rounded to the nearest number of a format, ties to even, in exact arithmetic."""
    digits, low, largest = FORMATS[dtype]
    if value == 0 or not np.isfinite(value):
        return value
    exact = abs(Fraction(value))
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > exact
    unit = Fraction(2) ** (max(exponent, low) - digits + 1)
    rounded = round(exact / unit) * unit  # Python's round: ties to even
    # A result past the largest number is infinite; what rounds to that number is not past it.
    size = float("inf") if rounded > largest else float(rounded)
    return -size if value < 0 else size


# ----------------------------------------------------------------------------- all patterns
@pytest.mark.parametrize(("old", "new"), [p for p in PAIRS if p[0] in ("F16", "BF16")])
def test_every_pattern_of_16_bits(old: str, new: str) -> None:
    data = np.arange(1 << 16, dtype="<u2").tobytes()
    found = same(data, old, new)
    assert (found.overflowed > 0) == (found.underflowed > 0) == (new == "F16")


@pytest.mark.parametrize("old", ["F16", "BF16"])
def test_to_f32_and_back_is_exact(old: str) -> None:
    data = np.arange(1 << 16, dtype="<u2").tobytes()
    wide = cast(memoryview(data), old, "F32").bits
    back = cast(wide, "F32", old)
    assert bits(tensor(back.bits, old)) == bits(tensor(data, old))
    assert (back.overflowed, back.underflowed) == (0, 0)


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_nan_stays_one(old: str, new: str) -> None:
    """Also one whose mark lies in the bits that are cut off: else it would become infinite."""
    size = ITEM_SIZE[old]
    digits = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}[old]
    top = ((1 << (8 * size - 1 - digits)) - 1) << digits  # the exponent of infinity
    patterns = [top | m | s << (8 * size - 1) for m in (1, 1 << digits - 1) for s in (0, 1)]
    data = b"".join(p.to_bytes(size, "little") for p in patterns)
    found = cast(memoryview(data), old, new)
    assert tensor(found.bits, new).isnan().all()
    assert (found.overflowed, found.underflowed) == (0, 0)


# ------------------------------------------------------------------------ wider patterns
# Any bits; bits near the limits of the 16-bit formats, where rounding decides.
F32_BITS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.builds(
        lambda sign, high, low: sign << 31 | high << 16 | low,
        st.integers(0, 1),
        st.sampled_from([0, 1, 0x3F80, 0x477F, 0x4780, 0x3300, 0x3380, 0x3880, 0x7F7F, 0x7F80]),
        st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xE000, 0xEFFF, 0xF000, 0xF001, 0xFFFF]),
    ),
)
F64_BITS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(
        lambda sign, exponent, mantissa: sign << 63 | exponent << 52 | mantissa,
        st.integers(0, 1),
        st.one_of(st.integers(850, 910), st.integers(995, 1045), st.integers(1149, 1152)),
        st.one_of(
            st.integers(0, 2**52 - 1),
            st.builds(lambda k, d: (k << 28) + d & 2**52 - 1, st.integers(0), st.integers(-1, 1)),
        ),
    ),
)


@given(st.lists(F32_BITS, min_size=1, max_size=64))
@examples(100, nightly=300)
def test_f32(patterns: list[int]) -> None:
    data = struct.pack(f"<{len(patterns)}I", *patterns)
    same(data, "F32", "F16")
    same(data, "F32", "BF16")


@given(st.lists(F64_BITS, min_size=1, max_size=64))
@examples(100, nightly=300)
def test_f64(patterns: list[int]) -> None:
    """Torch rounds to 16 bits by way of float32, so exact arithmetic is the judge there."""
    data = struct.pack(f"<{len(patterns)}Q", *patterns)
    values = struct.unpack(f"<{len(patterns)}d", data)
    same(data, "F64", "F32")
    for new in ("F16", "BF16"):
        found = cast(memoryview(data), "F64", new)
        expected = [nearest(value, new) for value in values]
        exact = torch.tensor(expected, dtype=torch.float64)
        assert bits(tensor(found.bits, new).double()) == bits(exact)
        pairs = list(zip(values, expected, strict=True))
        assert found.overflowed == sum(np.isfinite(v) and np.isinf(w) for v, w in pairs)
        assert found.underflowed == sum(v != 0 and w == 0 for v, w in pairs)


@given(st.floats(allow_nan=False))
def test_the_judge(value: float) -> None:
    """`nearest` agrees with Python's own half floats, which are rounded once."""
    try:
        expected = struct.unpack("<e", struct.pack("<e", value))[0]
    except OverflowError:
        expected = float("inf") if value > 0 else float("-inf")
    assert nearest(value, "F16") == expected


TINY = 2.0**-45  # lost on the way to float32
TWICE = {  # dtype -> values that two roundings bring to the wrong side of a tie
    "BF16": [
        1 + 2**-8 + TINY,  # just above a tie that goes down to even
        1 + 3 * 2**-8 - TINY,  # just below one that goes up
        2.0**-133 * (0.5 + TINY),  # above half of the smallest subnormal number
        2.0**-130 * (1 + 2**-4 + 2**-40),  # among the subnormal ones, also of float32
        float(FORMATS["BF16"][2]) + 2.0**119 - 2.0**80,  # below the tie with infinity
    ],
    "F16": [1 + 2**-11 + TINY, 1 + 3 * 2**-11 - TINY, 2.0**-25 * (1 + TINY), 65520 - 2.0**-30],
}


@pytest.mark.parametrize("new", TWICE)
@pytest.mark.parametrize("sign", [1, -1])
def test_f64_is_rounded_once(new: str, sign: int) -> None:
    values = torch.tensor([sign * v for v in TWICE[new]], dtype=torch.float64)
    found = tensor(cast(memoryview(values.numpy().tobytes()), "F64", new).bits, new).double()
    expected = torch.tensor([nearest(v, new) for v in values.tolist()], dtype=torch.float64)
    assert found.tolist() == expected.tolist()
    assert (values.float().to(TORCH[new]).double() != expected).all()  # each case is one


# ---------------------------------------------------------------------------------- counts
INF, NAN = float("inf"), float("nan")
COUNTS = {
    # new dtype -> (value, what becomes of it), as F64
    "F16": [(65519.9, ""), (65520, "over"), (-1e9, "over"), (2**-25, "under"), (-1e-9, "under")],
    "BF16": [(3.3895e38, ""), (3.4e38, "over"), (1e300, "over"), (-1e-42, "under"), (1e-40, "")],
    "F32": [(3.4028235e38, ""), (1e39, "over"), (-1e300, "over"), (1e-46, "under"), (1e-45, "")],
}


@pytest.mark.parametrize("new", COUNTS)
def test_counts(new: str) -> None:
    """Zeros, infinities and NaNs that were there before are no losses."""
    cases = [*COUNTS[new], (0.0, ""), (-0.0, ""), (INF, ""), (-INF, ""), (NAN, ""), (1.0, "")]
    data = np.array([value for value, _ in cases] * 3, "<f8").tobytes()
    found = cast(memoryview(data), "F64", new)
    outcomes = [outcome for _, outcome in cases] * 3
    assert found.overflowed == outcomes.count("over") > 0
    assert found.underflowed == outcomes.count("under") > 0


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_nothing_and_one(old: str, new: str) -> None:
    assert cast(memoryview(b""), old, new)[1:] == (0, 0)
    assert cast(memoryview(b""), old, new).bits.nbytes == 0
    one = torch.ones(1, dtype=TORCH[old]).view(torch.uint8).numpy().tobytes()
    assert tensor(cast(memoryview(one), old, new).bits, new).tolist() == [1.0]


def test_the_input_is_left_alone() -> None:
    buffer = bytearray(np.arange(-4, 4, dtype="<f4").tobytes())
    before = bytes(buffer)
    cast(memoryview(buffer), "F32", "BF16")
    assert bytes(buffer) == before


# --------------------------------------------------------------------------- which, and words
def test_scaled_fp8_always_becomes_a_float() -> None:
    """Alone, and as a part of a tensor whose other parts have a dtype of their own."""
    for new in DTYPES.values():
        assert cast_dtype(SCALED, new) == new
        assert cast_dtype(f"{SCALED}+F32", new) == new
    assert cast_dtype(SCALED, "") == "BF16"
    assert cast_dtype(f"{SCALED}+BF16", "") == "BF16"
    assert "+" in cast_dtype(f"{SCALED}+F32", "")


@pytest.mark.parametrize("old", sorted(ITEM_SIZE.keys() - {SCALED}))
def test_only_floating_point_is_cast(old: str) -> None:
    """8-bit floats go with scales of their own: a cast alone would change what they mean."""
    for new in DTYPES.values():
        assert cast_dtype(old, new) == (new if old in {"F16", "BF16", "F32", "F64"} else old)
    assert cast_dtype(old, "") == old
    assert {"F16", "BF16", "F32", "F64"} == FLOATS


def test_losses_in_words() -> None:
    losses = Losses()
    assert losses.notes() == []
    losses.add({"a": Loss(2, 0), "b": Loss(0, 0)})
    losses.add({"a": Loss(1, 0)})
    other = Losses()
    other.add({"a": Loss(4, 0), "c": Loss(0, 9)})
    losses.merge(other)
    over, under = losses.notes()
    assert "7 values" in over and "a (7)" in over and "b" not in over.split(": ")[-1]
    assert "9 values" in under and "c (9)" in under
    assert losses.as_dict() == {"overflowed": {"a": 7}, "underflowed": {"c": 9}}


def test_losses_of_many_tensors_name_the_worst() -> None:
    losses = Losses()
    losses.add({f"t{i}": Loss(i, 0) for i in range(1, 8)})
    (note,) = losses.notes()
    assert "28 values" in note and "7 tensors" in note and "4 more" in note
    assert [f"t{i}" in note for i in range(1, 8)] == [False] * 4 + [True] * 3


def test_rounding_without_memory_of_its_own_is_the_cast() -> None:
    """Any bits but those of NaN, among them infinities, ties and subnormal numbers."""
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, 100_003, dtype=np.uint64).astype("<u4")
    bits[::7] &= 0xFFFF_8000  # ties, and values that are bfloat16 already
    bits[1], bits[2] = 0x7F80_0000, 0xFF80_0000
    plain = bits[(bits & 0x7FFF_FFFF) <= 0x7F80_0000]
    data, out = plain.data.cast("B"), bytearray(2 * len(plain))
    assert rounded(data, memoryview(out))
    assert bytes(out) == bytes(cast(data, "F32", "BF16").bits)
    assert not rounded(bits.data.cast("B"), memoryview(bytearray(2 * len(bits))))
