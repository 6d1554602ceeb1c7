"""MindSpore strategy files and the slices they mean."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmconvert.errors import CheckpointError, FormatError, LayoutError, MMConvertError
from mmconvert.formats.mindspore.folder import read_strategies
from mmconvert.formats.mindspore.strategy import Strategy, read_strategy
from mmconvert.formats.mindspore.strategy_writer import (
    encode_strategy,
    merge_strategies,
    strategy_json,
)
from mmconvert.sharding.slices import Slicing, slice_parts
from mscodec import blob, num
from nights import examples

DP2_MP2 = (2, 2)
SLICINGS = {
    "wq": Slicing(DP2_MP2, ((0,), ()), -1),
    "wo": Slicing(DP2_MP2, ((), (0,))),
    "norm": Slicing(DP2_MP2, ((),)),
    "lm_head": Slicing((4,), ((0,), ())),
    "both": Slicing(DP2_MP2, ((1, 0), ())),
    "bias over both": Slicing(DP2_MP2, ((1, 0),)),
    "partly": Slicing((2, 2, 2), ((0,), ()), 2),
}


def layout_item(name: str, *parts: bytes) -> bytes:
    return blob(3, blob(1, name.encode()), blob(2, *parts))


def sizes(*numbers: int) -> bytes:
    return b"".join(num(1, n) for n in numbers)


def read(content: bytes | str, folder: Path) -> Strategy:
    path = folder / ("s.json" if isinstance(content, str) else "s.ckpt")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_strategy(path)


def rule(array: np.ndarray, s: Slicing, rank: int) -> np.ndarray:
    """The rule of MindSpore, done with arrays."""
    rank %= prod(s.devices)
    place = np.unravel_index(rank, s.devices)
    used = set()
    for dim, axes in enumerate(s.axes):
        parts, index = 1, 0
        for axis in axes:
            at = len(s.devices) - 1 - axis
            used.add(at)
            parts, index = parts * s.devices[at], index * s.devices[at] + int(place[at])
        array = np.split(array, parts, axis=dim)[index]
    if s.optimizer:
        left = [i for i in range(len(s.devices)) if i not in used]
        position = 0
        for i in left:
            position = position * s.devices[i] + int(place[i])
        size = prod(s.devices[i] for i in left) if s.optimizer == -1 else s.optimizer
        array = np.split(array, size, axis=0)[position % size]
    return array


def cut(array: np.ndarray, s: Slicing, rank: int) -> np.ndarray:
    """What ``box`` and ``slice_parts`` say, both tensors seen as matrices."""
    box = s.box(array.shape, rank)
    shape = [span.length for span in box]
    whole = array.reshape(array.shape[0] if array.shape else 1, -1)
    found = np.full((shape[0] if shape else 1, prod(shape[1:])), -1)
    for part in slice_parts(box, array.shape):
        found[:, part.col : part.col + part.cols] = whole[
            part.whole_row : part.whole_row + part.rows,
            part.whole_col : part.whole_col + part.cols,
        ]
    return found.reshape(shape)


@st.composite
def slicings(draw: st.DrawFn, dims: int) -> Slicing:
    devices = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    axes: list[list[int]] = [[] for _ in range(dims)]
    for axis in draw(st.permutations(range(len(devices)))):
        dim = draw(st.integers(-1, dims - 1))
        if dim >= 0:
            axes[dim].append(axis)
    plain = Slicing(devices, tuple(map(tuple, axes)))
    expected = [0, -1, *(n for n in range(1, 9) if plain.repeated % n == 0)]
    return Slicing(devices, plain.axes, draw(st.sampled_from(expected)))


@examples(100, nightly=300)
@given(st.data(), st.integers(0, 4))
def test_slices_are_those_of_mindspore(data: st.DataObject, dims: int) -> None:
    s = data.draw(slicings(dims))
    more = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    shape = [s.parts(d) * more[d] * (s.optimizer_parts if d == 0 else 1) for d in range(dims)]
    assume(prod(shape) < 20_000)
    array = np.arange(prod(shape)).reshape(shape)
    pieces = [cut(array, s, rank) for rank in range(s.ranks)]
    for rank, piece in enumerate(pieces):
        assert np.array_equal(piece, rule(array, s, rank) if dims else array)
        assert np.array_equal(piece, cut(array, s, rank + s.ranks))
    elements = np.sort(np.concatenate([p.ravel() for p in pieces]))
    assert np.array_equal(elements, np.repeat(np.arange(prod(shape)), s.copies))


def test_slices_of_qwen_vl() -> None:
    """dp 2, mp 2: ranks 0 and 2 hold the same half, unless the optimizer halves it again."""
    assert [SLICINGS["wq"].box((8, 4), r)[0].whole for r in range(4)] == [0, 4, 2, 6]
    assert [SLICINGS["wo"].box((8, 4), r)[1].whole for r in range(4)] == [0, 2, 0, 2]
    assert [SLICINGS["lm_head"].box((8, 4), r)[0].whole for r in range(4)] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("slicing", "shape", "words"),
    [
        (SLICINGS["wq"], (6, 4), "dimension 0 of [6, 4] does not divide into 4 parts"),
        (SLICINGS["wo"], (8, 3), "dimension 1 of [8, 3] does not divide into 2 parts"),
        (SLICINGS["wo"], (8,), "has 1 dimensions, its tensor map 2"),
        (Slicing((2, 2), ((2,), ())), (8, 8), "names the axes [2] of 2"),
        (Slicing((2, 2), ((0,), (0,))), (8, 8), "names the axes [0, 0] of 2"),
        (Slicing((), ((),)), (8,), "the device matrix is []"),
        (Slicing((0,), ((),)), (8,), "the device matrix is [0]"),
        (Slicing((4,), ((),), 3), (12,), "the optimizer splits over 3 devices, and 4 hold"),
        (Slicing((4,), ((),), -2), (12,), "the optimizer splits over -2 devices"),
    ],
)
def test_slices_that_cannot_be(slicing: Slicing, shape: Sequence[int], words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        slicing.box(shape, 0, "w")
    assert words in caught.value.what


# -------------------------------------------------------------------------------------- files
def test_a_file_as_mindspore_writes_it(tmp_path: Path) -> None:
    """The bytes of ParallelStrategyMap.SerializeToString, spelled out."""
    expected = (
        num(1, 1)
        + blob(2, blob(1, b"mmconvert"), blob(2, num(1, 3)))
        + layout_item(
            "wq",
            *(blob(1, sizes(2, 2)), blob(2, sizes(0, -1)), blob(3), blob(4)),
            *(num(5, 0), num(6, 2), num(7, -1)),
        )
    )
    strategy = Strategy({3: {"wq": SLICINGS["wq"]}})
    assert encode_strategy(strategy) == expected
    assert read(expected, tmp_path) == strategy


@pytest.mark.parametrize("as_json", [False, True])
def test_strategies_come_back(as_json: bool, tmp_path: Path) -> None:
    one = Strategy({1: {k: s for k, s in SLICINGS.items() if s.ranks == 4}})
    two = merge_strategies([Strategy({0: {"ln": Slicing((4,), ((),))}}), one, one])
    assert two.merged and list(two.stages) == [0, 1]
    for strategy in (one, two):
        text = strategy_json(strategy) if as_json else encode_strategy(strategy)
        assert read(text, tmp_path) == strategy
    assert two.devices() == 4
    assert [two.stage_of(r) for r in range(8)] == [0] * 4 + [1] * 4


@examples(50, nightly=150)
@given(st.data())
def test_any_strategy_comes_back(data: st.DataObject) -> None:
    dims = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    layouts = {f"w{i}": data.draw(slicings(d)) for i, d in enumerate(dims)}
    strategy = Strategy({data.draw(st.integers(0, 9)): layouts})
    with tempfile.TemporaryDirectory() as folder:
        for text in (encode_strategy(strategy), strategy_json(strategy)):
            assert read(text, Path(folder)) == strategy


def test_what_protobuf_allows_besides(tmp_path: Path) -> None:
    """Unknown fields, numbers in five bytes, other strategies of operators, packed sizes."""
    content = layout_item(
        "w",
        *(num(7, 0), num(6, 0), num(9, 4), blob(4), blob(2, blob(1, b"\0\xff\xff\xff\xff\x0f"))),
        blob(1, blob(1, b"\2\2")),
    )
    content += blob(2, blob(1, b"MatMul"), blob(2, num(1, 0), blob(2, sizes(2, 2)))) + num(8, 1)
    assert read(content, tmp_path).stages == {0: {"w": Slicing((2, 2), ((0,), ()))}}


ONE = (blob(1, sizes(2)), blob(2, sizes(0)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "names no tensors"),
        (num(1, 1), "names no tensors"),
        (num(3, 1), "field 3 has wire type 0"),
        (blob(3, blob(1, b"w")), "a name without a layout"),
        (blob(3, blob(2, *ONE)), "a layout without a name"),
        (layout_item("w", *ONE)[:-1], "claims"),
        (layout_item("w", *ONE) * 2, "w occurs twice"),
        (layout_item("0-w", *ONE) + layout_item("00-w", *ONE), "00-w occurs twice"),
        (layout_item("9999-w", *ONE), "is on stage 9999"),
        (layout_item("w", ONE[0], blob(2, sizes(1))), "names the axes [1] of 1"),
        (layout_item("w", ONE[0], blob(2, sizes(-2))), "names the axes [-2] of 1"),
        (layout_item("w", blob(1, sizes(0)), ONE[1]), "has the device matrix [0]"),
        (layout_item("w", blob(1, sizes(2**24, 2)), ONE[1]), "has the device matrix"),
        (layout_item("w", ONE[1]), "has 0 device matrices"),
        (layout_item("w", ONE[0], *ONE), "has 2 device matrices"),
        (layout_item("w", blob(1, sizes(*[1] * 20)), ONE[1]), "more than 16 sizes"),
        (layout_item("w", *ONE, num(6, 1), num(7, 2)), "the optimizer splits over 2 devices"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "is not an object"),
        ('{"parallel_layout_item": {}}', "names no tensors"),
        ('{"parallel_layout_item": {"w": 1}}', "is not an object"),
        ('{"parallel_layout_item": {"w": {}}}', "dev_matrix is None"),
        ('{"parallel_layout_item": {"w": {"dev_matrix": [2], "tensor_map": ["0"]}}}', "has '0'"),
        ('{"parallel_layout_item": {"w": {"dev_matrix": [true], "tensor_map": []}}}', "has True"),
        ('{"parallel_layout_item": {}, "parallel_strategy_item": {"a": {"stage": -1}}}', "stage"),
    ],
)
def test_hostile_files(content: bytes | str, words: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read(content, tmp_path)
    assert words in caught.value.what


def test_slices_by_hand_are_refused_by_name(tmp_path: Path) -> None:
    for more in (blob(3, sizes(5, 3)), blob(4, sizes(1)), num(5, 4)):
        with pytest.raises(LayoutError, match="w is sliced by hand"):
            read(layout_item("w", *ONE, more), tmp_path)
    twin = {"dev_matrix": [2], "tensor_map": [0], "param_split_shape": [5, 3]}
    with pytest.raises(LayoutError, match="w is sliced by hand"):
        read(json.dumps({"parallel_layout_item": {"w": twin}}), tmp_path)


def test_stages_that_do_not_fit() -> None:
    a, b = (Strategy({0: {"w": SLICINGS[name]}}) for name in ("wq", "wo"))
    with pytest.raises(LayoutError, match="differ about pipeline stage 0"):
        merge_strategies([a, b])
    with pytest.raises(LayoutError, match="strategies for the pipeline stages 1"):
        merge_strategies([Strategy({1: {"w": SLICINGS["wq"]}})])
    with pytest.raises(LayoutError, match="is for 2, 4 devices"):
        Strategy({0: {"a": SLICINGS["wq"], "b": Slicing((2,), ((),))}}).devices()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_strategy(tmp_path / "s.ckpt")
    os.mkfifo(tmp_path / "ckpt_strategy_rank_0.ckpt")
    with pytest.raises(CheckpointError, match="pipe"):
        read_strategy(tmp_path / "ckpt_strategy_rank_0.ckpt")
    with pytest.raises(CheckpointError, match="pipe"):
        read_strategies(tmp_path)


@examples(130, nightly=400)
@given(st.data())
def test_damage_is_an_error_or_a_strategy(data: st.DataObject) -> None:
    layouts = {k: s for k, s in SLICINGS.items() if s.ranks == 4}
    content = bytearray(encode_strategy(Strategy({2: layouts})))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = read(bytes(content), Path(folder))
        except MMConvertError:
            return
    for stage in found.stages.values():
        for name, slicing in stage.items():
            slicing.check(len(slicing.axes), name)
