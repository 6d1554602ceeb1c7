"""MindSpore's strategy files: how a distributed checkpoint's tensors are sliced.

A file is one protobuf message (proto2, ``node_strategy.proto`` of MindSpore 2.7), or its twin in
JSON::

    ParallelStrategyMap   { uint32 current_stage = 1; ParallelStrategyItem item = 2 *;
                            ParallelLayoutItem layout = 3 *; }
    ParallelStrategyItem  { string node_name = 1; ParallelStrategys strategys = 2; }
    ParallelStrategys     { uint32 stage = 1; ... }
    ParallelLayoutItem    { string param_name = 1; ParallelLayouts layouts = 2; }
    ParallelLayouts       { dev_matrix = 1, tensor_map = 2, param_split_shape = 3,
                            indices_offset = 4: each a message of numbers, field 1;
                            int32 field = 5, opt_weight_shard_step = 6,
                            opt_weight_shard_size = 7; }

With pipeline stages each rank has a file of its own stage; a merged file has them all, its names
begin with the stage: ``1-lm_head.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn, TypeGuard

from mmconvert.errors import CheckpointError, FormatError, LayoutError
from mmconvert.formats.containers.protobuf import LENGTH, VARINT, Field, WireFile, signed
from mmconvert.formats.containers.safetensors import parse_json
from mmconvert.formats.reading import opened, size_of_file
from mmconvert.narrow import is_array, is_object
from mmconvert.sharding.slices import Slicing

MAX_STRATEGY = 256 << 20  # bytes; a file for 10,000 tensors has 1 MiB
MAX_NAME = 4096
MAX_AXES = 16  # of a device matrix or a tensor
MAX_DEVICES = 1 << 24
MAX_STAGES = 4096

_MERGED = re.compile(r"(\d{1,4})-(.+)", re.DOTALL)
_KIND = "a strategy file as MindSpore's save_strategy writes it"


@dataclass(frozen=True)
class Strategy:
    """The slicing of every tensor, by pipeline stage and name.

    Attributes:
        stages: the slicings of each stage that the file speaks of.
        merged: whether names in the file begin with the stage.
    """

    stages: Mapping[int, Mapping[str, Slicing]]
    merged: bool = False

    def devices(self, where: str = "the strategy") -> int:
        """Devices of one stage. Raises LayoutError if tensors do not agree about them."""
        found = {s.ranks for layouts in self.stages.values() for s in layouts.values()}
        if len(found) != 1:
            raise LayoutError(
                f"{where} is for {', '.join(map(str, sorted(found)))} devices",
                "the same number for every tensor",
            )
        return found.pop()

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a rank of the whole cluster."""
        return rank // self.devices()


# ---------------------------------------------------------------------------------- reading


def read_strategy(path: Path) -> Strategy:
    """Reads a strategy file; one whose name ends in ``.json`` is JSON, as in MindSpore.

    Raises:
        FormatError: damaged, or no strategy file.
        CheckpointError: unreadable.
        LayoutError: slices of a kind that is not supported.
    """
    try:
        if size_of_file(path) > MAX_STRATEGY:
            raise FormatError(f"{path}: larger than {MAX_STRATEGY} bytes", _KIND)
        with opened(path) as file:
            if path.name.endswith(".json"):
                return _from_json(path, parse_json(file.read(), path))
            return _Reader(WireFile(path, file, _KIND)).read()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}", _KIND) from error


@dataclass
class _Layout:
    """A layout as it stands in a file, not yet checked."""

    dev_matrix: list[list[int]]
    tensor_map: list[list[int]]
    uneven: bool = False
    field: int = 0
    step: int = 0
    size: int = 0


class _Reader:
    def __init__(self, wire: WireFile) -> None:
        self.wire = wire

    def read(self) -> Strategy:
        stage: int | None = None
        layouts: dict[str, _Layout] = {}
        for field in self.wire.fields(0, self.wire.size):
            if field.number == 2 and stage is None:
                stage = self.stage(self.message(field))
            elif field.number == 3:
                name, layout = self.item(self.message(field))
                if name in layouts:
                    raise self.wire.error(field.at, f"{name:.80} occurs twice")
                layouts[name] = layout
        return _checked(self.wire.path, stage or 0, layouts)

    def message(self, field: Field) -> Field:
        return self.wire.need(field, LENGTH, f"field {field.number}")

    def stage(self, item: Field) -> int:
        for field in self.wire.fields(item.start, item.end):
            if field.number == 2:
                for inner in self.wire.fields(self.message(field).start, field.end):
                    if inner.number == 1:
                        return self.wire.need(inner, VARINT, "a stage").value
        return 0

    def item(self, item: Field) -> tuple[str, _Layout]:
        name: str | None = None
        layout: _Layout | None = None
        for field in self.wire.fields(item.start, item.end):
            if field.number == 1:
                name = self.wire.text(field, "a parameter name", MAX_NAME)
            elif field.number == 2:
                layout = self.layout(self.message(field))
        if not name or layout is None:
            raise self.wire.error(item.at, "a layout without a name, or a name without a layout")
        return name, layout

    def layout(self, message: Field) -> _Layout:
        layout = _Layout([], [])
        for field in self.wire.fields(message.start, message.end):
            if field.number == 1:
                layout.dev_matrix.append(self.numbers(field))
            elif field.number == 2:
                layout.tensor_map.append([signed(n, 32) for n in self.numbers(field)])
            elif field.number in (3, 4):
                layout.uneven |= bool(self.numbers(field))
            elif field.number in (5, 6, 7):
                value = signed(self.wire.need(field, VARINT, "a size").value, 32)
                setattr(layout, ("field", "step", "size")[field.number - 5], value)
        return layout

    def numbers(self, field: Field) -> list[int]:
        found: list[int] = []
        for inner in self.wire.fields(self.message(field).start, field.end):
            if inner.number == 1:
                found += self.wire.integers(inner, "a list of sizes", MAX_AXES)
                if len(found) > MAX_AXES:
                    raise self.wire.error(field.at, f"more than {MAX_AXES} sizes")
        return found


