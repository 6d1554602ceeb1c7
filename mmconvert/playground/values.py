"""Changes values of small checkpoints: what training or another tool would have done to them."""

# numpy's own types are written for a newer Python than the oldest that is served here.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmconvert.executor.rounding import from_floats
from mmconvert.executor.values import Array
from mmconvert.formats.containers.image import create
from mmconvert.formats.containers.ptfile import Slot, pt_image, read_pt
from mmconvert.formats.containers.safetensors import read_weight_file
from mmconvert.stored import StoredTensor, Target

Change = Callable[[str, Array], "Array | None"]


def change(folder: Path, rule: Change) -> None:
    """Changes tensors of a checkpoint in bf16, in place.

    Args:
        rule: of a tensor's name and values (float32) to new values, or None to keep them.
    """
    for file in sorted(folder.glob("*.safetensors")):
        tensors = read_weight_file(file).tensors
        with file.open("r+b") as stream:
            for tensor in tensors:
                stream.seek(tensor.offset)
                bits: Array = np.frombuffer(stream.read(tensor.nbytes), "<u2")
                values = (bits.astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
                new = rule(tensor.name, values)
                if new is not None:
                    stream.seek(tensor.offset)
                    stream.write(bf16(new))


def bf16(values: Array) -> bytes:
    """Numbers rounded to bf16, to the nearest, ties to even."""
    return bytes(from_floats(np.ascontiguousarray(values, "<f4"), "BF16")[0])


def as_trained(rank_file: Path, iteration: int) -> None:
    """Writes a rank file again as training leaves it: an iteration and a part of an optimizer."""
    content = read_pt(rank_file).content
    sources: list[StoredTensor | None] = []
    targets: list[Target] = []

    def slots(tree: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            if isinstance(value, StoredTensor):
                found[key] = Slot(value.dtype, value.shape, len(targets))
                targets.append(Target(key, value.dtype, value.shape))
                sources.append(value)
            elif isinstance(value, Mapping):
                found[key] = slots(cast("Mapping[str, Any]", value))
            else:
                found[key] = value
        return found

    tree = slots(content)
    tree |= {"iteration": iteration, "optimizer": {"exp_avg": Slot("F32", (250,), len(targets))}}
    targets.append(Target("exp_avg", "F32", (250,)))
    sources.append(None)  # stays a hole: zeros
    image = pt_image(rank_file.name + ".new", tree, rank_file.stem)
    places = create(rank_file.parent, [image], targets)
    written = rank_file.parent / image.path
    with written.open("r+b") as out, rank_file.open("rb") as held:
        for source, place in zip(sources, places, strict=True):
            if source is not None:
                held.seek(source.offset)
                out.seek(place.offset)
                out.write(held.read(source.nbytes))
    written.replace(rank_file)
