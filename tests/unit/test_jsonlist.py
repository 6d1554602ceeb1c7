"""JSON lists read and written item by item."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmconvert.datasets import jsonlist, listwriter
from mmconvert.datasets.jsonlist import read_items
from mmconvert.datasets.listwriter import ListWriter
from mmconvert.errors import DatasetError, OutputError
from nights import examples

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ITEMS = st.lists(st.dictionaries(st.text(), VALUE, max_size=4), max_size=8)


def read(content: bytes, folder: Path) -> list[dict[str, Any]]:
    path = folder / "x.json"
    path.write_bytes(content)
    return list(read_items(path))


@examples(40, nightly=200)
@given(ITEMS, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_what_json_reads(items: list[Any], chunk: int, indent: int | None, ascii_: bool) -> None:
    """However the file is cut into blocks: inside words, escapes and characters."""
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_).encode()
    before = jsonlist.CHUNK
    with tempfile.TemporaryDirectory() as folder:
        try:
            jsonlist.CHUNK = chunk
            assert read(text, Path(folder)) == items
        finally:
            jsonlist.CHUNK = before


@examples(100, nightly=300)
@given(st.data())
def test_what_json_refuses_we_refuse(data: st.DataObject) -> None:
    text = bytearray(b'\n[ {"a": [1, {"b": "\\u00e9]"}]} ,\t{}, {"c": -1.5e3, "d": null} ] ')
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=2))
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = read(bytes(text), Path(folder))
        except DatasetError:
            return
        expected = json.loads(bytes(text).decode("utf-8-sig"))
        assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"  \n", "the file is empty"),
        (b'{"a": 1}', "begins with '{'"),
        (b'{"a": 1}\n{"a": 2}', "begins with '{'"),
        (b"[", "ends before item 0"),
        (b"[1]", "item 0 begins with '1'"),
        (b"[{}, [1]]", "item 1 begins with '['"),
        (b"[{},]", "item 1 begins with ']'"),
        (b"[{}", "ends after item 0"),
        (b"[{} {}]", "'{' follows item 0"),
        (b"[{}}", "'}' follows item 0"),
        (b"[{}] x", "'x' follows the end of the list"),
        (b"[][]", "'[' follows the end of the list"),
        (b'[{}, {"a": 1', "item 1 is not valid JSON: Expecting ',' delimiter"),
        (b'[{}, {"a": "b', "item 1 is not valid JSON: Unterminated string"),
        (b"[{'a': 1}]", "item 0 is not valid JSON: Expecting property name"),
        (b'[{"a": "\xff"}]', "not UTF-8 text, near byte 8"),
        (b'[{"a": ' + b"[" * 200_000, "item 0 is not valid JSON: nested too deeply"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", "item 0 is not valid JSON: Exceeds the limit"),
    ],
)
def test_damaged_files(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read(content, tmp_path)
    assert words in caught.value.what
    assert str(tmp_path / "x.json") in caught.value.what


def test_an_item_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonlist, "CHUNK", 64)
    monkeypatch.setattr(jsonlist, "MAX_ITEM", 1000)
    with pytest.raises(DatasetError, match="item 1 is not valid JSON: no end within 1000"):
        read(b'[{"a": "' + b"x" * 900 + b'"}, {"a": "' + b"x" * 9000, tmp_path)


def test_a_byte_order_mark_and_progress(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf[{}]")
    done: list[int] = []
    assert list(read_items(path, done.append)) == [{}]
    assert sum(done) == 7


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        list(read_items(tmp_path / "x.json"))
    with pytest.raises(DatasetError, match="Is a directory"):
        list(read_items(tmp_path))


# ------------------------------------------------------------------------------------ writing
def writer(path: Path, **more: Any) -> ListWriter:
    return ListWriter(path, **({"mode": 0o640, "overwrite": False, "ascii_only": True} | more))


def fill(path: Path, items: list[Any], **more: Any) -> None:
    with writer(path, **more) as out:
        for index, item in enumerate(items):
            out.add(item, index)
        out.commit()


@examples(30, nightly=100)
@given(ITEMS, st.booleans(), st.integers(1, 100))
def test_files_are_those_of_json_dump(items: list[Any], ascii_only: bool, chunk: int) -> None:
    before = listwriter.CHUNK
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "x.json"
        try:
            listwriter.CHUNK = chunk
            fill(path, items, ascii_only=ascii_only)
        finally:
            listwriter.CHUNK = before
        assert path.read_text("utf-8") == json.dumps(items, ensure_ascii=ascii_only)
        assert os.listdir(path.parent) == ["x.json"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    with pytest.raises(DatasetError, match=r"item 1 holds half of a surrogate pair: '\\ud800'"):
        fill(path, [{"a": 1}, {"a": "\ud800"}], ascii_only=False)
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(OutputError, match="exists"):
        fill(path, [])
    with pytest.raises(OutputError, match="is the input"):
        fill(path, [], overwrite=True, inputs=(tmp_path / "." / "x.json",))
    with pytest.raises(OutputError, match="is not a file"):
        fill(tmp_path, [], overwrite=True)
    with pytest.raises(DatasetError):
        fill(path, [{"a": "\ud800"}], overwrite=True, ascii_only=False)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(OutputError):
        fill(path / "below" / "y.json", [])


def test_one_run_at_a_time_and_the_rest_of_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with writer(path) as out:
        with pytest.raises(OutputError, match="another run is writing"):
            fill(path, [])
        out.add({"a": 1}, 0)
        out.commit()
    assert path.read_text() == '[{"a": 1}]'
    (tmp_path / ".y.json.mmconvert-partial").write_text("rest")
    with writer(tmp_path / "y.json") as out:
        out.commit()
    assert (tmp_path / "y.json").read_text() == "[]"
    assert sorted(os.listdir(tmp_path)) == ["x.json", "y.json"]


def test_a_target_that_appears_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with writer(path) as out:
        path.write_text("other")
        with pytest.raises(OutputError, match="exists"):
            out.commit()
    assert path.read_text() == "other"
    assert os.listdir(tmp_path) == ["x.json"]
