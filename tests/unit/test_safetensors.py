"""Headers of safetensors files: ours against the library's, and hostile ones.

The library is the judge of what a valid file is; we refuse more (duplicate keys), never less.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from mmconvert.errors import CheckpointError, FormatError
from mmconvert.formats.containers.safetensors import (
    MAX_HEADER,
    parse_json,
    read_weight_file,
    safetensors_image,
)
from mmconvert.stored import ITEM_SIZE, Target
from nights import examples

Header = dict[str, Any]

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of these parts; `length` lies about the header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: object, begin: object, end: object, dtype: object = "U8") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def two_tensors() -> tuple[Header, bytes]:
    """A valid header with two tensors, and its data."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry([2, 3], 0, 12, "BF16"),
        "b": entry([4], 12, 16),
    }
    return header, bytes(range(16))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def bad(path: Path, content: bytes, *words: str) -> None:
    """We refuse the file, and say which it is and what is wrong."""
    with pytest.raises(FormatError) as caught:
        read_weight_file(written(path, content))
    assert str(path) in caught.value.what
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --------------------------------------------------------------------------- both ways
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"a": "é", "b": '"\\'}])
def test_the_library_reads_ours(metadata: dict[str, str], file: Path) -> None:
    shapes = {"a": (3, 4), "scalar": (), "é.weight": (2,), "empty": (0, 5), "z\n": (1, 1, 2)}
    entries = [
        Target(f"{name}.{dtype}", dtype, shape)
        for dtype in TORCH
        if dtype in ITEM_SIZE
        for name, shape in shapes.items()
    ]
    entries.sort(key=lambda e: -ITEM_SIZE[e.dtype])
    image = safetensors_image("x", entries, range(len(entries)), metadata)
    ((_, head),), size = image.heads, image.size
    starts = [piece.extents[0].offset for piece in image.pieces]
    data = np.arange(size - len(head), dtype=np.uint8) & 1
    file.write_bytes(head + data.tobytes())
    raw = file.read_bytes()
    with safe_open(file, framework="pt") as opened:
        assert (opened.metadata() or {}) == metadata
        assert set(opened.keys()) == {e.name for e in entries}
        for e, start in zip(entries, starts, strict=True):
            tensor = opened.get_tensor(e.name)
            assert tuple(tensor.shape) == e.shape and tensor.dtype == TORCH[e.dtype]
            stored = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert stored == raw[start : start + len(stored)]
            assert start % ITEM_SIZE[e.dtype] == 0
    back = read_weight_file(file)
    assert {(t.name, t.dtype, t.shape, t.offset) for t in back.tensors} == {
        (e.name, e.dtype, e.shape, start) for e, start in zip(entries, starts, strict=True)
    }
    assert back.metadata == metadata


def test_we_read_the_librarys(file: Path) -> None:
    tensors = {
        f"t.{name}": torch.arange(6).reshape(2, 3).to(dtype)
        for name, dtype in TORCH.items()
        if name in ITEM_SIZE
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7)}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt", "é": "ü"})
    found = read_weight_file(file)
    assert found.metadata == {"format": "pt", "é": "ü"}
    assert {t.name for t in found.tensors} == tensors.keys()
    raw = file.read_bytes()
    for t in found.tensors:
        expected = tensors[t.name]
        assert TORCH[t.dtype] == expected.dtype and t.shape == tuple(expected.shape)
        stored = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[t.offset : t.offset + t.nbytes] == stored


def test_we_read_the_librarys_from_numpy(file: Path) -> None:
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.int64)}
    safetensors.numpy.save_file(arrays, file)
    raw = file.read_bytes()
    for t in read_weight_file(file).tensors:
        assert raw[t.offset : t.offset + t.nbytes] == arrays[t.name].tobytes()


