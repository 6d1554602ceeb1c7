"""A checkpoint of any format as a mapping of names to tensors, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.errors import TensorError
from mmconvert.executor.blockio import Region, Window, read_region
from mmconvert.executor.fileio import open_files
from mmconvert.formats.look import look
from mmconvert.loading import torch_tensor
from mmconvert.plan.dtypes import ONE_DTYPE
from mmconvert.plan.plan import Whole, matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

CONVERT = "convert it with --dtype bf16, fp16 or fp32, and open that"


class Tensors(Mapping[str, "Tensor"]):
    """Names and tensors of a checkpoint; headers are read at once, data with each ``[name]``.

    Names are those of a Hugging Face checkpoint as it stores them; of a rank file as well
    (``model0/...`` where it holds several model chunks); of an MM checkpoint MM names with the
    model's own layer numbers, each tensor put together from its ranks.
    """

    def __init__(self, wholes: Mapping[str, Whole], stored: Sequence[StoredTensor]) -> None:
        self._wholes = wholes
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own.

        Raises:
            KeyError: no such name. CheckpointError: its file cannot be read. TensorError: it is
                made of parts in several dtypes.
        """
        whole = self._wholes[name]
        if whole.mixed:
            raise TensorError(whole.mixed, ONE_DTYPE, CONVERT)
        data = bytearray(prod(whole.shape) * ITEM_SIZE[whole.dtype])
        line = matrix(whole.shape)[1] * ITEM_SIZE[whole.dtype]
        with open_files() as files:
            for b in whole.copies[0]:
                at = b.whole_row * line + b.whole_col * ITEM_SIZE[whole.dtype]
                region = Region(b.row, b.col, b.rows, b.cols)
                window = Window(memoryview(data), at, line)
                read_region(files, self._stored[b.tensor], region, window)
        return torch_tensor(data, whole.dtype, whole.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wholes)

    def __len__(self) -> int:
        return len(self._wholes)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._wholes[name].shape

    def dtype(self, name: str) -> str:
        """A tensor's dtype in safetensors' spelling, without reading it."""
        return self._wholes[name].dtype


def open_checkpoint(path: Path) -> Tensors:
    """Opens a checkpoint of any format, an adapter's folder, or one weight file of any.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found = look(path)
    return Tensors(found.wholes, found.stored)
