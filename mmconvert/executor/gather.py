"""Jobs that put targets together in a buffer, whatever they are made of, and write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mmconvert.executor.bands import cut, steps
from mmconvert.executor.blockio import (
    Region,
    Window,
    is_transposed,
    read_compact,
    read_region,
    rect_offset,
    row_bytes,
    rows_range,
)
from mmconvert.executor.casts import Loss, LossByTensor
from mmconvert.executor.differences import place
from mmconvert.executor.fileio import BAND, BUFFERS, Files, write_pieces
from mmconvert.executor.jobs import Job
from mmconvert.executor.replicas import Pairs, Replicas
from mmconvert.plan.plan import Copy, matrix
from mmconvert.stored import ITEM_SIZE, Scales, StoredTensor

if TYPE_CHECKING:
    from mmconvert.executor.rounding import Cast

MOST_SMALL = 32  # tensors of one job
# Bytes of a target that is put together from a transposed source: each of its columns is a run of
# the source, which should not be too short to read.
TRANSPOSED_BAND = 8 << 20
# Bytes of a target whose values are cast: numpy makes several arrays of each band, and the C
# library gives larger ones back to the system each time: fp32 to bf16 took three times as long.
CAST_BAND = 512 << 10


class Origin(NamedTuple):
    """What targets are put together from.

    Attributes:
        sources: the plan's.
        repeats: (source, target) of copies that write once more what another target has too, such
            as a norm on every tensor-parallel rank: what their casts lose is counted already.
        replicas: what is compared with sources on the way.
    """

    sources: Sequence[StoredTensor]
    repeats: Pairs
    replicas: Replicas


def gathers(
    origin: Origin, target: StoredTensor, copies: Sequence[Copy], size: int
) -> Iterator[Job]:
    """The jobs that put one target together, each about ``size`` bytes of it."""
    for top, bottom in steps(0, matrix(target.shape)[0], row_bytes(target), size):
        yield _gather_job(origin, target, cut(copies, top, bottom, source=False), top, bottom)


def _gather_job(
    origin: Origin, target: StoredTensor, copies: list[Copy], top: int, bottom: int
) -> Job:
    def run(files: Files) -> LossByTensor:
        tally = _Tally()
        _gather_rows(files, origin, target, copies, (top, bottom), tally)
        return tally.losses

    nbytes = (bottom - top) * row_bytes(target)
    path = str(target.path)
    reads = tuple(r for c in copies for r in rows_range(origin.sources[c.src], c.src_row, c.rows))
    return Job((path,), (path, rect_offset(target, top, 0)), nbytes, run, reads, mixed=True)


def _gather_rows(
    files: Files,
    origin: Origin,
    target: StoredTensor,
    copies: Sequence[Copy],
    rows: tuple[int, int],
    tally: _Tally,
) -> None:
    """Puts rows of a target together and writes them, band by band."""
    size = _band_size([origin.sources[c.src] for c in copies], target)
    for begin, end in steps(*rows, row_bytes(target), size):
        part = cut(copies, begin, end, source=False)
        _gather(files, origin, target, part, (begin, end), tally)


def _band_size(sources: Sequence[StoredTensor], target: StoredTensor) -> int:
    if any(is_transposed(source) for source in sources):
        return TRANSPOSED_BAND
    return BAND if all(source.dtype == target.dtype for source in sources) else CAST_BAND


def _gather(
    files: Files,
    origin: Origin,
    target: StoredTensor,
    copies: Sequence[Copy],
    band_rows: tuple[int, int],
    tally: _Tally,
) -> None:
    """Puts a band of a target together and writes it."""
    top, bottom = band_rows
    line, item = row_bytes(target), ITEM_SIZE[target.dtype]
    band = BUFFERS.get("band", (bottom - top) * line)
    if sum(c.rows * c.cols for c in copies) * item < len(band):
        band[:] = bytes(len(band))  # the rest are fills; the buffer still holds another tensor
    for c in copies:
        region = Region(c.src_row, c.src_col, c.rows, c.cols)
        window = Window(band, (c.dst_row - top) * line + c.dst_col * item, line, "band")
        source = origin.sources[c.src]
        if source.dtype == target.dtype:
            read_region(files, source, region, window)
            whole = window.pieces(c.rows, c.cols * item)
            origin.replicas.look(files, c, whole[0] if len(whole) == 1 else None)
            continue
        origin.replicas.look(files, c, None)
        loss = _read_cast(files, source, region, target.dtype, window)
        if (c.src, c.dst) not in origin.repeats:
            tally.add(place(source), loss)
    write_pieces(files, target.path, rect_offset(target, top, 0), [band])


class _Tally:
    """What the casts of one job have lost."""

    def __init__(self) -> None:
        self.losses: dict[str, Loss] = {}

    def add(self, name: str, loss: Loss) -> None:
        if any(loss):
            known = self.losses.get(name, Loss(0, 0))
            self.losses[name] = Loss(*(a + b for a, b in zip(known, loss, strict=True)))


def _read_cast(
    files: Files, source: StoredTensor, region: Region, dtype: str, window: Window
) -> Loss:
    """Reads a region of a source in another dtype into the rows of a window."""
    from mmconvert.executor.rounding import cast

    data = read_compact(files, source, region, "cast")
    if source.scales is not None:
        found = _dequantised(files, source.scales, data, region, dtype)
    else:
        found = cast(data, source.dtype, dtype)
    width = region.cols * ITEM_SIZE[dtype]
    if region.cols == 1 < region.rows:
        window.fill_column(found.bits, region.rows, ITEM_SIZE[dtype])
        return Loss(found.overflowed, found.underflowed)
    for row in range(region.rows):
        window.row(row, width)[:] = found.bits[row * width : (row + 1) * width]
    return Loss(found.overflowed, found.underflowed)


def _dequantised(
    files: Files, scales: Scales, data: memoryview, region: Region, dtype: str
) -> Cast:
    """The values of a region of scaled fp8."""
    from mmconvert.executor.rounding import BlockNumbers, dequantise

    first = (region.row // scales.rows, region.col // scales.cols)
    down = [(region.row + i) // scales.rows - first[0] for i in range(region.rows)]
    right = [(region.col + i) // scales.cols - first[1] for i in range(region.cols)]
    met = Region(*first, down[-1] + 1, right[-1] + 1)
    factors = read_compact(files, scales.tensor, met, "scales")
    return dequantise(data, factors, scales.tensor.dtype, BlockNumbers(down, right), dtype)


def batches(
    origin: Origin, small: list[tuple[StoredTensor, list[Copy]]], most: int
) -> Iterator[Job]:
    """Small targets of one file, put together into jobs that are worth starting."""
    small.sort(key=lambda item: (str(item[0].path), item[0].offset))
    batch: list[tuple[StoredTensor, list[Copy]]] = []
    size = 0
    for target, copies in small:
        full = size >= most or len(batch) == MOST_SMALL
        if batch and (full or batch[0][0].path != target.path):
            yield _batch_job(origin, batch, size)
            batch, size = [], 0
        batch.append((target, copies))
        size += target.nbytes
    if batch:
        yield _batch_job(origin, batch, size)


def _batch_job(origin: Origin, batch: list[tuple[StoredTensor, list[Copy]]], size: int) -> Job:
    def run(files: Files) -> LossByTensor:
        tally = _Tally()
        for target, copies in batch:
            _gather_rows(files, origin, target, copies, (0, matrix(target.shape)[0]), tally)
        return tally.losses

    path = str(batch[0][0].path)
    return Job((path,), (path, batch[0][0].offset), size, run, mixed=True)
