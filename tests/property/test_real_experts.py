"""Qwen3-VL with experts, by its own table: from any layout to any other, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmconvert import converters
from mmconvert.config import HFConfig, HFToMM, MMToHF, ParallelConfig, Resplit
from mmconvert.directions.mm import hf_to_mm, mm_to_hf, resplit
from mmconvert.playground.checkpoints import make_hf
from mmread import compare_hf, compare_mm
from painting import NORMAL, assert_none, folder, tries

FAMILY = converters.load("Qwen3VLMegatronConverter")
SIZES: dict[str, Any] = {"layers": 4, "vit_layers": 3, "deepstack": [0, 2], "experts": 12}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf("qwen3vl-30b-a3b", tmp_path_factory.mktemp("experts") / "hf", **SIZES)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelConfig:
    """Any that the model allows: stages without layers of a module too."""
    pp, vpp = draw(st.integers(1, 3)), draw(st.integers(1, 2))

    def grid(count: int) -> tuple[tuple[int, ...], ...]:
        counts = [0] * (pp * vpp)
        stages = st.lists(st.integers(0, pp * vpp - 1), min_size=count, max_size=count)
        for stage in draw(stages):
            counts[stage] += 1
        return tuple(tuple(counts[v * pp : (v + 1) * pp]) for v in range(vpp))

    return ParallelConfig(
        llm_pp_layers=grid(SIZES["layers"]),
        vit_pp_layers=grid(SIZES["vit_layers"]),
        tp_size=draw(st.sampled_from((1, 2, 4))),
        ep_size=draw(st.sampled_from((1, 2, 3, 4, 6, 12))),
    )


def check(hf: Path, a: ParallelConfig, b: ParallelConfig) -> None:
    with folder() as tmp:
        for name, layout in (("a", a), ("b", b)):
            hf_to_mm(FAMILY, HFToMM(tmp / name, HFConfig(hf), layout), NORMAL)
        resplit(FAMILY, Resplit(tmp / "a", tmp / "c", target_parallel_config=b), NORMAL)
        assert_none(compare_mm(tmp / "b", tmp / "c"))
        mm_to_hf(FAMILY, MMToHF(tmp / "back", tmp / "c", HFConfig(hf)), NORMAL)
        assert_none(compare_hf(hf, tmp / "back"))


@tries(2)
@given(a=layouts(), b=layouts())
def test_any_layout_to_any_other(hf: Path, a: ParallelConfig, b: ParallelConfig) -> None:
    check(hf, a, b)


@pytest.mark.nightly
@tries(150)
@given(a=layouts(), b=layouts())
def test_any_layout_to_any_other_often(hf: Path, a: ParallelConfig, b: ParallelConfig) -> None:
    check(hf, a, b)