@examples(25, nightly=60)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda n: n != "__metadata__"),
        st.tuples(
            st.sampled_from(sorted(set(TORCH) & set(ITEM_SIZE))),
            st.lists(st.integers(0, 3), max_size=4),
        ),
        max_size=6,
    )
)
def test_any_file_of_ours_is_one_of_the_librarys(
    tmp_path_factory: pytest.TempPathFactory, expected: dict[str, tuple[str, list[int]]]
) -> None:
    entries = [Target(name, dtype, tuple(shape)) for name, (dtype, shape) in expected.items()]
    image = safetensors_image("x", entries, range(len(entries)), {"format": "pt"})
    ((_, head),), size = image.heads, image.size
    content = head.ljust(size, b"\0")
    try:
        loaded = safetensors.torch.load(content)
    except SafetensorError as error:
        # the library wants a string that JSON can hold and that is no lone surrogate
        raise AssertionError(f"{error}: {expected}") from error
    assert {n: (t.dtype, list(t.shape)) for n, t in loaded.items()} == {
        n: (TORCH[dtype], shape) for n, (dtype, shape) in expected.items()
    }
    path = written(tmp_path_factory.mktemp("any") / "x.safetensors", content)
    assert {t.name for t in read_weight_file(path).tensors} == expected.keys()


def test_a_file_without_tensors(file: Path) -> None:
    assert read_weight_file(written(file, packed(b"{}"))).tensors == []


# --------------------------------------------------------------------------- truncated
def test_truncated_anywhere(file: Path) -> None:
    header, data = two_tensors()
    whole = packed(json.dumps(header).encode(), data)
    assert len(read_weight_file(written(file, whole)).tensors) == 2
    for size in range(len(whole)):
        bad(file, whole[:size])


@pytest.mark.parametrize("more", [1, 7, 8, 1000])
def test_trailing_bytes(more: int, file: Path) -> None:
    header, data = two_tensors()
    bad(file, packed(json.dumps(header).encode(), data + b"\0" * more), "the file has")


LENGTHS = [0, 1, 2, 150, 10_000, MAX_HEADER, MAX_HEADER + 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]


@pytest.mark.parametrize("length", LENGTHS)
def test_lying_header_lengths(length: int, file: Path) -> None:
    header, data = two_tensors()
    text = json.dumps(header).encode()
    assert length != len(text)
    bad(file, packed(text, data, length))


def test_a_huge_header_is_not_read_into_memory(file: Path) -> None:
    """A sparse file of 4 TB with a header length to match."""
    file.write_bytes(struct.pack("<Q", 1 << 42))
    with file.open("r+b") as out:
        out.truncate((1 << 42) + 8)
    with pytest.raises(FormatError):
        read_weight_file(file)


@pytest.mark.parametrize("kind", ["absent", "folder", "unreadable name", "pipe"])
def test_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 400 if kind == "unreadable name" else "x")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":  # opened without a look, it waits for a writer for ever
        os.mkfifo(path)
    with pytest.raises(CheckpointError):
        read_weight_file(path)


