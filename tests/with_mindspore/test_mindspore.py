"""Our files against the real MindSpore, on the CPU, in an interpreter of its own.

make mindspore-env
MMCONVERT_MINDSPORE_PYTHON=.venv-mindspore/bin/python .venv/bin/pytest -m mindspore
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from mmconvert.errors import FormatError
from mmconvert.formats.containers.ckpt import DTYPES, check_crc, read_ckpt
from mmconvert.formats.containers.ckpt_layout import ckpt_image, rectangles
from mmconvert.formats.containers.image import create, finish
from mmconvert.formats.mindspore.strategy import Strategy, read_strategy
from mmconvert.formats.mindspore.strategy_writer import (
    encode_strategy,
    merge_strategies,
    strategy_json,
)
from mmconvert.sharding.slices import Slicing
from mmconvert.stored import Target
from msask import MARKS, ask
from mscodec import KINDS, Named, ckpt, tensor, with_crc

pytestmark = MARKS

TENSORS = [
    tensor("llm_model.transformer.wte.embedding_weight", "BFloat16", (32, 8)),
    tensor("llm_model.transformer.layers.0.attention.wq.weight", "Float16", (16, 8)),
    tensor("llm_model.transformer.layers.0.attention.wo.weight", "Float32", (8, 16)),
    tensor("vision_encoder.ln_pre.gamma", "Float32", (8,)),
    tensor("vision_encoder.conv1.weight", "Float16", (4, 3, 2, 2)),
    tensor("step_num", "Int64", ()),
    tensor("flag", "Bool", (3,)),
]


def described(tensors: Sequence[Named]) -> dict[str, list[Any]]:
    """As the oracle describes them."""
    return {
        t.tag: [t.kind, list(t.shape), hashlib.sha256(t.data).hexdigest()[:16]] for t in tensors
    }


def entries(tensors: Sequence[Named]) -> list[Target]:
    return [Target(t.tag, DTYPES[t.kind], t.shape) for t in tensors]


def write(path: Path, tensors: Sequence[Named], *, crc: bool = False) -> None:
    """A file of ours."""
    targets = entries(tensors)
    images = [ckpt_image(path.name, targets, range(len(targets)), crc=crc)]
    stored = create(path.parent, images, targets)
    with path.open("r+b") as file:
        for t, place in zip(tensors, stored, strict=True):
            for _, _, piece in rectangles(place):
                file.seek(piece.offset)
                file.write(t.data)
    finish(path.parent, images)


# ---------------------------------------------------------------------------------- .ckpt files
def test_our_files_are_byte_for_byte_those_of_save_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(ckpt(TENSORS))
    ask("save", tmp_path / "x.ckpt", tmp_path)
    for name, crc in (("plain", False), ("crc", True)):
        write(tmp_path / f"our_{name}.ckpt", TENSORS, crc=crc)
        theirs = (tmp_path / f"{name}.ckpt").read_bytes()
        assert (tmp_path / f"our_{name}.ckpt").read_bytes() == theirs
        found = read_ckpt(tmp_path / f"{name}.ckpt")
        assert [t.name for t in found.tensors] == [t.tag for t in TENSORS]
        check_crc(found)


def test_our_files_load(tmp_path: Path) -> None:
    write(tmp_path / "x.ckpt", TENSORS, crc=True)
    assert ask("load", tmp_path / "x.ckpt", "crc") == described(TENSORS)


def test_pieces_of_odd_sizes_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(with_crc(ckpt(TENSORS, [101, 7, 30])))
    assert ask("load", path, "crc") == described(TENSORS)
    assert [t.nbytes for t in read_ckpt(path).tensors] == [len(t.data) for t in TENSORS]


@pytest.mark.nightly
def test_a_file_above_512_mib(tmp_path: Path) -> None:
    """Two pieces; the second ends inside a row. The data are holes, but for a mark in each."""
    shape = (70_001, 4_099)
    expected = [Named("big", "Float16", shape, b""), tensor("after", "Float32", (5,))]
    targets = entries(expected)
    big, after = create(tmp_path, [ckpt_image("x.ckpt", targets, [0, 1])], targets)
    assert [e.nbytes for e in big.extents] == [2**29, 2 * 70_001 * 4_099 - 2**29]
    with (tmp_path / "x.ckpt").open("r+b") as file:
        for extent, mark in zip(big.extents, (b"\1\2", b"\3\4"), strict=True):
            file.seek(extent.offset)
            file.write(mark)
        file.seek(after.offset)
        file.write(expected[1].data)
    found = ask("load", tmp_path / "x.ckpt", "")
    data = np.zeros(shape, "<u2").reshape(-1)
    data[0], data[2**28] = 0x0201, 0x0403
    assert found["big"] == [
        "Float16",
        list(shape),
        hashlib.sha256(data.data).hexdigest()[:16],
    ]
    assert found["after"] == described(expected[1:])["after"]
    (tmp_path / "theirs").mkdir()
    ask("save", tmp_path / "x.ckpt", tmp_path / "theirs")
    done = subprocess.run(["cmp", tmp_path / "x.ckpt", tmp_path / "theirs" / "plain.ckpt"])
    assert done.returncode == 0


def test_what_protobuf_refuses_we_refuse(tmp_path: Path) -> None:
    """And what both read, holds the same. We may refuse more."""
    random = Random(7)
    base = ckpt(TENSORS[3:], [50, 9])
    for number in range(600):
        content = bytearray(base)
        for _ in range(random.randint(1, 2)):
            at = random.randrange(len(content))
            if random.random() < 0.8:
                content[at] = random.randrange(256)
            else:
                del content[at : at + random.randint(1, 40)]
        (tmp_path / f"{number:03}").write_bytes(content)
    theirs = ask("parse", tmp_path)
    both = 0
    for name, values in theirs.items():
        try:
            found = read_ckpt(tmp_path / name)
        except FormatError:
            continue
        assert values is not None, name
        data: dict[str, str] = {}
        for tag, _, kind, content in values:
            if kind in DTYPES:
                data[tag] = data.get(tag, "") + content
        assert [t.name for t in found.tensors] == list(data)
        assert [t.nbytes for t in found.tensors] == [len(c) // 2 for c in data.values()]
        both += 1
    refused = sum(values is None for values in theirs.values())
    assert both > 50 and refused > 50, (both, refused)


# ----------------------------------------------------------------------------------- strategies
MODEL = {
    "wq.weight": ("BFloat16", (16, 8)),
    "wo.weight": ("Float32", (8, 16)),
    "norm.weight": ("Float16", (8,)),
    "wte": ("Float16", (32, 8)),
    "lm_head": ("BFloat16", (32, 8)),
    "conv1": ("Float32", (8, 3, 2, 2)),
}


def slicings(dp: int, mp: int, *, vocab_dp: bool = False, opt: bool = False) -> dict[str, Slicing]:
    devices, split = (dp, mp), -1 if opt else 0
    return {
        "wq.weight": Slicing(devices, ((0,), ()), split),
        "wo.weight": Slicing(devices, ((), (0,)), split),
        "norm.weight": Slicing(devices, ((),)),
        "wte": Slicing(devices, ((), ()) if vocab_dp else ((0,), ())),
        "lm_head": Slicing((dp * mp,), ((), ()) if vocab_dp else ((0,), ())),
        "conv1": Slicing(devices, ((), (), (), ()), split),
    }


LAYOUTS = {
    "mp2": slicings(1, 2),
    "mp4": slicings(1, 4),
    "dp2mp2": slicings(2, 2),
    "vocab_emb_dp": slicings(2, 2, vocab_dp=True),
    "dp2mp2opt": slicings(2, 2, opt=True),
    "dp4opt": slicings(4, 1, opt=True),
}


def whole() -> list[Named]:
    return [tensor(name, kind, shape) for name, (kind, shape) in MODEL.items()]


def sliced(layouts: Mapping[str, Slicing], rank: int) -> list[Named]:
    """What a rank holds, by our rule."""
    found: list[Named] = []
    for t in whole():
        if t.tag not in layouts:
            continue
        box = layouts[t.tag].box(t.shape, rank, t.tag)
        bits = np.frombuffer(t.data, f"V{np.dtype(KINDS[t.kind]).itemsize}").reshape(t.shape)
        part = bits[tuple(slice(s.whole, s.whole + s.length) for s in box)]
        found.append(Named(t.tag, t.kind, part.shape, part.tobytes()))
    return found


def write_ranks(folder: Path, layouts: Sequence[Mapping[str, Slicing]]) -> None:
    """rank_R/checkpoint_R.ckpt for every stage."""
    for stage, part in enumerate(layouts):
        size = Strategy({0: part}).devices()
        for rank in range(stage * size, (stage + 1) * size):
            (folder / f"rank_{rank}").mkdir(parents=True)
            write(folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", sliced(part, rank))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transform_checkpoints_both_ways(layout: str, tmp_path: Path) -> None:
    """Full to slices: its slices are ours. Our slices and strategy to full: bit for bit."""
    layouts = LAYOUTS[layout]
    strategy = Strategy({0: layouts})
    (tmp_path / "s.ckpt").write_bytes(encode_strategy(strategy))
    (tmp_path / "s.json").write_text(strategy_json(strategy))
    again = ask("strategies", tmp_path / "s.ckpt")["again"]
    assert bytes.fromhex(again) == encode_strategy(strategy)
    (tmp_path / "full" / "rank_0").mkdir(parents=True)
    write(tmp_path / "full" / "rank_0" / "full.ckpt", whole())
    expected = {f"rank_{r}": described(sliced(layouts, r)) for r in range(strategy.devices())}
    for suffix in ("ckpt", "json"):
        out = tmp_path / f"slices_{suffix}"
        got = ask("transform", tmp_path / "full", out, "-", tmp_path / f"s.{suffix}")
        assert got == expected
    write_ranks(tmp_path / "ours", [layouts])
    got = ask("transform", tmp_path / "ours", tmp_path / "back", tmp_path / "s.ckpt", "-")
    assert got == {"rank_0": described(whole())}


def test_pipeline_stages(tmp_path: Path) -> None:
    """pp 2, mp 2: our files of stages merge as theirs do, to a full checkpoint and to mp 4."""
    layouts = LAYOUTS["mp2"]
    last = ("lm_head", "norm.weight")
    parts = [
        {k: v for k, v in layouts.items() if k not in last},
        {k: v for k, v in layouts.items() if k in last},
    ]
    write_ranks(tmp_path / "ours", parts)
    (tmp_path / "strategy").mkdir()
    strategies = [Strategy({stage: part}) for stage, part in enumerate(parts)]
    for rank in range(4):
        path = tmp_path / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt"
        path.write_bytes(encode_strategy(strategies[rank // 2]))
    assert ask("merge", tmp_path / "strategy", tmp_path / "theirs.ckpt") == {"ok": True}
    merged = merge_strategies(read_strategy(p) for p in sorted((tmp_path / "strategy").iterdir()))
    assert read_strategy(tmp_path / "theirs.ckpt").stages == merged.stages
    (tmp_path / "m.ckpt").write_bytes(encode_strategy(merged))
    got = ask("transform", tmp_path / "ours", tmp_path / "back", tmp_path / "m.ckpt", "-")
    assert got == {"rank_0": described(whole())}
    (tmp_path / "mp4.ckpt").write_bytes(encode_strategy(Strategy({0: LAYOUTS["mp4"]})))
    out = tmp_path / "mp4"
    got = ask("transform", tmp_path / "ours", out, tmp_path / "m.ckpt", tmp_path / "mp4.ckpt")
    assert got == {f"rank_{r}": described(sliced(LAYOUTS["mp4"], r)) for r in range(4)}


def test_splits_over_several_axes(tmp_path: Path) -> None:
    """Dimensions split over two axes of the matrix, a part of the optimizer's devices."""
    layouts = {
        "wq.weight": Slicing((2, 2), ((1, 0), ())),
        "wo.weight": Slicing((2, 2), ((), (0, 1))),
        "norm.weight": Slicing((2, 2), ((1, 0),)),
        "wte": Slicing((4, 1), ((), ()), 2),
    }
    (tmp_path / "s.ckpt").write_bytes(encode_strategy(Strategy({0: layouts})))
    (tmp_path / "full" / "rank_0").mkdir(parents=True)
    tensors = [t for t in whole() if t.tag in layouts]
    write(tmp_path / "full" / "rank_0" / "full.ckpt", tensors)
    got = ask("transform", tmp_path / "full", tmp_path / "out", "-", tmp_path / "s.ckpt")
    assert got == {f"rank_{r}": described(sliced(layouts, r)) for r in range(4)}
