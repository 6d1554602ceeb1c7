"""A checkpoint of any format as a mapping of names to tensors, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.config import Options, ParallelConfig
from mmconvert.errors import CheckpointError
from mmconvert.executor.blockio import Region, Window, read_region
from mmconvert.executor.fileio import open_files
from mmconvert.formats.hf.folder import open_hf
from mmconvert.formats.mm.model import mm_model
from mmconvert.formats.mm.source import mm_source
from mmconvert.formats.recognise import family_of, is_hf
from mmconvert.formats.single import adapter_of, open_file
from mmconvert.loading import torch_tensor
from mmconvert.plan.plan import Block, Whole, matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor


class Tensors(Mapping[str, "Tensor"]):
    """Names and tensors of a checkpoint; headers are read at once, data with each ``[name]``.

    Names are those of a Hugging Face checkpoint as it stores them; of a rank file as well
    (``model0/...`` where it holds several model chunks); of an MM checkpoint MM names with the
    model's own layer numbers, each tensor put together from its ranks.
    """

    def __init__(self, wholes: Mapping[str, Whole], stored: list[StoredTensor]) -> None:
        self._wholes = wholes
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own.

        Raises:
            KeyError: no such name. CheckpointError: its file cannot be read.
        """
        whole = self._wholes[name]
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
    """Opens a Hugging Face folder, an MM folder, an adapter's folder, or one weight file of any.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if path.is_file():
        return _plain(open_file(path).tensors())
    if is_hf(path):
        return _plain(open_hf(path).tensors())
    if (adapter := adapter_of(path)) is not None:
        return _plain(open_file(adapter).tensors())
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there", "a checkpoint's folder, or a rank file")
    family = family_of(path)
    model, layout, parts = mm_model(family, path, ParallelConfig(), None, Options(), prefix="")
    side = mm_source(model.modules, model.dims, layout, parts)
    return Tensors({key.name(): whole for key, whole in side.wholes.items()}, side.stored)


def _plain(tensors: Mapping[str, StoredTensor]) -> Tensors:
    """Tensors that are stored whole."""
    wholes: dict[str, Whole] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        block = Block(number, 0, 0, 0, 0, *matrix(tensor.shape))
        wholes[name] = Whole(tensor.shape, tensor.dtype, [[block]])
    return Tensors(wholes, list(tensors.values()))
