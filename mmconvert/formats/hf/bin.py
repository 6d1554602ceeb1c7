"""Weight files ``pytorch_model*.bin``: what torch.save wrote, read as data."""

from __future__ import annotations

from pathlib import Path

from mmconvert.errors import CheckpointError, FormatError
from mmconvert.formats.containers.damage import explained
from mmconvert.formats.containers.safetensors import WeightFile, read_weight_file
from mmconvert.stored import StoredTensor

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
SUFFIX = ".bin"
# What transformers writes into safetensors files that it makes of such ones.
METADATA = {"format": "pt"}


def read_bin(path: Path) -> WeightFile:
    """Reads the places of a file's tensors. Nothing that its pickle names is imported or run.

    Raises:
        FormatError: damaged, not of torch.save's zip format, or not a dict of tensors.
        CheckpointError: it cannot be read.
    """
    from mmconvert.causes.tensors import nested  # with what pickles take, of use here alone
    from mmconvert.formats.containers.pickles import Inert
    from mmconvert.formats.containers.ptfile import read_pt

    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty", "a weight file", "download it again")
    content = read_pt(path).content
    if (fault := nested(path, content)) is not None:
        raise fault
    tensors: list[StoredTensor] = []
    for name, value in content.items():
        if isinstance(value, StoredTensor):
            tensors.append(value)
            continue
        kind = "something that names code" if isinstance(value, Inert) else type(value).__name__
        raise FormatError(
            f"{path}: {name[:80]!r} is not a tensor but {kind}",
            "a dict of tensors alone, as a model's state_dict is",
            "download the file again from the model's page",
        )
    if not tensors:
        raise FormatError(f"{path}: there are no tensors in it", "a dict of tensors")
    return WeightFile(path, b"", dict(METADATA), tensors)


def read_weights(path: Path) -> WeightFile:
    """Reads a weight file of either kind, by the ending of its name.

    Raises:
        CheckpointError: as :func:`read_bin`; it says whether the file is cut off.
    """
    with explained(path, "weight-file"):
        return read_bin(path) if path.name.endswith(SUFFIX) else read_weight_file(path)


def as_safetensors(name: str) -> str:
    """The name of the safetensors file that stands for a ``.bin`` file."""
    stem = name.removesuffix(SUFFIX)
    return "model" + stem.removeprefix("pytorch_model") + ".safetensors"
