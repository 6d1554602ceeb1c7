"""Targets in several runs of a file, parts of packed tensors, transposed sources: as plans."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmconvert.errors import LayoutError, TensorError
from mmconvert.executor.execute import jobs_of
from mmconvert.executor.jobs import run_jobs
from mmconvert.executor.pieces import in_pieces
from mmconvert.formats.containers.ckpt import read_ckpt
from mmconvert.formats.containers.ckpt_layout import ckpt_image
from mmconvert.formats.containers.image import create
from mmconvert.formats.mindspore.side import Spread, device_source, device_target, whole_spread
from mmconvert.names import NO_LAYER
from mmconvert.plan.build import build
from mmconvert.plan.plan import Copy, Key, Plan, Whole, matrix
from mmconvert.plan.proof import prove
from mmconvert.sharding.slices import Slicing
from mmconvert.sharding.spans import Part, Span
from mmconvert.stored import StoredTensor, Target, transpose
from nights import examples


def read(path: Path) -> np.ndarray:
    """The one float32 tensor of a .ckpt file, whatever its pieces."""
    (t,) = read_ckpt(path).tensors
    runs = [(x.offset, x.nbytes) for x in t.extents] or [(t.offset, t.nbytes)]
    content = path.read_bytes()
    data = b"".join(content[offset : offset + nbytes] for offset, nbytes in runs)
    return np.frombuffer(data, "<f4").reshape(t.shape)


@examples(20, nightly=60)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(0, 40),
    st.booleans(),
)
def test_a_plan_into_chunks_writes_every_byte(
    rows: int, cols: int, chunk: int, seam: int, transposed: bool
) -> None:
    """Two sources, side by side, one maybe transposed, into a file cut at any element."""
    seam = min(seam, cols - 1)
    rng = np.random.default_rng(rows * cols + chunk)
    whole = rng.integers(0, 1 << 30, (rows, cols)).astype("<f4")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources: list[StoredTensor] = []
        copies: list[Copy] = []
        for i, (left, right) in enumerate([(0, seam), (seam, cols)]):
            if left == right:
                continue
            block = whole[:, left:right]
            path = folder / f"source{i}"
            path.write_bytes((block.T if transposed and i else block).tobytes())
            shape = (right - left, rows) if transposed and i else (rows, right - left)
            source = StoredTensor(f"s{i}", "F32", shape, path, 0)
            sources.append(transpose(source) if transposed and i else source)
            copies.append(Copy(len(sources) - 1, 0, 0, 0, 0, left, rows, right - left))
        plan = Plan(sources, [Target("w", "F32", (rows, cols))], copies, [])
        prove(plan)
        target = Target("w", "F32", (rows, cols))
        image = ckpt_image("x.ckpt", [target], [0], chunk=4 * chunk)
        places = create(folder, [image], [target])
        cut = in_pieces(plan, places)
        prove(cut.plan)
        assert all(place.strides is None and not place.extents for place in cut.places)
        run_jobs(jobs_of(*cut), 2)
        assert (read(folder / "x.ckpt") == whole).all()


def test_plain_targets_stay_as_they_are() -> None:
    plan = Plan([], [Target("w", "F32", (2,))], [], [])
    places = [StoredTensor("w", "F32", (2,), Path("x"), 10)]
    assert in_pieces(plan, places) == (plan, places)


# --------------------------------------------------------------------- parts of packed tensors
@pytest.mark.parametrize(
    ("part", "spans"),
    [
        (Part(1, 3), [Span(4, 0, 4)]),
        (Part(0, 3, "heads"), [Span(0, 0, 2), Span(6, 2, 2)]),
        (Part(2, 3, "heads"), [Span(4, 0, 2), Span(10, 2, 2)]),
    ],
)
def test_parts(part: Part, spans: list[Span]) -> None:
    assert part.maps([12], {"heads": 2}) == [spans]


def test_rows_that_are_no_parts() -> None:
    with pytest.raises(TensorError, match="10 rows"):
        Part(0, 3).maps([10], {})
    with pytest.raises(TensorError, match="2 groups"):
        Part(0, 3, "heads").maps([9], {"heads": 2})


def test_only_a_matrix_can_be_transposed() -> None:
    with pytest.raises(TensorError, match=r"\[2, 3, 4\]"):
        transpose(StoredTensor("w", "F32", (2, 3, 4), Path("x"), 0))


# ---------------------------------------------------------------------------------- any slicing
AXES = st.sampled_from([((), ()), ((0,), ()), ((), (0,)), ((1,), (0,)), ((1, 0), ()), ((), (1,))])


@examples(40, nightly=100)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    AXES,
    st.sampled_from([0, -1]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    AXES,
    st.integers(1, 2),
)
def test_from_any_slicing_to_any_other(
    before: tuple[int, int],
    axes: tuple[tuple[int, ...], ...],
    optimizer: int,
    after: tuple[int, int],
    new_axes: tuple[tuple[int, ...], ...],
    stages: int,
) -> None:
    """Every element is written once and used, and what is in several slices is compared."""
    key = Key("w", NO_LAYER)
    shape = (36, 36)
    wholes = {key: Whole(shape, "F32")}
    old = Spread([{key: Slicing(before, axes, optimizer)}] * stages, before[0] * before[1])
    new = Spread([{key: Slicing(after, new_axes)}], after[0] * after[1])
    target, held = device_target(wholes, old)
    parts = [
        {key: StoredTensor("w", "F32", target.targets[i].shape, Path(f"r{r}"), 0)}
        for r, (i,) in enumerate(held)
    ]
    source = device_source(parts, old)
    assert source.wholes[key].shape == shape
    plan = build(source, device_target(wholes, new)[0])
    prove(plan)
    read_rows = {(c.src, c.src_row, c.src_col) for c in plan.copies}
    assert len(plan.replicas) > 0 or len(source.wholes[key].copies) == 1, read_rows
    prove(build(source, device_target(wholes, whole_spread({key: shape}))[0]))


def test_a_turned_source() -> None:
    """What is stored as [in, out] in slices becomes a whole of [out, in]."""
    key = Key("w", NO_LAYER)
    spread = Spread([{key: Slicing((2,), ((0,), ()))}], 2)
    parts = [{key: StoredTensor("w", "F32", (3, 4), Path(f"r{r}"), 0)} for r in range(2)]
    side = device_source(parts, spread, frozenset({"w"}))
    assert side.wholes[key].shape == (4, 6)
    assert [t.shape for t in side.stored] == [(4, 3), (4, 3)]
    (blocks,) = side.wholes[key].copies
    assert [(b.whole_row, b.whole_col, b.rows, b.cols) for b in blocks] == [
        (0, 0, 4, 3),
        (0, 3, 4, 3),
    ]


def test_what_does_not_divide_is_refused() -> None:
    key = Key("w", NO_LAYER)
    spread = Spread([{key: Slicing((4,), ((0,), ()))}], 4)
    with pytest.raises(LayoutError, match=r"w: dimension 0 of \[6, 2\]"):
        device_target({key: Whole((6, 2), "F32")}, spread)
    with pytest.raises(LayoutError, match="on no device: v"):
        device_target({Key("v", NO_LAYER): Whole((6, 2), "F32")}, spread)


def test_a_large_transpose(tmp_path: Path) -> None:
    """Above the size of a band, and not square: read in several."""
    rng = Random(1)
    rows, cols = 1500, 3001
    data = np.frombuffer(rng.randbytes(rows * cols * 4), "<u4").reshape(rows, cols)
    (tmp_path / "s").write_bytes(data.tobytes())
    source = transpose(StoredTensor("s", "F32", (rows, cols), tmp_path / "s", 0))
    target = Target("t", "F32", (cols, rows))
    plan = Plan([source], [target], [Copy(0, 0, 0, 0, 0, 0, *matrix(target.shape))], [])
    (tmp_path / "t").write_bytes(bytes(rows * cols * 4))
    place = StoredTensor("t", "F32", (cols, rows), tmp_path / "t", 0)
    run_jobs(jobs_of(plan, [place]), 2)
    assert (tmp_path / "t").read_bytes() == data.T.tobytes()
