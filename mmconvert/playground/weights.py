r"""Tensors whose values follow from their names, and the weight files that hold them.

The bits of a tensor follow from its name and element count alone::

    raw  = SHAKE-256("mm-golden-v1\0" + seed + name), count * itemsize bytes, little endian
    bf16 : sign and mantissa kept, the exponent field becomes 111 + (its low 4 bits)
    f32  : likewise

so that every element is finite, normal, non-zero and of a magnitude in [2**-16, 1), and no
two tensors are alike. The golden records were made from the same values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Json = dict[str, Any]

ITEM_BYTES = {"BF16": 2, "F32": 4}


class Tensor(NamedTuple):
    """A tensor to be written; its values are those of the name `seeded_by`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    seeded_by: str

    @property
    def nbytes(self) -> int:
        """The size of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def tensor_bytes(name: str, shape: Sequence[int], dtype: str = "BF16", seed: str = "") -> bytes:
    """The little-endian bytes of a tensor, as the head of this file defines them."""
    size = math.prod(shape) * ITEM_BYTES[dtype]
    raw = hashlib.shake_256(b"mm-golden-v1\0" + (seed + name).encode()).digest(size)
    word, mantissa_bits = ("<u2", 7) if dtype == "BF16" else ("<u4", 23)
    bits = np.frombuffer(raw, word).astype(np.uint64)
    exponent = 111 + ((bits >> np.uint64(mantissa_bits)) & np.uint64(15))
    keep = np.uint64(~(255 << mantissa_bits) & (256 ** ITEM_BYTES[dtype] - 1))
    return ((bits & keep) | (exponent << np.uint64(mantissa_bits))).astype(word).tobytes()


def write_json(path: Path, value: object) -> None:
    """Writes JSON as the hub's files have it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Iterable[Tensor], seed: str) -> None:
    """Larger items first, then by name, as the safetensors library orders them."""
    ordered = sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.name))
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in ordered:
        start, end = end, end + t.nbytes
        offsets = [start, end]
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in ordered:
            file.write(tensor_bytes(t.seeded_by, t.shape, t.dtype, seed))


def _deal(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Cut the list into `count` runs of about equal bytes, none of them empty."""
    total, done = sum(t.nbytes for t in tensors), 0
    runs: list[list[Tensor]] = [[]]
    for left, t in zip(range(len(tensors) - 1, -1, -1), tensors, strict=True):
        runs[-1].append(t)
        done += t.nbytes
        missing = count - len(runs)
        if missing and (done * count >= total * len(runs) or left == missing):
            runs.append([])
    return runs


def write_weights(out: Path, tensors: Sequence[Tensor], count: int, seed: str = "") -> None:
    """Writes the weight files of a checkpoint, and their index if there is more than one."""
    runs = _deal(tensors, count)
    if len(runs) == 1:
        write_safetensors(out / "model.safetensors", tensors, seed)
        return
    weight_map: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        file = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        write_safetensors(out / file, run, seed)
        weight_map |= {t.name: file for t in run}
    write_json(
        out / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(t.nbytes for t in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )
