"""What a plan refuses: sides that do not hold the same, and sources that go nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmconvert.errors import MMConvertError, TensorError
from mmconvert.names import NO_LAYER
from mmconvert.plan.build import build, build_comparison
from mmconvert.plan.plan import Block, Key, Plan, Side, Whole
from mmconvert.plan.proof import prove
from mmconvert.stored import StoredTensor, Target

KEY = Key("w", NO_LAYER)


def side(rows: int, cols: int, dtype: str = "F32", *, written: bool = False) -> Side:
    """One tensor, which is one whole."""
    whole = Whole((rows, cols), dtype, [[Block(0, 0, 0, 0, 0, rows, cols)]])
    if written:
        return Side(targets=[Target("w", dtype, (rows, cols))], wholes={KEY: whole})
    stored = StoredTensor("w", dtype, (rows, cols), Path("file"), 0)
    return Side(stored=[stored], wholes={KEY: whole})


@pytest.mark.parametrize("other", [(4, 3, "F32"), (3, 5, "F32"), (4, 5, "F16"), (20, 1, "F32")])
def test_other_shapes_and_dtypes(other: tuple[int, int, str]) -> None:
    words = r"w is F32 \[4, 5\] in the source"
    with pytest.raises(TensorError, match=words):
        build(side(4, 5), side(*other, written=True))
    with pytest.raises(TensorError, match=words):
        build_comparison(side(4, 5), side(*other))


@pytest.mark.parametrize("where", ["source", "destination"])
def test_a_tensor_of_one_side_alone(where: str) -> None:
    src = Side() if where == "source" else side(4, 5)
    dst = Side() if where == "destination" else side(4, 5, written=True)
    with pytest.raises(TensorError, match=f"w is not in the {where}"):
        build(src, dst)


def plan() -> Plan:
    made = build(side(4, 5), side(4, 5, written=True))
    prove(made)
    return made


def test_a_source_that_is_used_nowhere() -> None:
    made = plan()
    more = [*made.sources, StoredTensor("lost", "F32", (2, 2), Path("file"), 80)]
    with pytest.raises(MMConvertError, match="not every element of lost is used"):
        prove(replace(made, sources=more))


def test_a_source_of_which_a_row_is_not_used() -> None:
    made = plan()
    sources = [made.sources[0]._replace(shape=(5, 5))]
    with pytest.raises(MMConvertError, match="not every element of w is used"):
        prove(replace(made, sources=sources))


def test_a_target_without_its_last_column() -> None:
    made = plan()
    copies = [copy._replace(cols=4) for copy in made.copies]
    with pytest.raises(MMConvertError, match="not every element of w is written exactly once"):
        prove(replace(made, copies=copies))
