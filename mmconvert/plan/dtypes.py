"""Dtypes of wholes: of one, or of several that a cast makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mmconvert.names import number
from mmconvert.stored import FLOATS, ITEM_SIZE, SCALED, StoredTensor

if TYPE_CHECKING:
    from mmconvert.plan.plan import Key, Whole

DEQUANTISED = "BF16"  # what scaled fp8 becomes where nothing else is asked for
CAST = FLOATS | {SCALED}  # what a cast may change
ONE_DTYPE = "one dtype for all that one tensor is made of"
CAST_ALL = "give --dtype bf16, fp16 or fp32: each part is cast once"


def joint_dtype(dtypes: Sequence[str]) -> str:
    """The dtype of what is made of parts in these dtypes: theirs, or of several floating-point
    ones all, as in "F32+BF16"; such a whole can be read and compared, and written when it is cast.
    "" if they cannot be one tensor.
    """
    if len(set(dtypes)) == 1:
        return dtypes[0]
    parts = dict.fromkeys(part for dtype in dtypes for part in dtype.split("+"))
    return "+".join(parts) if len(parts) == 1 or CAST.issuperset(parts) else ""


def widest(dtype: str) -> str:
    """The dtype of most bytes in a joint one."""
    return max(dtype.split("+"), key=lambda part: ITEM_SIZE[part])


def mixed_dtypes(wholes: Mapping[Key, Whole]) -> str:
    """Which wholes are of several dtypes, in words; "" if none is."""
    mixed = [key for key, whole in wholes.items() if "+" in whole.dtype]
    if not mixed:
        return ""
    made = f"{number(mixed, 'tensor')} made of parts in several dtypes"
    return f"{made}, such as {mixed[0].name()}: {wholes[mixed[0]].mixed}"


def in_words(first: StoredTensor, other: StoredTensor) -> str:
    """Two tensors that are one, in two dtypes."""
    return f"{first.name} is {first.dtype}, {other.name} {other.dtype}"


def cast_dtype(old: str, new: str) -> str:
    """What a tensor of dtype ``old`` becomes when ``new`` is asked for ("": nothing is). Scaled fp8
    becomes bf16 in any case.
    """
    if not new and old in ITEM_SIZE and old != SCALED:  # most are so, of hundreds of thousands
        return old
    parts = old.split("+")
    if new and CAST.issuperset(parts):
        return new
    return joint_dtype([DEQUANTISED if part == SCALED else part for part in parts])
