"""MindSpore .ckpt files: scanned, laid out, in pieces, hostile."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mscodec
from mmconvert.errors import CheckpointError, FormatError, OutputError, RequestError
from mmconvert.executor.blockio import Region, read_compact
from mmconvert.executor.fileio import open_files
from mmconvert.formats.containers import ckpt as mindspore
from mmconvert.formats.containers.ckpt import DTYPES, CkptFile, Leftover, check_crc, read_ckpt
from mmconvert.formats.containers.ckpt_layout import Seal, ckpt_image, rectangles
from mmconvert.formats.containers.image import create, finish
from mmconvert.plan.plan import matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor, Target
from mscodec import Named, blob, ckpt, num, record, tensor
from nights import examples

# save_checkpoint of MindSpore 2.7.0 wrote this: [2, 3] Float16 "b", scalar Float32 "s" of 1.5,
# and append_dict={"epoch": 3, "flag": True, "text": "hé"}.
REAL = bytes.fromhex(
    "0a200a0162121b080208031207466c6f617431361a0c003c003c003c000000000000"
    "0a140a0173120f1207466c6f617433321a040000c03f"
    "0a1a0a0565706f6368121112 05496e7436341a080300000000000000"
    "0a110a04666c616712091204426f6f6c1a0101"
    "0a190a047465787412110800120373 74721a0868000000e9000000".replace(" ", "")
)
SMALL = [
    tensor("wte.embedding_weight", "BFloat16", (7, 5)),
    tensor("ln.gamma", "Float32", (5,)),
    tensor("conv1.weight", "Float16", (3, 2, 4, 4)),
    tensor("step_num", "Int64", ()),
    tensor("旗", "Bool", (3, 3)),
]


def scanned(content: bytes, folder: Path) -> CkptFile:
    path = folder / "x.ckpt"
    path.write_bytes(content)
    return read_ckpt(path)


def data_of(t: StoredTensor) -> bytes:
    """All bytes of a stored tensor, read as the executor reads them."""
    rows, cols = matrix(t.shape)
    with open_files() as files:
        return bytes(read_compact(files, t, Region(0, 0, rows, cols), "test"))


def same(found: CkptFile, expected: Sequence[Named]) -> None:
    assert [(t.name, t.dtype, t.shape) for t in found.tensors] == [
        (t.tag, DTYPES[t.kind], t.shape) for t in expected
    ]
    for got, t in zip(found.tensors, expected, strict=True):
        assert data_of(got) == t.data


# ------------------------------------------------------------------------------------ reading
def test_a_file_of_mindspore(tmp_path: Path) -> None:
    found = scanned(REAL, tmp_path)
    assert [(t.name, t.dtype, t.shape) for t in found.tensors] == [
        ("b", "F16", (2, 3)),
        ("s", "F32", ()),
        ("epoch", "I64", ()),
        ("flag", "BOOL", ()),
    ]
    assert data_of(found.tensors[2]) == (3).to_bytes(8, "little")
    assert found.leftovers == [Leftover("text", "str", 8)]
    assert found.crc is None
    assert found.end == len(REAL)


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    found = scanned(ckpt(SMALL), tmp_path)
    same(found, SMALL)
    assert all(t.strides is None and not t.extents for t in found.tensors)


def test_the_fields_of_a_record_in_another_order(tmp_path: Path) -> None:
    """Unknown fields are skipped, dims may be packed, several records may share a message."""
    inner = blob(3, b"abcd") + num(9, 1) + blob(2, b"UInt8") + blob(1, b"\x02", b"\x02")
    content = blob(1, blob(2, inner), blob(7, b"?"), blob(1, b"x")) + num(5, 3)
    (found,) = scanned(content, tmp_path).tensors
    assert (found.name, found.dtype, found.shape, data_of(found)) == ("x", "U8", (2, 2), b"abcd")


def test_an_old_scalar(tmp_path: Path) -> None:
    (found,) = scanned(record("loss_scale", "Float32", [0], b"\0\0\x80\x3f"), tmp_path).tensors
    assert found.shape == ()


def test_a_hash_table_is_left_over(tmp_path: Path) -> None:
    content = blob(1, blob(1, b"table"), blob(3, b"")) + REAL
    assert scanned(content, tmp_path).leftovers[0] == Leftover("table", "map", 0)


@examples(60, nightly=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from(range(5)))
def test_pieces_of_any_size_are_joined(sizes: list[int], number: int) -> None:
    """Also pieces that end inside a row, or inside an element."""
    expected = [SMALL[number], tensor("after", "Float32", (2, 2))]
    with tempfile.TemporaryDirectory() as folder:
        found = scanned(ckpt(expected, sizes), Path(folder))
        same(found, expected)


def test_columns_of_a_tensor_in_pieces(tmp_path: Path) -> None:
    """Any rectangle, over pieces that end inside elements."""
    t = tensor("w", "Float32", (9, 11))
    (found,) = scanned(ckpt([t], [7, 50, 3, 61]), tmp_path).tensors
    rows = [t.data[r * 44 : r * 44 + 44] for r in range(9)]
    with open_files() as files:
        for row, col, high, wide in [(0, 0, 9, 11), (2, 3, 5, 4), (8, 10, 1, 1), (0, 10, 9, 1)]:
            got = bytes(read_compact(files, found, Region(row, col, high, wide), "test"))
            assert got == b"".join(r[col * 4 : (col + wide) * 4] for r in rows[row : row + high])


def test_the_checksum(tmp_path: Path) -> None:
    content = mscodec.with_crc(ckpt(SMALL))
    found = scanned(content, tmp_path)
    same(found, SMALL)
    assert found.end == len(content) - 17
    check_crc(found)
    check_crc(scanned(ckpt(SMALL), tmp_path))  # has none
    damaged = bytearray(content)
    damaged[found.tensors[0].offset] ^= 1
    with pytest.raises(FormatError, match="its trailer says"):
        check_crc(scanned(bytes(damaged), tmp_path))


GOOD = record("a", "Float32", [2], bytes(8))


def value(*parts: bytes) -> bytes:
    return blob(1, *parts)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"PK\3\4" + bytes(40), "a zip archive"),
        (b"\x80\x02}q", "a pickle"),
        (b"\x20\0\0\0\0\0\0\0{}" + bytes(40), "a safetensors file"),
        (GOOD[:-1], "field 1 claims 26 bytes, 25 are left (at byte 0 of 27)"),
        (GOOD[:1], "a number is cut off"),
        (GOOD + GOOD[:5], "field 1 claims 26 bytes, 3 are left (at byte 28 of 33)"),
        (GOOD + b"\0", "field number 0 (at byte 28 of 29)"),
        (GOOD + b"crc_num" + bytes(9), "(at byte 29 of 44)"),
        (num(1, 5), "a record has wire type 0, not 2"),
        (value(), "a record without a tag"),
        (value(blob(1, b"a")), "the record of a has 0 tensors, not one"),
        (value(blob(1, b"a"), blob(1, b"b")), "the record of a has two tags"),
        (value(blob(1, b"\xff")), "a tag is not UTF-8 text"),
        (value(blob(1, b"x" * 5000)), "a tag has 5000 bytes, over 4096"),
        (value(blob(1, b"a"), blob(2), blob(2)), "has 2 tensors, not one"),
        (value(blob(1, b"a"), num(2, 3)), "a tensor has wire type 0, not 2"),
        (value(blob(1, b"a"), blob(2, blob(2, b"Float32"))), "a has no data"),
        (value(blob(1, b"a"), blob(2, blob(3, b"abcd"))), "a has no type"),
        (value(blob(1, b"a"), blob(2, blob(2, b"Int8"), blob(2, b"Int8"))), "two types"),
        (record("a", "Int4", [2], b"x"), "has the type 'Int4', which is not known"),
        (record("a", "float32", [1], bytes(4)), "has the type 'float32'"),
        (record("a", "Float32", [2], bytes(7)), "a Float32 [2] has 7 bytes of data, not 8"),
        (record("a", "Float32", [-1], b""), "a has the shape [-1]"),
        (record("a", "Float32", [2**62], b""), f"a has the shape [{2**62}]"),
        (record("a", "Float32", [2**47] * 8, b""), "has 0 bytes of data"),
        (record("a", "Float32", [1] * 9, bytes(4)), "more than 8 dimensions"),
        (value(blob(1, b"a"), blob(2, blob(1, b"\1" * 9))), "more than 8 numbers"),
        (value(blob(1, b"a"), blob(2, b"\x0d\0\0\0\0")), "shape of a has wire type 5, not 2"),
        (GOOD + record("b", "Int8", [1], b"x") + GOOD, "a occurs again; it was complete at byte 0"),
        (GOOD + GOOD, "a Float32 [2] has 16 bytes of data, not 8"),
        (GOOD + record("a", "Float32", [4], bytes(8)), "a goes on with another type or shape"),
        (GOOD + record("a", "Int32", [2], bytes(8)), "a goes on with another type or shape"),
    ],
)
def test_hostile_files(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        scanned(content, tmp_path)
    assert words in caught.value.what
    assert caught.value.what.startswith(str(tmp_path / "x.ckpt"))


def test_too_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore, "MAX_RECORDS", 2)
    with pytest.raises(FormatError, match="more than 2 records"):
        scanned(b"".join(record(f"t{i}", "Int8", [1], b"x") for i in range(3)), tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_ckpt(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError):
        read_ckpt(tmp_path)
    os.mkfifo(tmp_path / "pipe.ckpt")  # nobody writes: opening it would never end
    with pytest.raises(CheckpointError, match="pipe"):
        read_ckpt(tmp_path / "pipe.ckpt")


@examples(200, nightly=600)
@given(st.data())
def test_damaged_files_are_an_error_or_keep_to_their_bounds(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([REAL, mscodec.with_crc(ckpt(SMALL, [40, 9]))])))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "double"]))
        if kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut" and at:
            del content[at:]
        else:
            content[at:at] = content[max(0, at - 30) : at]
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = scanned(bytes(content), Path(folder))
        except FormatError:
            return
        for t in found.tensors:
            assert len(data_of(t)) == t.nbytes
            for extent in t.extents:
                assert 0 <= extent.offset <= extent.offset + extent.nbytes <= len(content)


# ------------------------------------------------------------------------------------ writing
def entries(tensors: Sequence[Named]) -> list[Target]:
    return [Target(t.tag, DTYPES[t.kind], t.shape) for t in tensors]


def written(tensors: Sequence[Named], path: Path, *, crc: bool, chunk: int) -> list[StoredTensor]:
    """A file of ours, its data written through the rectangles."""
    targets = entries(tensors)
    images = [ckpt_image(path.name, targets, range(len(targets)), crc=crc, chunk=chunk)]
    stored = create(path.parent, images, targets)
    with path.open("r+b") as file:
        for t, place in zip(tensors, stored, strict=True):
            item, cols = ITEM_SIZE[place.dtype], matrix(t.shape)[1]
            for row, col, piece in rectangles(place):
                start = (row * cols + col) * item
                file.seek(piece.offset)
                file.write(t.data[start : start + piece.nbytes])
    finish(path.parent, images)
    return stored


@pytest.mark.parametrize("short", range(1, 8))
def test_a_checksum_that_is_written_in_part(short: int, tmp_path: Path) -> None:
    """The system takes the first digits alone, as on a disk that is full or a pipe's end."""
    path = tmp_path / "x.ckpt"
    written(SMALL, path, crc=True, chunk=80)
    image = ckpt_image("x.ckpt", entries(SMALL), range(len(SMALL)), crc=True, chunk=80)
    seal = image.seal
    assert isinstance(seal, Seal)
    with path.open("r+b") as file:
        file.seek(seal.end + 7)
        file.write(bytes(image.size - seal.end - 7))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (image.size - short, before[1]))
    try:
        with pytest.raises(OutputError, match="no more"):
            seal(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@examples(40, nightly=100)
@given(st.booleans(), st.integers(1, 12).map(lambda n: 8 * n))
def test_what_we_write_is_what_mindspore_writes(crc: bool, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.ckpt"
        stored = written(SMALL, path, crc=crc, chunk=chunk)
        content = ckpt(SMALL, [chunk])
        assert path.read_bytes() == (mscodec.with_crc(content) if crc else content)
        found = read_ckpt(path)
        assert found.tensors == stored
        same(found, SMALL)
        check_crc(found)


@pytest.mark.parametrize("nbytes", [1, 100, 127, 128, 129, 16_255, 16_256, 16_384, 2_097_152])
def test_lengths_around_the_sizes_of_varints(nbytes: int, tmp_path: Path) -> None:
    entry = Target("a" * 100, "U8", (nbytes,))
    image = ckpt_image("x.ckpt", [entry], [0])
    plain = record("a" * 100, "UInt8", [nbytes], bytes(nbytes))
    assert image.size == len(plain) and image.seal is None
    create(tmp_path, [image], [entry])
    assert (tmp_path / "x.ckpt").read_bytes() == plain


def test_a_real_embedding_is_cut_every_512_mib() -> None:
    image = ckpt_image("x.ckpt", [Target("wte", "F16", (151936, 4096))], [0])
    assert [extent.nbytes for extent in image.pieces[0].extents] == [2**29, 2**29, 170_917_888]


@examples(60, nightly=200)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30))
def test_rectangles_tile_the_tensor(rows: int, cols: int, per_chunk: int) -> None:
    """Each element once, in runs; at most three rectangles for each piece."""
    entry = Target("w", "F16", (rows, cols))
    with tempfile.TemporaryDirectory() as folder:
        image = ckpt_image("x.ckpt", [entry], [0], chunk=2 * per_chunk)
        (place,) = create(Path(folder), [image], [entry])
    found = rectangles(place)
    assert len(found) <= 3 * max(1, len(place.extents))
    seen = [
        (row + r, col + c)
        for row, col, piece in found
        for r in range(piece.shape[0])
        for c in range(piece.shape[1])
    ]
    assert seen == [(r, c) for r in range(rows) for c in range(cols)]
    assert all(piece.strides is None and not piece.extents for _, _, piece in found)


def test_what_a_ckpt_cannot_hold(tmp_path: Path) -> None:
    for entry, words in [
        (Target("a", "F8_E4M3", (2,)), "a is F8_E4M3, which a .ckpt file cannot hold"),
        (Target("a", "F32", (0, 2)), "without elements"),
        (Target("", "F32", (2,)), "does not fit"),
        (Target("a", "F32", (1,) * 9), "does not fit"),
    ]:
        with pytest.raises(RequestError, match=words):
            ckpt_image("x.ckpt", [entry], [0])
    with pytest.raises(RequestError, match="written twice"):
        ckpt_image("x.ckpt", [Target("a", "F32", (2,))] * 2, [0, 1])
    image = ckpt_image("x.ckpt", [Target("a", "F32", (2,))], [0], chunk=6)
    (place,) = create(tmp_path, [image], [Target("a", "F32", (2,))])
    with pytest.raises(CheckpointError, match="cut inside an element"):
        rectangles(place)
    with pytest.raises(OSError):
        create(tmp_path / "x.ckpt", [image], [Target("a", "F32", (2,))])
