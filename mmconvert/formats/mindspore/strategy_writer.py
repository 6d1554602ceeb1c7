"""Writes MindSpore's strategy files; ``formats/mindspore/strategy.py`` says what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from mmconvert.errors import LayoutError
from mmconvert.formats.containers.protobuf import block, number
from mmconvert.formats.mindspore.strategy import Strategy
from mmconvert.sharding.slices import Slicing

NODE = "mmconvert"  # the one operator that our files name: merging needs one in each file


def encode_strategy(strategy: Strategy) -> bytes:
    """A strategy file, byte for byte as protobuf writes these messages."""
    items = b"".join(
        block(2, block(1, NODE.encode()) + block(2, number(1, stage))) for stage in strategy.stages
    )
    layouts = b"".join(
        block(3, block(1, name.encode()) + block(2, _encode_layout(slicing)))
        for name, slicing in _named(strategy)
    )
    return number(1, 1) + items + layouts


def _named(strategy: Strategy) -> Iterable[tuple[str, Slicing]]:
    for stage, layouts in strategy.stages.items():
        for name, slicing in layouts.items():
            yield (f"{stage}-{name}" if strategy.merged else name), slicing


def _encode_layout(slicing: Slicing) -> bytes:
    out = block(1, _encode_numbers(slicing.devices))
    for part in _tensor_map(slicing):
        out += block(2, _encode_numbers(part))
    step, size = _optimizer(slicing)
    out += block(3, b"") + block(4, b"") + number(5, 0)
    return out + number(6, step) + number(7, size)


def _encode_numbers(values: Iterable[int]) -> bytes:
    return b"".join(number(1, n) for n in values)


def _tensor_map(slicing: Slicing) -> list[list[int]]:
    """One list, or one for each dimension where a dimension is split over several axes."""
    axes = [list(part) or [-1] for part in slicing.axes]
    if any(len(part) > 1 for part in axes):
        return axes if len(axes) > 1 else [*axes, []]  # a lone list would be one axis for each
    return [[part[0] for part in axes]]


def _optimizer(slicing: Slicing) -> tuple[int, int]:
    """opt_weight_shard_step (how far apart devices with one slice are) and _size."""
    if slicing.optimizer == 0:
        return 0, 0
    return slicing.ranks // slicing.repeated, slicing.optimizer


def strategy_json(strategy: Strategy) -> str:
    """The JSON twin of a strategy file."""
    layouts: dict[str, object] = {}
    for name, slicing in _named(strategy):
        parts = _tensor_map(slicing)
        step, size = _optimizer(slicing)
        layouts[name] = {
            "dev_matrix": list(slicing.devices),
            "field": 0,
            "indices_offset": [],
            "opt_weight_shard_size": size,
            "opt_weight_shard_step": step,
            "param_split_shape": [],
            "tensor_map": parts[0] if len(parts) == 1 else [part for part in parts if part],
        }
    items: dict[str, object] = {}
    for stage in strategy.stages:
        node = NODE if len(strategy.stages) == 1 else f"{NODE}-{stage}"
        items[node] = {"parallel_strategy": [], "stage": stage}
    return json.dumps(
        {"current_stage": 1, "parallel_layout_item": layouts, "parallel_strategy_item": items}
    )


def merge_strategies(parts: Iterable[Strategy]) -> Strategy:
    """One strategy for all stages, from the files of the ranks.

    Raises:
        LayoutError: two files that differ about one stage, or a stage that is missing.
    """
    stages: dict[int, Mapping[str, Slicing]] = {}
    for part in parts:
        for stage, layouts in part.stages.items():
            if stages.setdefault(stage, layouts) != layouts:
                raise LayoutError(
                    f"two strategy files differ about pipeline stage {stage}",
                    "one strategy for the ranks of a stage",
                    "give the strategy files of one training run",
                )
    if sorted(stages) != list(range(len(stages))):
        raise LayoutError(
            f"there are strategies for the pipeline stages {', '.join(map(str, sorted(stages)))}",
            "every stage from 0 on",
            "copy the strategy files of all ranks into one folder",
        )
    return Strategy({stage: stages[stage] for stage in sorted(stages)}, merged=True)
