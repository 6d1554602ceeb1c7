"""Digests of whole tensors: the same in every layout, and in Hugging Face as in MM format.

A digest is SHA-256 over the dtype, the shape and the bytes of the whole tensor as MM format has
it (vision q, k, v interleaved), row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from mmconvert.events import Events
from mmconvert.executor.blockio import Region, Window, read_region
from mmconvert.executor.fileio import BAND, BUFFERS, Files
from mmconvert.executor.jobs import Job, run_jobs
from mmconvert.plan.plan import Block, Key, Whole, matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor, transpose

ALGORITHM = "sha256 of dtype, shape and row-major bytes of the whole MM tensor"


def nbytes(whole: Whole) -> int:
    """Bytes of a whole tensor."""
    rows, cols = matrix(whole.shape)
    return rows * cols * ITEM_SIZE[whole.dtype]


def digests(
    wholes: Mapping[Key, Whole], stored: Sequence[StoredTensor], workers: int, events: Events
) -> dict[str, str]:
    """The digest of every whole tensor, by its MM name with the model's layer number.

    Args:
        stored: the tensors that the wholes' blocks refer to; the first copy of each is read.
    """
    found: dict[str, str] = {}

    def job(key: Key, whole: Whole) -> Job:
        def run(files: Files) -> tuple[str, str]:
            return key.name(), _digest(files, whole, stored)

        return Job((), (key.name(), 0), nbytes(whole), run)

    def finished(job: Job, result: tuple[str, str]) -> None:
        found.update([result])
        events.advance(job.nbytes)

    jobs = [job(key, whole) for key, whole in wholes.items()]
    jobs.sort(key=lambda job: -job.nbytes)  # the largest first, so that none is left at the end
    events.start("digests", sum(job.nbytes for job in jobs))
    run_jobs(jobs, workers, finished)
    return dict(sorted(found.items()))


def as_mm(
    wholes: Mapping[Key, Whole], places: Sequence[StoredTensor], transposed: Collection[str]
) -> tuple[dict[Key, Whole], list[StoredTensor]]:
    """Wholes as MM format has them, of a checkpoint that stores some the other way round.

    Args:
        transposed: templates of their names.
    """
    found, stored = dict(wholes), list(places)
    for key, whole in wholes.items():
        if key.mm not in transposed or len(whole.shape) != 2:
            continue
        numbers: dict[int, int] = {}
        blocks: list[Block] = []
        for b in whole.copies[0]:
            if b.tensor not in numbers:
                numbers[b.tensor] = len(stored)
                stored.append(transpose(places[b.tensor]))
            number = numbers[b.tensor]
            blocks.append(Block(number, b.col, b.row, b.whole_col, b.whole_row, b.cols, b.rows))
        found[key] = Whole((whole.shape[1], whole.shape[0]), whole.dtype, [blocks])
    return found, stored


def _digest(files: Files, whole: Whole, stored: Sequence[StoredTensor]) -> str:
    rows, cols = matrix(whole.shape)
    line = cols * ITEM_SIZE[whole.dtype]
    hashed = hashlib.sha256(f"{whole.dtype} {list(whole.shape)}\n".encode())
    step = max(1, BAND // max(1, line))
    for top in range(0, rows, step):
        bottom = min(rows, top + step)
        band = BUFFERS.get("digest", (bottom - top) * line)
        if whole.zeros:
            band[:] = bytes(len(band))
        for block in whole.copies[0]:
            _read(files, stored[block.tensor], block, Window(band, 0, line), top, bottom)
        hashed.update(band)
    return hashed.hexdigest()


def _read(
    files: Files, tensor: StoredTensor, block: Block, band: Window, top: int, bottom: int
) -> None:
    """The part of a block that lies in rows ``top`` to ``bottom`` of the whole."""
    first, last = max(top, block.whole_row), min(bottom, block.whole_row + block.rows)
    if first < last:
        region = Region(block.row + first - block.whole_row, block.col, last - first, block.cols)
        at = (first - top) * band.stride + block.whole_col * ITEM_SIZE[tensor.dtype]
        read_region(files, tensor, region, Window(band.buffer, at, band.stride))
