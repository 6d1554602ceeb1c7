"""MindSpore files written and read by other means than mmconvert's own: plain, whole in memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


def varint(value: int) -> bytes:
    """A varint; negative numbers in ten bytes."""
    value %= 1 << 64
    digits = [value % 128]
    while value := value // 128:
        digits.append(value % 128)
    return bytes(d + 128 for d in digits[:-1]) + bytes(digits[-1:])


def num(field: int, value: int) -> bytes:
    return varint(field * 8) + varint(value)


def blob(field: int, *parts: bytes) -> bytes:
    payload = b"".join(parts)
    return varint(field * 8 + 2) + varint(len(payload)) + payload


def record(tag: str, kind: str, dims: Iterable[int], content: bytes) -> bytes:
    """One Checkpoint message with one tensor."""
    shape = b"".join(num(1, n) for n in dims)
    return blob(1, blob(1, tag.encode()), blob(2, shape, blob(2, kind.encode()), blob(3, content)))


def with_crc(content: bytes) -> bytes:
    return content + b"crc_num" + zlib.crc32(content).to_bytes(10, "big")


KINDS = {"Float32": "<f4", "Float16": "<f2", "BFloat16": "<u2", "Int64": "<i8", "Bool": "?"}


class Named(NamedTuple):
    """A tensor: its name, MindSpore dtype, shape and bytes."""

    tag: str
    kind: str
    shape: tuple[int, ...]
    data: bytes


def tensor(tag: str, kind: str, shape: Sequence[int], seed: int = 0) -> Named:
    """A tensor whose bits follow from its name."""
    random = np.random.default_rng([seed, *tag.encode()])
    count = int(np.prod(shape)) if shape else 1
    data = random.bytes(count * np.dtype(KINDS[kind]).itemsize)
    if kind == "Bool":
        data = bytes(b & 1 for b in data)
    return Named(tag, kind, tuple(shape), data)


def ckpt(tensors: Iterable[Named], chunks: Sequence[int] = ()) -> bytes:
    """A whole file; ``chunks`` are the sizes of pieces, the last one repeated."""
    out = b""
    for t in tensors:
        at, sizes = 0, list(chunks) or [len(t.data)]
        while at < len(t.data) or not t.data:
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            out += record(t.tag, t.kind, t.shape, t.data[at : at + size])
            at += size
            if not t.data:
                break
    return out
