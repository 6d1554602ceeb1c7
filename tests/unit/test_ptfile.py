"""The ``.pt`` reader and writer against torch, and against broken files."""

from __future__ import annotations

import argparse
import collections
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mmconvert.errors import CheckpointError, FormatError, RequestError
from mmconvert.formats.containers.image import create
from mmconvert.formats.containers.pickles import Inert, StorageRef
from mmconvert.formats.containers.ptfile import PtFile, Slot, pt_image, read_pt
from mmconvert.stored import StoredTensor, Target
from nights import examples

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
}
GIB = 2**30


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Arbitrary bytes, NaNs included; 0 and 1 for bool."""
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (64, *shape), dtype=torch.uint8)
    size = torch.empty(0, dtype=dtype).element_size()
    return data.flatten()[: data.numel() // 64 * size].clone().view(dtype).reshape(shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())

    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def content_of(tensor: object) -> torch.Tensor:
    """The tensor behind a StoredTensor, read from its file."""
    assert isinstance(tensor, StoredTensor)
    dtype = TORCH[tensor.dtype]
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    strides = tensor.strides
    if strides is None:
        strides = torch.empty(tensor.shape, device="meta").stride()
    count = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        data = bytearray(file.read(count * size))
    return torch.frombuffer(data, dtype=dtype).as_strided(tensor.shape, strides)


def slots_of(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Slot]:
    """The slots of a tree by the path of their keys, in order."""
    if isinstance(tree, Slot):
        return {path: tree}
    inner = tree.items() if isinstance(tree, dict) else ()
    return {k: slot for name, part in inner for k, slot in slots_of(part, (*path, name)).items()}


def numbered_slots(tree: Any, numbers: Iterator[int]) -> Any:
    """The tree with its slots numbered in order."""
    if isinstance(tree, Slot):
        return tree._replace(target=next(numbers))
    if isinstance(tree, dict):
        return {name: numbered_slots(part, numbers) for name, part in tree.items()}
    return tree


def offset_of(tree: Any, *keys: str) -> int:
    """Where the data of one slot goes."""
    return pt_image("x", tree).pieces[list(slots_of(tree)).index(keys)].extents[0].offset


def write(path: Path, tree: Any, data: dict[tuple[str, ...], torch.Tensor] | None = None) -> None:
    path.unlink(missing_ok=True)  # a file that is there keeps its bytes
    slots = slots_of(tree)
    targets = [Target(".".join(key), *slot[:2]) for key, slot in slots.items()]
    numbered = numbered_slots(tree, iter(range(len(slots))))
    places = create(path.parent, [pt_image(path.name, numbered)], targets)
    fd = os.open(path, os.O_RDWR)
    try:
        for key, tensor in (data or {}).items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            os.pwrite(fd, raw, places[list(slots).index(key)].offset)
    finally:
        os.close(fd)


# Ours, read by torch.


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, dict[tuple[str, ...], torch.Tensor]]:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (33,), (2, 3, 5), (1, 1, 2, 1, 2)]
    tree: dict[str, Any] = {"model": {}, "model1": {"deep": {}}, "checkpoint_version": 3.0, "n": 7}
    data: dict[tuple[str, ...], torch.Tensor] = {}
    for name in ("BF16", "F16", "F32", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL"):
        for shape in shapes:
            key = f"{name}.{'x'.join(map(str, shape))}"
            tree["model1"]["deep"][key] = Slot(name, shape)
            data["model1", "deep", key] = random_tensor(TORCH[name], shape)
    tree["model"]["weight"] = Slot("BF16", (4, 4))
    data["model", "weight"] = random_tensor(torch.bfloat16, (4, 4))
    path = tmp_path / "ours.pt"
    write(path, tree, data)
    return path, data


@pytest.mark.parametrize(
    "options",
    [{"weights_only": False}, {"weights_only": True}, {"mmap": True, "weights_only": True}],
    ids=str,
)
def test_torch_reads_ours(
    ours: tuple[Path, dict[tuple[str, ...], torch.Tensor]], options: dict[str, Any]
) -> None:
    path, data = ours
    got = torch.load(path, **options)
    assert list(got) == ["model", "model1", "checkpoint_version", "n"]
    assert got["checkpoint_version"] == 3.0 and isinstance(got["checkpoint_version"], float)
    storages = set()
    for key, tensor in data.items():
        loaded: Any = got
        for part in key:
            loaded = loaded[part]
        assert same_bits(loaded, tensor), key
        assert loaded.is_contiguous() and not loaded.requires_grad
        storages.add(loaded.untyped_storage()._cdata)
    assert len(storages) == len(data)
    assert list(got["model1"]["deep"]) == [key[-1] for key in data if key[0] == "model1"]


def test_torch_agrees_on_offsets(ours: tuple[Path, Any]) -> None:
    path, data = ours
    content: Any = read_pt(path).content
    with FakeTensorMode():
        fake = torch.load(path)
    for key in data:
        stored: Any = content
        loaded = fake
        for part in key:
            stored, loaded = stored[part], loaded[part]
        assert loaded.untyped_storage()._checkpoint_offset == stored.offset
        assert stored.offset % 64 == 0


def test_we_read_ours(ours: tuple[Path, Any]) -> None:
    path, data = ours
    file = read_pt(path)
    for key, tensor in data.items():
        stored: Any = file.content
        for part in key:
            stored = stored[part]
        assert stored.name == key[-1] and stored.strides is None and stored.path == path
        assert same_bits(content_of(stored), tensor)
    want = sum(tensor.nbytes for tensor in data.values())
    assert file.referenced_bytes(file.content) == want == sum(file.storage_bytes.values())
    assert file.referenced_bytes(file.content["model"]) == 32


def test_layout_is_deterministic_and_a_valid_zip(tmp_path: Path) -> None:
    tree = {"a": {"b": Slot("F32", (3,))}, "v": 3.0}
    assert pt_image("x", tree) == pt_image("x", tree)
    assert pt_image("x", tree, stem="x") != pt_image("x", tree)
    path = tmp_path / "a.pt"
    write(path, tree)
    first = path.read_bytes()
    write(path, tree)
    assert path.read_bytes() == first
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
        assert archive.getinfo("archive/data/0").file_size == 12
        assert archive.read("archive/data.pkl")
    layout = pt_image("x", tree)
    ends = [0]
    for offset, data in layout.heads:
        assert offset >= ends[-1]
        ends.append(offset + len(data))
    assert ends[-1] == layout.size == path.stat().st_size


def test_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write(path, {"model": {}, "checkpoint_version": 3.0})
    assert torch.load(path) == {"model": {}, "checkpoint_version": 3.0}
    assert read_pt(path).content == {"model": {}, "checkpoint_version": 3.0}


@pytest.mark.nightly
def test_more_records_than_a_plain_zip_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write(path, {f"t{i}": Slot("U8", (1,)) for i in range(65_540)})
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 65_543
    reader: Any = torch._C.PyTorchFileReader(str(path))
    assert reader.has_record("data/65539")
    assert reader.get_record_offset("data/65539") == layout_offsets(path)["t65539"]


def layout_offsets(path: Path) -> dict[str, int]:
    return {name: tensor.offset for name, tensor in read_pt(path).content.items()}


def test_writer_refuses_dtypes() -> None:
    with pytest.raises(RequestError, match="F8_E4M3"):
        pt_image("x", {"t": Slot("F8_E4M3", (1,))})
    with pytest.raises(RequestError, match="nonsense"):
        pt_image("x", {"t": Slot("nonsense", (1,))})


def test_beyond_4_gib_by_us(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    tree = {
        "m": {"a": Slot("U8", (3,)), "big": Slot("BF16", (5, GIB // 2)), "z": Slot("I64", (2,))}
    }
    data = {
        ("m", "a"): torch.tensor([1, 2, 3], dtype=torch.uint8),
        ("m", "z"): torch.tensor([4, 5]),
    }
    write(path, tree, data)
    with open(path, "r+b") as file:
        file.seek(offset_of(tree, "m", "big") + 5 * GIB - 2)
        file.write(b"\x80\x3f")
    got = torch.load(path, mmap=True)["m"]
    assert got["a"].tolist() == [1, 2, 3] and got["z"].tolist() == [4, 5]
    assert got["big"].shape == (5, GIB // 2) and got["big"][-1, -1] == 1 and got["big"][0, 0] == 0
    ours = read_pt(path).content["m"]
    assert content_of(ours["z"]).tolist() == [4, 5]
    assert ours["z"].offset > 5 * GIB
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/1").file_size == 5 * GIB


def test_beyond_4_gib_by_torch(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    content = {
        "a": torch.zeros(3),
        "big": torch.empty(5, GIB, dtype=torch.int8),
        "z": torch.ones(2),
    }
    with torch.serialization.skip_data():
        torch.save(content, path)
    file = read_pt(path)
    reader: Any = torch._C.PyTorchFileReader(str(path))
    for number, name in enumerate(content):
        assert file.content[name].offset == reader.get_record_offset(f"data/{number}")
        assert file.content[name].shape == content[name].shape
    assert file.storage_bytes == {"0": 12, "1": 5 * GIB, "2": 8}


# Theirs, read by us.


def save(path: Path, content: object, protocol: int = 2) -> PtFile:
    torch.save(content, path, pickle_protocol=protocol)
    return read_pt(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_we_read_theirs(tmp_path: Path, protocol: int) -> None:
    torch.manual_seed(1)
    buffer = torch.randn(1000)
    base = random_tensor(torch.bfloat16, (6, 8))
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model = {
        "first": buffer[10:22].view(3, 4),
        "second": buffer[22:24],
        "scalar": torch.tensor(2.5),
        "transposed": base.t(),
        "columns": base[:, 2:5],
        "steps": base[::2, ::3],
        "whole": base,
        "expanded": torch.tensor([1.0]).expand(4, 3),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "bytes": torch.arange(7, dtype=torch.uint8)[:4].view(torch.int16),
        "u16": random_tensor(torch.uint16, (5,)),
        "float8": random_tensor(torch.float8_e4m3fn, (3, 3)),
        "one": torch.randn(3, 1, 2).transpose(0, 1),
    }
    content = {
        "model": model,
        "module": module.state_dict(),
        "list": [torch.ones(2), (torch.ones(3),)],
    }
    assert hasattr(content["module"], "_metadata")
    file = save(tmp_path / "theirs.pt", content, protocol)
    for name, tensor in model.items():
        stored = file.content["model"][name]
        assert stored.name == name
        assert same_bits(content_of(stored), tensor), name
        assert (stored.strides is None) == (tensor.is_contiguous()), name
    assert type(file.content["module"]) is dict
    for name, tensor in module.state_dict().items():
        assert same_bits(content_of(file.content["module"][name]), tensor)
    first, (second,) = file.content["list"]
    assert same_bits(content_of(first), torch.ones(2)) and first.name == "list"
    assert same_bits(content_of(second), torch.ones(3))
    assert file.content["model"]["first"].offset + 48 == file.content["model"]["second"].offset
    # Shared storages count once, and in full.
    views = {name: file.content["model"][name] for name in ("first", "second")}
    assert file.referenced_bytes(views) == 4000
    assert file.referenced_bytes(file.content["model"]["columns"]) == base.nbytes


def test_training_file(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    content = {
        "args": argparse.Namespace(tp=2, tensor=torch.ones(5)),
        "iteration": 100,
        "model": collections.OrderedDict(weight=weight.detach(), extra=None),
        "optimizer": optimizer.state_dict(),
        "rng_state": [torch.get_rng_state()],
        "storage": torch.ones(3).untyped_storage(),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "tied": weight.detach(),
    }
    file = save(tmp_path / "model_optim_rng.pt", content)
    assert file.content["iteration"] == 100 and file.content["model"]["extra"] is None
    assert same_bits(content_of(file.content["model"]["weight"]), weight)
    assert file.content["tied"].name == "tied"
    assert file.content["tied"].offset == file.content["model"]["weight"].offset
    args = file.content["args"]
    assert isinstance(args, Inert) and isinstance(args.state, dict)
    assert same_bits(content_of(args.state["tensor"]), torch.ones(5))
    assert args.state["tensor"].name == "tensor"
    assert isinstance(file.content["storage"], StorageRef)
    assert isinstance(file.content["complex"], Inert)
    used = {key: file.referenced_bytes(value) for key, value in file.content.items()}
    assert used["model"] == used["tied"] == 36
    assert used["args"] == 20
    assert used["optimizer"] == 36 + 36 + 4
    assert used["storage"] == 12 and used["complex"] == 16 and used["iteration"] == 0
    assert file.referenced_bytes([file.content["model"], file.content["tied"]]) == 36


def test_without_newer_records(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.arange(3)}, path)
    repack(
        path, drop=("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
    )
    assert content_of(read_pt(path).content["a"]).tolist() == [0, 1, 2]


def test_name_of_the_file_in_the_archive(tmp_path: Path) -> None:
    file = save(tmp_path / "模型 é.pt", {"a": torch.arange(3)})
    assert content_of(file.content["a"]).tolist() == [0, 1, 2]


def test_lists_that_contain_themselves(tmp_path: Path) -> None:
    cycle: list[Any] = [torch.arange(3)]
    cycle.append((cycle, cycle))
    file = save(tmp_path / "a.pt", {"a": cycle})
    got = file.content["a"]
    assert got[1][0] is got and content_of(got[0]).tolist() == [0, 1, 2]
    assert file.referenced_bytes(got) == 24


# Broken files.


@pytest.mark.parametrize("change", [-64, -1, 1, 3, 64])
def test_local_header_whose_padding_has_another_length(tmp_path: Path, change: int) -> None:
    """Else the record's data would be read a few bytes off, into what lies around it."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(1000), "b": torch.arange(1000)}, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data/1"))
    (length,) = struct.unpack_from("<H", data, at + 28)
    struct.pack_into("<H", data, at + 28, max(0, length + change))
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"extra field|overlaps|past the end|to no record"):
        read_pt(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "small.pt"
    content = {"model": {"a": torch.arange(6).view(2, 3), "b": torch.ones(3)}, "v": 3.0}
    torch.save(content, path)
    return path.read_bytes()


def refused(path: Path, match: str) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        read_pt(path)
    assert str(path) in caught.value.what and caught.value.expected and caught.value.fix


def repack(
    path: Path,
    drop: tuple[str, ...] = (),
    change: Callable[[str, bytes], bytes] = lambda name, data: data,
    compression: int = zipfile.ZIP_STORED,
    add: tuple[str, ...] = (),
) -> None:
    """Write the archive anew with python's zipfile, without paddings and descriptors."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            short = name.split("/", 1)[1]
            if short not in drop:
                archive.writestr(name, change(short, data))
        for name in add:
            archive.writestr(name, b"x")


def test_truncated_anywhere(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for size in range(0, len(small), 7):
        path.write_bytes(small[:size])
        refused(path, "empty" if not size else f"{size} bytes|not a zip")


def test_other_kinds_of_files(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_bytes(b"hello")
    refused(path, "not a zip")
    path.write_bytes(b"x" + small)
    refused(path, "not a zip")
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, r"before 1\.6")
    with pytest.raises(FormatError, match=r"torch\.save\(torch\.load\(f, weights_only=True\), f\)"):
        read_pt(path)
    with tarfile.open(path, "w") as archive:
        archive.add(__file__)
    refused(path, "tar")
    with pytest.raises(CheckpointError, match="No such file"):
        read_pt(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="directory"):
        read_pt(tmp_path)


DEEP = b"}X\1\0\0\0a" + b"]" * 101 + b"a" * 100 + b"s."  # lists in lists


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"drop": ("data.pkl",)}, "0 records"),
        ({"add": ("other/data.pkl",)}, "2 records"),
        ({"drop": ("data/1",)}, "'1' has no record"),
        ({"change": lambda n, d: b"big" if n == "byteorder" else d}, "byte order b'big'"),
        ({"change": lambda n, d: d[:-1] if n == "data/1" else d}, "'1' has 11 bytes"),
        ({"change": lambda n, d: d + b"xxxx" if n == "data/1" else d}, "'1' has 16 bytes"),
        ({"change": lambda n, d: d[:-1] if n == "data.pkl" else d}, "data.pkl"),
        ({"change": lambda n, d: b"\x80\x02]." if n == "data.pkl" else d}, "top level is a list"),
        ({"change": lambda n, d: b"\x80\x02}K\x01Ns." if n == "data.pkl" else d}, "text keys"),
        ({"change": lambda n, d: DEEP if n == "data.pkl" else d}, "100 deep"),
    ],
)  # fmt: skip
def test_broken_records(small: bytes, tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(small)
    repack(path, **change)
    refused(path, match)


def test_repacking_alone_breaks_nothing(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(small)
    repack(path)
    assert content_of(read_pt(path).content["model"]["a"]).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_view_out_of_range(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "a.pt"
    shape = b"K\x02K\x03\x86"
    path.write_bytes(small)
    repack(path, change=lambda n, d: d.replace(shape, b"K\x02K\x04\x86") if n == "data.pkl" else d)
    refused(path, "leaves storage '0' of 6 elements")


def directory_field(data: bytes | bytearray, name: bytes, at: int) -> int:
    """Where a field of a directory entry lies, by its offset in the entry."""
    entry = data.rindex(name) - 46
    assert data[entry : entry + 4] == b"PK\1\2"
    return entry + at


def test_records_that_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    tree = {"a": Slot("U8", (200,)), "b": Slot("U8", (10,))}
    write(path, tree)
    data = bytearray(path.read_bytes())
    # A second local header for data/1 inside the data of data/0, and the directory led there.
    inside = offset_of(tree, "a")
    name = b"archive/data/1"
    header = b"PK\3\4" + struct.pack("<5H3I2H", 20, 0x800, 0, 0, 33, 0, 10, 10, len(name), 0) + name
    data[inside : inside + len(header)] = header
    path.write_bytes(data)
    assert read_pt(path)  # only data so far
    at = directory_field(data, name, 42)
    data[at : at + 4] = struct.pack("<I", inside)
    path.write_bytes(data)
    torch.load(path)  # torch does not mind
    refused(path, "overlaps")


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (8, struct.pack("<H", 0x801), "encrypted"),
        (10, struct.pack("<H", 8), "compressed"),
        (20, struct.pack("<I", 9), "compressed"),
        (20, struct.pack("<2I", 2**31, 2**31), "past the end of the file|no readable"),
        (42, struct.pack("<I", 2**31), "outside the file|to no record|no readable"),
        (42, struct.pack("<I", 1), "overlaps"),
        (46, b"archive/data/7", "no local header"),
        (46, b"archive/data/0", "twice|no readable"),
    ],
)
def test_broken_directory(tmp_path: Path, at: int, value: bytes, match: str) -> None:
    path = tmp_path / "a.pt"
    write(path, {"a": Slot("U8", (200,)), "b": Slot("U8", (10,))})
    data = bytearray(path.read_bytes())
    where = directory_field(data, b"archive/data/1", at)
    data[where : where + len(value)] = value
    path.write_bytes(data)
    refused(path, match)


def test_local_header_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    tree = {"a": Slot("U8", (200,))}
    write(path, tree)
    whole = path.read_bytes()
    start = whole.index(b"archive/data/0") - 30
    for at, value in [
        (0, b"PK\3\5"),
        (6, b"\1"),
        (8, b"\x08"),
        (26, b"\x01"),
        (28, b"\xff\xff"),
        (30, b"A"),
    ]:
        data = bytearray(whole)
        data[start + at : start + at + len(value)] = value
        path.write_bytes(data)
        refused(path, "archive/data/0")


def test_hostile_pickle_is_not_run(small: bytes, tmp_path: Path) -> None:
    path, marker = tmp_path / "a.pt", tmp_path / "marker"
    attack = f"}}X\1\0\0\0acos\nsystem\n(S'touch {marker}'\ntRs.".encode()
    path.write_bytes(small)
    repack(path, change=lambda n, d: attack if n == "data.pkl" else d)
    assert isinstance(read_pt(path).content["a"], Inert)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the attack is real
    assert marker.exists()


@settings(examples(60, nightly=150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_give_a_result_or_an_error(
    small: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    whole = bytearray(small)
    for _ in range(data.draw(st.integers(1, 3))):
        # The directory and the headers are few bytes: aim at them as often as at the rest.
        low = data.draw(st.sampled_from([0, small.index(b"PK\1\2"), len(small) - 98]))
        at = data.draw(st.integers(low, len(small) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.pt"
    path.write_bytes(whole)
    try:
        file = read_pt(path)
    except CheckpointError:
        return
    file.referenced_bytes(file.content)
    pending: list[Any] = [file.content]
    while pending:
        item = pending.pop()
        if isinstance(item, StoredTensor):
            content_of(item)  # raises if it leaves the file
        elif isinstance(item, dict):
            pending += item.values()


def test_a_file_of_another_kind_may_be_whole(tmp_path: Path) -> None:
    """Copying it again would not make it one of torch.save's."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(600))
    with pytest.raises(FormatError, match="not a zip archive") as caught:
        read_pt(tmp_path / "a.gguf")
    assert "files of other kinds are not read" in caught.value.fix