# ------------------------------------------------------------------------------ no JSON
NO_HEADERS: dict[str, bytes] = {
    "nothing": b" ",
    "spaces": b" " * 64,
    "no JSON": b"{'a': 1}",
    "half": b'{"a": {"dtype": "U8", "shape": [1]',
    "list": b"[]",
    "number": b"12345678",
    "string": b'"abcdef"',
    "null": b"null",
    "true": b"true",
    "two objects": b"{}{}",
    "rubbish behind": b"{} x",
    "byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "UTF-16": "{}".encode("utf-16"),
    "zero bytes": b"{}\0\0\0\0",
    "comment": b"{/* */}",
    "binary": bytes(range(256)),
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep in a shape": b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":'
    + b"[" * 50_000
    + b"]" * 50_000
    + b"}}",
    "endless number": b'{"a":' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("header", NO_HEADERS.values(), ids=NO_HEADERS.keys())
def test_headers_that_are_no_json_object(header: bytes, file: Path) -> None:
    bad(file, packed(header))


DUPLICATES = {
    "a tensor": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "a field": b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "the metadata": b'{"__metadata__":{},"__metadata__":{},'
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "in other letters": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    b'"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
}


@pytest.mark.parametrize("header", DUPLICATES.values(), ids=DUPLICATES.keys())
def test_duplicate_keys(header: bytes, file: Path) -> None:
    bad(file, packed(header, b"\0"), "twice")


READ_SOON = """
import resource, sys
from pathlib import Path
from mmconvert.errors import FormatError
from mmconvert.formats.containers.safetensors import read_weight_file
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
try:
    read_weight_file(Path(sys.argv[1]))
except FormatError as error:
    print(error.what)
"""


def test_many_keys_of_which_the_last_two_are_alike(file: Path) -> None:
    """A file of 2 MB must not keep us busy for minutes; the processor's time is limited."""
    keys = [f'"{i}":1' for i in range(200_000)]
    text = ("{" + ",".join([*keys, '"199999":1']) + "}").encode()
    command = [sys.executable, "-c", READ_SOON, str(written(file, packed(text)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"ended by signal {-done.returncode}: {done.stderr}"
    assert "twice" in done.stdout


# ------------------------------------------------------------------------- bad entries
ENTRIES: dict[str, object] = {
    "a string": "U8",
    "a number": 1,
    "a list": ["U8", [1], [0, 1]],
    "null": None,
    "true": True,
    "nothing in it": {},
    "no dtype": {"shape": [1], "data_offsets": [0, 1]},
    "no shape": {"dtype": "U8", "data_offsets": [0, 1]},
    "no offsets": {"dtype": "U8", "shape": [1]},
    "one field more": {**entry([1], 0, 1), "strides": [1]},
    "unknown dtype": entry([1], 0, 1, "X7"),
    "lower-case dtype": entry([1], 0, 1, "u8"),
    "dtype number": entry([1], 0, 1, 8),
    "dtype null": entry([1], 0, 1, None),
    "dtype list": entry([1], 0, 1, ["U8"]),
    "dtype object": entry([1], 0, 1, {}),
    "shape number": entry(1, 0, 1),
    "shape null": entry(None, 0, 1),
    "shape string": entry("1", 0, 1),
    "shape object": entry({"0": 1}, 0, 1),
    "negative dimension": entry([-1], 0, 1),
    "two negative dimensions": entry([-1, -1], 0, 1),
    "boolean dimension": entry([True], 0, 1),
    "float dimension": entry([1.0], 0, 1),
    "string dimension": entry(["1"], 0, 1),
    "null dimension": entry([None], 0, 1),
    "nested dimension": entry([[1]], 0, 1),
    "huge dimension": entry([2**63], 0, 1),
    "huge dimension times 0": entry([2**63, 0], 0, 0),
    "product that wraps to 1": entry([2**32, 2**32, 1], 0, 1),
    "product of 2**64 + 1": entry([274177, 67280421310721], 0, 1),
    "infinite dimension": entry([float("inf")], 0, 1),
    "no number": entry([float("nan")], 0, 1),
    "too many dimensions": entry([1] * 1000, 0, 1),
    "offsets missing": {"dtype": "U8", "shape": [1], "data_offsets": []},
    "one offset": {"dtype": "U8", "shape": [1], "data_offsets": [0]},
    "three offsets": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]},
    "offsets null": {"dtype": "U8", "shape": [1], "data_offsets": None},
    "offsets string": {"dtype": "U8", "shape": [1], "data_offsets": "01"},
    "negative begin": entry([1], -1, 0),
    "negative end": entry([1], 0, -1),
    "end before begin": entry([1], 1, 0),
    "boolean offsets": entry([1], False, True),
    "float offsets": entry([1], 0.0, 1.0),
    "string offsets": entry([1], "0", "1"),
    "huge offsets": entry([1], 2**63, 2**63 + 1),
    "out of range": entry([1], 1, 2),
    "far out of range": entry([1], 10**15, 10**15 + 1),
    "size too small": entry([2], 0, 1),
    "size too large": entry([1], 0, 2),
    "size of another dtype": entry([1], 0, 1, "F32"),
    "scalar without bytes": entry([], 0, 0),
    "an empty tensor with bytes": entry([0], 0, 1),
}


@pytest.mark.parametrize("value", ENTRIES.values(), ids=ENTRIES.keys())
def test_bad_entries(value: object, file: Path) -> None:
    bad(file, packed(json.dumps({"a": value}).encode(), b"\0"))


def test_the_good_entry_that_the_bad_ones_vary(file: Path) -> None:
    content = packed(json.dumps({"a": entry([1], 0, 1)}).encode(), b"\0")
    assert [t.name for t in read_weight_file(written(file, content)).tensors] == ["a"]


PLACES: dict[str, tuple[Header, int]] = {
    "overlapping": ({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, 6),
    "the same bytes": ({"a": entry([4], 0, 4), "b": entry([4], 0, 4)}, 4),
    "one inside the other": ({"a": entry([8], 0, 8), "b": entry([2], 2, 4)}, 8),
    "a hole": ({"a": entry([4], 0, 4), "b": entry([4], 6, 10)}, 10),
    "a hole in front": ({"a": entry([4], 2, 6)}, 6),
    "an empty tensor in a hole": ({"a": entry([4], 0, 4), "b": entry([0], 6, 6)}, 4),
    "an empty tensor inside another": ({"a": entry([4], 0, 4), "b": entry([0], 2, 2)}, 4),
    "no tensors but data": ({}, 4),
}


@pytest.mark.parametrize(("header", "size"), PLACES.values(), ids=PLACES.keys())
def test_tensors_that_do_not_tile_the_data(header: Header, size: int, file: Path) -> None:
    content = packed(json.dumps(header).encode(), bytes(size))
    with pytest.raises(SafetensorError):
        safetensors.torch.load(content)
    bad(file, content)


def test_any_order_of_entries(file: Path) -> None:
    """Tensors come in the order of their data, whatever the order of their entries."""
    header = {"c": entry([2], 5, 7), "a": entry([3], 2, 5), "b": entry([2], 0, 2)}
    header["empty"] = entry([0, 3], 5, 5)
    found = read_weight_file(written(file, packed(json.dumps(header).encode(), bytes(7))))
    assert [t.name for t in found.tensors] == ["b", "a", "empty", "c"]


METADATA = [[], "pt", 1, True, {"a": 1}, {"a": None}, {"a": ["x"]}, {"a": {"b": "c"}}]


@pytest.mark.parametrize("value", METADATA, ids=repr)
def test_metadata_that_is_not_strings(value: object, file: Path) -> None:
    header, data = two_tensors()
    header["__metadata__"] = value
    bad(file, packed(json.dumps(header).encode(), data), "__metadata__")


# --------------------------------------------------------------- mutations of a header
HOSTILE: list[object] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**30, 1.5, 1e308, "", "x", "\0"),
    *([], [0], [-1], [2**62, 4], [[]], {}, {"a": 1}),
]


@examples(80, nightly=250)
@given(st.data())
def test_mutations_give_the_librarys_answer_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever we accept, the library accepts, and it finds the same tensors."""
    header, content = two_tensors()
    text = bytearray(json.dumps(header).encode())
    if data.draw(st.booleans()):
        place: Any = header
        path: list[Any] = [data.draw(st.sampled_from(sorted(header)))]
        while isinstance(place[path[-1]], (dict, list)) and data.draw(st.booleans()):
            place = place[path[-1]]
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            path.append(data.draw(st.sampled_from(keys)))
        place[path[-1]] = data.draw(st.sampled_from(HOSTILE))
        text = bytearray(json.dumps(header).encode())
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(text) - 1))
            text[at] = data.draw(st.integers(0, 255))
    whole = packed(bytes(text), content)
    path_ = written(tmp_path_factory.mktemp("mutated") / "x.safetensors", whole)
    try:
        found = read_weight_file(path_)
    except FormatError:
        return
    loaded = safetensors.torch.load(whole)
    assert {(t.name, t.shape) for t in found.tensors} == {
        (name, tuple(t.shape)) for name, t in loaded.items()
    }


# -------------------------------------------------------------------------- JSON itself
NESTED: dict[str, Callable[[int], bytes]] = {
    "lists": lambda n: b"[" * n + b"]" * n,
    "objects": lambda n: b'{"a":' * n + b"0" + b"}" * n,
}


@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED.keys())
def test_deep_nesting_is_an_error_not_a_crash(make: Callable[[int], bytes]) -> None:
    for depth in (1_000_000, 100_000):
        with pytest.raises(FormatError):
            parse_json(make(depth), Path("x.json"))
