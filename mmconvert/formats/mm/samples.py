"""A few layouts of MM format that are unlike each other, as far as a model allows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmconvert.config import ParallelConfig
from mmconvert.formats.model import Model
from mmconvert.sharding.layout import grid_flag
from mmconvert.sharding.stages import StageGrid


def representative(model: Model) -> list[tuple[str, ParallelConfig]]:
    """One rank; tensor and pipeline parallel; virtual stages with a encoder over two of them."""
    decoder = model.family.decoder
    counts = {key: model.dims[f"{key}.layers"] for key in model.family.module_keys}

    def config(stages: int, virtual: int, tp: int) -> ParallelConfig:
        grids: dict[str, Any] = {
            grid_flag(key): _grid(_spread(count, stages * virtual, key == decoder), stages)
            for key, count in counts.items()
        }
        return ParallelConfig(tp_size=tp, **grids)

    return [
        ("tp1 pp1", config(1, 1, 1)),
        ("tp2 pp2", config(2, 1, 2)),
        ("tp1 pp2 vpp2", config(2, 2, 1)),
    ]


def _spread(count: int, stages: int, text: bool) -> list[int]:
    """Encoders on the first two stages, text from the second on: the order rule holds."""
    first = 1 if text and stages > 1 else 0
    last = stages if text or stages == 1 else 2
    width = last - first
    counts = [0] * stages
    for i in range(width):
        counts[first + i] = count * (i + 1) // width - count * i // width
    return counts


def _grid(counts: Sequence[int], stages: int) -> StageGrid:
    return tuple(tuple(counts[i : i + stages]) for i in range(0, len(counts), stages))
