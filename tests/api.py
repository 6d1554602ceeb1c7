"""The three directions as function calls in this process, with short arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmconvert import converters
from mmconvert.config import (
    CommonModelConfig,
    HFConfig,
    HFToMM,
    MMToHF,
    OptionalHFConfig,
    Options,
    ParallelConfig,
    Resplit,
)
from mmconvert.convert import Result
from mmconvert.directions.mm import hf_to_mm, mm_to_hf, resplit

Grid = Sequence[Sequence[int]]


class Shape(NamedTuple):
    """A layout in short: stage grids and tensor-parallel sizes."""

    vit: Grid
    llm: Grid
    tp: int = 1
    vit_tp: int = 0

    def config(self) -> ParallelConfig:
        """The layout in mmconvert's words."""
        return ParallelConfig(
            llm_pp_layers=tuple(tuple(row) for row in self.llm),
            vit_pp_layers=tuple(tuple(row) for row in self.vit),
            tp_size=self.tp,
            vit_tp_size=self.vit_tp,
        )


def to_mm(
    converter: str,
    hf: Path,
    mm: Path,
    shape: Shape,
    *,
    canonical: bool = False,
    options: Options | None = None,
) -> Result:
    """hf_to_mm."""
    common = CommonModelConfig(enable_canonical_hf_struct=canonical)
    cfg = HFToMM(mm, HFConfig(hf), shape.config(), common)
    return hf_to_mm(converters.load(converter), cfg, options)


def to_hf(
    converter: str, mm: Path, hf: Path, out: Path, *, options: Options | None = None
) -> Result:
    """mm_to_hf, the layout read off the checkpoint."""
    return mm_to_hf(converters.load(converter), MMToHF(out, mm, HFConfig(hf)), options)


def to_other(
    converter: str,
    source: Path,
    target: Path,
    shape: Shape,
    *,
    hf: Path | None = None,
    options: Options | None = None,
) -> Result:
    """Reshard, the source's layout read off the checkpoint."""
    cfg = Resplit(source, target, ParallelConfig(), shape.config(), hf_config=OptionalHFConfig(hf))
    return resplit(converters.load(converter), cfg, options)
