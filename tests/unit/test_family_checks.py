"""A table that cannot be meant is refused by name when its family is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from experts import FAMILY
from mmconvert.converters.checks import check_family
from mmconvert.converters.family import Variant
from mmconvert.converters.rows import Module, row
from mmconvert.errors import RequestError
from mmconvert.testing import contract

N = "text_decoder.layers.{}.new"
H = "model.layers.{}.new"
ODD: Any = "rows"
WRONG = {
    "an unknown field": (row("text_decoder.layers.{layers}.new", H), "field"),
    "no layer on one side": (row(N, "model.new"), "lacks {layer}"),
    "an expert in HF alone": (row(N, "model.layers.{}.{expert}.new"), "the MM name has not"),
    "an unknown dimension": (row(N, H, rows="lm.hidden"), "'lm.hidden' is not a dimension"),
    "a cut that is none": (row(N, H, shard=ODD), "no Split"),
    "a fuse that is none": (row(N, H, fuse=ODD), "none of Concat"),
    "sizes for other sources": (row(N, H, rows="llm.q llm.kv"), "2 sizes for 1 tensor"),
    "two transposed": (row(N, H, f"{H}2", transposed=True), "for one"),
    "tied to nothing": (row(N, H, tied_to="text_decoder.nothing"), "has no row"),
    "an index without a list": (row(N, "model.{index}.new"), "{index} without only="),
    "a name twice": (row("text_decoder.layers.{}.qkv", H), "is in 2 rows"),
}


def with_row(new: Any) -> Any:
    def modules(variant: Variant) -> tuple[Module, ...]:
        vision, text = FAMILY.modules(variant)
        return vision, replace(text, layer=(*text.layer, new))

    return replace(FAMILY, modules=modules)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_row_is_named(fault: str) -> None:
    new, words = WRONG[fault]
    with pytest.raises(RequestError) as caught:
        check_family(with_row(new))
    assert words in caught.value.what
    assert new.mm in caught.value.what
    assert "InventedConverter" in caught.value.what
    with pytest.raises(AssertionError):
        contract(with_row(new))


def test_an_unknown_module_key_is_named() -> None:
    def modules(variant: Variant) -> tuple[Module, ...]:
        vision, text = FAMILY.modules(variant)
        return replace(vision, key="eyes"), text

    with pytest.raises(RequestError, match="eyes"):
        check_family(replace(FAMILY, modules=modules))


def test_the_invented_family_is_good() -> None:
    contract(FAMILY)
