"""The JSON files of a checkpoint, as data."""

from __future__ import annotations

from pathlib import Path

from mmconvert.errors import FormatError
from mmconvert.formats.containers.safetensors import parse_json
from mmconvert.formats.reading import read_at_most
from mmconvert.narrow import is_object

MAX_JSON = 64 << 20  # bytes


def read_json_file(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable; FormatError: not a JSON object.
    """
    value = parse_json(read_small(path), path)
    if not is_object(value):
        raise FormatError(f"{path}: not a JSON object", "an object in braces")
    return value


def read_small(path: Path) -> bytes:
    """The bytes of a file of a model's size.

    Raises:
        CheckpointError: unreadable; FormatError: too large.
    """
    return read_at_most(path, MAX_JSON, "a JSON file of a model")
