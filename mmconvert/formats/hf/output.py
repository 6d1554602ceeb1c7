"""The files of a Hugging Face folder to be written: weight files, index, config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmconvert.causes.quantised import said_method, without_method
from mmconvert.errors import FormatError
from mmconvert.formats.containers.image import FileImage, Piece, one_run, small
from mmconvert.formats.containers.safetensors import parse_json, safetensors_image
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.hf.choice import INDEX, SINGLE
from mmconvert.formats.hf.folder import HFCheckpoint
from mmconvert.formats.jsonfile import read_small
from mmconvert.formats.untied import untied_config
from mmconvert.narrow import is_object
from mmconvert.stored import Target

# Where config.json names the dtype of the weights: torch_dtype until transformers 4.55, then dtype.
DTYPE_KEYS = ("torch_dtype", "dtype")
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def weight_images(
    model: HFCheckpoint, targets: Sequence[Target], limit: int = 0
) -> list[FileImage]:
    """The weight files to be written, and the index if there is one.

    Where tensors, dtypes and shapes are those of ``model``, headers and index are its own, byte
    for byte.

    Args:
        model: the checkpoint whose weight files, order, metadata and index are reproduced.
        targets: what to write; tensors of ``model`` that are not among them are left out.
        limit: bytes of tensors that a file may hold, in new files; 0 keeps those of ``model``.

    Raises:
        FormatError: two files whose names differ only in case, which not every disk tells apart.
    """
    numbers = {target.name: number for number, target in enumerate(targets)}
    if limit:
        return new_files(model, targets, limit)
    names = [file.path.name.casefold() for file in model.files]
    if len(set(names)) < len(names):
        raise FormatError(f"{model.folder}: two weight files have the same name but for its case")
    images: list[FileImage] = []
    same = True
    for file in model.files:
        expected = [numbers[t.name] for t in file.tensors if t.name in numbers]
        if not expected:
            same = False
            continue
        if not file.header:  # a pickle: safetensors are written in its place
            same = False
            name = hf_bin.as_safetensors(file.path.name)
            images.append(safetensors_image(name, targets, expected, file.metadata))
        elif model.added.isdisjoint(t.name for t in file.tensors) and (
            _as_stored(targets, expected) == [t[:3] for t in file.tensors]
        ):
            head = len(file.header).to_bytes(8, "little") + file.header
            pieces = zip(expected, file.tensors, strict=True)
            images.append(
                FileImage(
                    file.path.name,
                    max(t.offset + t.nbytes for t in file.tensors),
                    ((0, head),),
                    tuple(Piece(n, one_run(t.offset, t.nbytes)) for n, t in pieces),
                )
            )
        else:
            same = False
            images.append(safetensors_image(file.path.name, targets, expected, file.metadata))
    if model.index is None:
        return images
    index = model.index if same else _index(model.index, images, targets)
    return [*images, small(INDEX, index, pointer=True)]


def _as_stored(targets: Sequence[Target], numbers: Sequence[int]) -> list[object]:
    """Names, dtypes and shapes as a file has them."""
    found = (targets[number] for number in numbers)
    return [(t.name, t.dtype, t.stack or t.shape) for t in found]


def new_files(
    model: HFCheckpoint, targets: Sequence[Target], limit: int, *, indexed: bool = False
) -> list[FileImage]:
    """Files filled in the order of ``model``'s tensors, named as transformers names them.

    Args:
        indexed: whether a single file too has an index.
    """
    numbers = {target.name: number for number, target in enumerate(targets)}
    groups: list[list[int]] = [[]]
    used = 0
    for file in model.files:
        for number in (numbers[t.name] for t in file.tensors if t.name in numbers):
            nbytes = targets[number].nbytes
            if groups[-1] and used + nbytes > limit:
                groups.append([])
                used = 0
            groups[-1].append(number)
            used += nbytes
    metadata = model.files[0].metadata
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    images = [
        safetensors_image(name, targets, group, metadata)
        for name, group in zip([SINGLE] if len(groups) == 1 else names, groups, strict=True)
    ]
    if len(groups) == 1 and not indexed:
        return images
    return [*images, small(INDEX, _index(model.index or b"{}", images, targets), pointer=True)]


def _index(old: bytes, images: Sequence[FileImage], targets: Sequence[Target]) -> bytes:
    content = json.loads(old)
    weight_map = {targets[number].name: image.path for image in images for number in image.targets}
    total = sum(targets[number].nbytes for image in images for number in image.targets)
    metadata = content.get("metadata")
    content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    content["weight_map"] = dict(sorted(weight_map.items()))
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def with_dtype(path: Path, cast: str, *, untied: bool = False) -> bytes:
    """config.json with the dtype that the weights have now, and without a way of quantising; if
    it is so already, as it is.

    Args:
        cast: safetensors spelling of the dtype; "" leaves what it says of dtypes.
        untied: whether it is to say that embeddings are not tied.

    Raises:
        CheckpointError: unreadable; FormatError: not JSON.
    """
    text, dtype = read_small(path), TORCH_NAMES.get(cast)
    config = parse_json(text, path)
    changed = is_object(config) and bool(said_method(config))
    if is_object(config) and changed:  # weights in this dtype are not quantised
        config = without_method(config)
    if is_object(config) and untied:
        config, changed = untied_config(config), True
    for part in _objects(config):
        for key in DTYPE_KEYS:
            if dtype and isinstance(part.get(key), str) and part[key] != dtype:
                part[key] = dtype
                changed = True
    if not changed:  # the original, byte for byte
        return text
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _objects(value: object) -> Iterator[dict[str, object]]:
    """Every JSON object in a value, at any depth: Qwen2.5-Omni's configs lie three deep."""
    if is_object(value):
        yield value
        for inner in value.values():
            yield from _objects(inner)
