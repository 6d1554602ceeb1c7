"""The protobuf reader: every form of a field, and hostile bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mscodec
from mmconvert.errors import FormatError
from mmconvert.formats.containers import protobuf
from mmconvert.formats.containers.protobuf import GROUP, LENGTH, VARINT, WireFile, signed
from nights import examples


def fields_of(content: bytes, folder: Path) -> list[tuple[int, int, object]]:
    """(number, wire type, value or payload) of every field."""
    path = folder / "message"
    path.write_bytes(content)
    with path.open("rb") as file:
        wire = WireFile(path, file, "a message")
        return [
            (f.number, f.wire, f.value if f.wire == VARINT else wire.read(f.start, f.end))
            for f in wire.fields(0, wire.size)
        ]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", []),
        (b"\x08\x00", [(1, 0, 0)]),
        (b"\x08\x96\x01", [(1, 0, 150)]),
        (b"\x12\x02hi", [(2, 2, b"hi")]),
        (b"\x12\x00", [(2, 2, b"")]),
        (b"\x09" + bytes(range(8)), [(1, 1, bytes(range(8)))]),
        (b"\x0d" + bytes(range(4)), [(1, 5, bytes(range(4)))]),
        (b"\x08" + b"\xff" * 9 + b"\x01", [(1, 0, 2**64 - 1)]),
        # not the shortest form of 1, but a form of it
        (b"\x08\x81\x80\x80\x00", [(1, 0, 1)]),
        # a group, with a field and another group in it, is skipped
        (b"\x1b\x08\x05\x23\x12\x01x\x24\x1c\x08\x07", [(1, 0, 7)]),
        (mscodec.varint((2**29 - 1) * 8) + b"\x01", [(2**29 - 1, 0, 1)]),
    ],
)
def test_fields(content: bytes, found: list[object], tmp_path: Path) -> None:
    assert fields_of(content, tmp_path) == found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x08", "a number is cut off (at byte 1 of 1)"),
        (b"\x80", "a number is cut off (at byte 0 of 1)"),
        (b"\x08\x96", "a number is cut off (at byte 1 of 2)"),
        (b"\x08" + b"\xff" * 10, "a number has more than ten bytes (at byte 1 "),
        (b"\x08" + b"\xff" * 9 + b"\x02", "a number has more than 64 bits (at byte 1 "),
        (b"\x12\x03hi", "field 2 claims 3 bytes, 2 are left (at byte 0 of 4)"),
        (b"\x12" + b"\xff" * 9 + b"\x01", f"field 2 claims {2**64 - 1} bytes, 0 are left"),
        (b"\x09\x00\x00", "field 1 claims 8 bytes, 2 are left"),
        (b"\x0d\x00", "field 1 claims 4 bytes, 1 are left"),
        (b"\x00\x00", "field number 0"),
        (mscodec.varint(2**29 * 8) + b"\x00", f"field number {2**29}"),
        (b"\x0e", "field 1 has the unknown wire type 6"),
        (b"\x0f", "field 1 has the unknown wire type 7"),
        (b"\x0c", "group 1 ends without having begun"),
        (b"\x0b", "group 1 does not end"),
        (b"\x0b\x14", "group 2 ends inside another one"),
        (b"\x0b" * 200, "more than 100 groups in each other"),
    ],
)
def test_damaged_fields(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        fields_of(content, tmp_path)
    assert words in caught.value.what
    assert str(tmp_path / "message") in caught.value.what


def test_an_endless_row_of_fields_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "MAX_FIELDS", 10)
    assert len(fields_of(b"\x0a\x00" * 10, tmp_path)) == 10
    with pytest.raises(FormatError, match="more than 10 fields"):
        fields_of(b"\x0a\x00" * 11, tmp_path)


@given(st.integers(-(2**63), 2**64 - 1))
@example(0)
@example(-1)
def test_varints_come_back(value: int) -> None:
    raw = protobuf.varint(value)
    assert raw == mscodec.varint(value)
    assert len(raw) == 10 if value < 0 else len(raw) == max(1, -(-value.bit_length() // 7))
    with tempfile.TemporaryDirectory() as folder:
        ((_, _, found),) = fields_of(b"\x08" + raw, Path(folder))
    assert found == value % 2**64
    if value < 2**63:
        assert signed(value % 2**64, 64) == value


@pytest.mark.parametrize(
    ("value", "bits", "found"),
    [
        (2**64 - 1, 32, -1),
        (2**32 - 1, 32, -1),
        (2**31, 32, -(2**31)),
        (5, 32, 5),
        (2**63, 64, -(2**63)),
    ],
)
def test_signed_numbers_are_the_low_bits(value: int, bits: int, found: int) -> None:
    assert signed(value, bits) == found


# ------------------------------------------------------------------------------------ random
FIELD = st.one_of(
    st.tuples(st.integers(1, 2**29 - 1), st.just(VARINT), st.integers(0, 2**64 - 1)),
    st.tuples(st.integers(1, 2**29 - 1), st.just(LENGTH), st.binary(max_size=9000)),
)


def encoded(rows: list[tuple[int, int, object]]) -> bytes:
    out = b""
    for field, wire, value in rows:
        if wire == VARINT:
            assert isinstance(value, int)
            out += protobuf.number(field, value)
        else:
            assert isinstance(value, bytes)
            out += protobuf.block(field, value)
    return out


@settings(deadline=None)
@given(st.lists(FIELD, max_size=12))
def test_messages_come_back(rows: list[tuple[int, int, object]]) -> None:
    """Also where fields lie on the edges of the window that is read."""
    with tempfile.TemporaryDirectory() as folder:
        assert fields_of(encoded(rows), Path(folder)) == rows


@examples(150, nightly=500)
@given(st.lists(FIELD, min_size=1, max_size=4), st.data())
def test_damage_is_an_error_or_another_message(
    rows: list[tuple[int, int, object]], data: st.DataObject
) -> None:
    content = bytearray(encoded(rows))
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] = data.draw(st.integers(0, 255))
    else:
        del content[at:]
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = fields_of(bytes(content), Path(folder))
        except FormatError:
            return
    assert all(wire != GROUP for _, wire, _ in found)
    assert sum(len(v) for _, _, v in found if isinstance(v, bytes)) <= len(content)


@examples(150, nightly=500)
@given(st.binary(max_size=200))
def test_random_bytes_are_an_error_or_a_message(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            fields_of(content, Path(folder))
        except FormatError:
            return