def _bad(path: Path, what: str) -> NoReturn:
    raise FormatError(f"{path}: {what}", _KIND, "save the strategy again, or copy the file again")


def _checked(path: Path, stage: int, layouts: Mapping[str, _Layout]) -> Strategy:
    if not layouts:
        _bad(path, "names no tensors")
    stages: dict[int, dict[str, Slicing]] = {}
    merged = all(_MERGED.fullmatch(name) for name in layouts)
    for name, layout in layouts.items():
        match = _MERGED.fullmatch(name) if merged else None
        at, plain = (int(match[1]), match[2]) if match else (stage, name)
        if at >= MAX_STAGES:
            _bad(path, f"{name:.80} is on stage {at}")
        found = stages.setdefault(at, {})
        if plain in found:
            _bad(path, f"{name:.80} occurs twice")
        found[plain] = _slicing(path, plain, layout)
    return Strategy(stages, merged)


def _slicing(path: Path, name: str, layout: _Layout) -> Slicing:
    if layout.uneven or layout.field:
        raise LayoutError(
            f"{path}: {name:.80} is sliced by hand (param_split_shape, indices_offset or field)",
            "slices of equal size",
            "merge it with mindspore.transform_checkpoints first",
        )
    if len(layout.dev_matrix) != 1:
        _bad(path, f"{name:.80} has {len(layout.dev_matrix)} device matrices")
    devices = tuple(layout.dev_matrix[0])
    if any(not 0 < n <= MAX_DEVICES for n in devices) or not 0 < prod(devices) <= MAX_DEVICES:
        _bad(path, f"{name:.80} has the device matrix {list(devices)}")
    if len(layout.tensor_map) > 1:  # one list for each dimension of the tensor, empty ones apart
        axes = [part for part in layout.tensor_map if part]
    else:
        axes = [[axis] for part in layout.tensor_map for axis in part]
    split = tuple(tuple(axis for axis in part if axis != -1) for part in axes)
    slicing = Slicing(devices, split, layout.size if layout.step else 0)
    try:
        slicing.check(len(split), name[:80])
    except LayoutError as error:
        _bad(path, error.what)
    return slicing


# ------------------------------------------------------------------------------------- JSON


def _from_json(path: Path, content: object) -> Strategy:
    if not is_object(content):
        _bad(path, "not a JSON object")
    items = content.get("parallel_strategy_item") or dict[str, object]()
    layouts = content.get("parallel_layout_item")
    if not is_object(items) or not is_object(layouts):
        _bad(path, "parallel_strategy_item or parallel_layout_item is not an object")
    stage = 0
    for item in items.values():
        stage = item.get("stage", 0) if is_object(item) else -1
        if not _whole(stage, 0, MAX_STAGES):
            _bad(path, "an item of parallel_strategy_item has no sensible stage")
        break
    found: dict[str, _Layout] = {}
    for name, value in layouts.items():
        if not is_object(value) or not name:
            _bad(path, f"the layout of {name!r:.80} is not an object")
        found[name] = _json_layout(path, name, value)
    return _checked(path, stage, found)


def _json_layout(path: Path, name: str, value: Mapping[str, object]) -> _Layout:
    where = f"{path}: {name:.80}"
    devices = _numbers(where, "dev_matrix", value.get("dev_matrix"))
    axes = value.get("tensor_map")
    if is_array(axes) and any(is_array(axis) for axis in axes):
        parts = [_numbers(where, "tensor_map", a if is_array(a) else [a]) for a in axes]
        parts.append([])  # one list for each dimension, even if there is only one
    else:
        parts = [_numbers(where, "tensor_map", axes)]
    numbers: list[int] = []
    for key in ("field", "opt_weight_shard_step", "opt_weight_shard_size"):
        numbers += _numbers(where, key, [value.get(key, 0)])
    uneven = bool(value.get("param_split_shape") or value.get("indices_offset"))
    return _Layout([devices], parts, uneven, *numbers)


def _whole(value: object, least: int, most: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _numbers(where: str, key: str, value: object) -> list[int]:
    if not is_array(value) or len(value) > MAX_AXES:
        raise FormatError(f"{where}: {key} is {value!r:.80}", f"a list of at most {MAX_AXES}")
    found: list[int] = []
    for item in value:
        if not _whole(item, -1, MAX_DEVICES):
            raise FormatError(f"{where}: {key} has {item!r:.80}", "whole numbers from -1 on")
        found.append(int(item))
    return found
