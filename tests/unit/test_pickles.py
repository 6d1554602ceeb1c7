"""The pickle machine: what it understands, and that it runs nothing."""

from __future__ import annotations

import argparse
import collections
import contextlib
import enum
import io
import os
import pickle
import pickletools
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmconvert.errors import FormatError, RequestError
from mmconvert.formats.containers.pickles import Global, Inert, StorageRef, TensorRef, load_pickle
from mmconvert.formats.containers.ptpickle import TensorSlot, emit_state
from nights import examples


def load(data: bytes) -> Any:
    return load_pickle(data, "file")


def saved(content: object, protocol: int = 2) -> bytes:
    """The data.pkl that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol)
    return zipfile.ZipFile(file).read("archive/data.pkl")


class Plain:
    def __init__(self) -> None:
        self.size = 3


class Listing(list):
    pass


class Table(dict):
    pass


class Color(enum.Enum):
    RED = "red"


plain_trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(-(2**50), 2**50) | st.binary(), inner)
        | st.sets(st.text() | st.tuples(st.text(), st.booleans()))
        | st.frozensets(st.text())
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(plain_trees, st.integers(2, 5))
def test_plain_values_are_what_pickle_gives(tree: object, protocol: int) -> None:
    if protocol < 5 and "bytearray" in repr(tree):
        protocol = 5  # only protocol 5 has an opcode for bytearray; before it is a call
    assert load(pickle.dumps(tree, protocol)) == tree


def test_old_protocols() -> None:
    tree = {"a": [1, 2.5, "x", None, True], "b": (1, 2, 3, 4), "long": 2**70}
    assert load(pickle.dumps(tree, 0)) == tree
    assert load(pickle.dumps(tree, 1)) == tree
    assert load(b"(K\x01Nd.") == {1: None}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_training_objects_stay_inert(protocol: int) -> None:
    listing, table = Listing([1, 2]), Table(a=1)
    content = {
        "args": argparse.Namespace(tp=2, kind=Color.RED),
        "plain": Plain(),
        "listing": listing,
        "table": table,
        "default": collections.defaultdict(list, a=[1]),
        "rng": [random.getstate(), np.random.get_state(), np.float64(1.5)],
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size((2, 3)),
        "path": Path("a/b"),
        "none": None,
        "set": {"a", 1},
        "keys": {Color.RED: 1},
    }
    got = load(saved(content, protocol))
    assert isinstance(got, dict)
    args = got["args"]
    assert isinstance(args, Inert) and args.function == Global("argparse", "Namespace")
    assert args.state["tp"] == 2
    kind = args.state["kind"]
    assert isinstance(kind, Inert) and kind.args == ("red",)
    assert kind.function == Global(__name__, "Color")
    assert got["plain"].state == {"size": 3}
    assert got["listing"].items == [1, 2]
    assert got["table"].entries == {"a": 1}
    assert got["default"] == {"a": [1]}
    assert got["rng"][0] == random.getstate()
    assert isinstance(got["rng"][2], Inert)
    assert got["dtype"] == Global("torch", "bfloat16")
    assert isinstance(got["device"], Inert)
    assert got["size"] == (2, 3)
    assert got["none"] is None
    assert got["set"] == {"a", 1}
    assert next(iter(got["keys"])) is kind


def tensor_ref(content: torch.Tensor, protocol: int = 2) -> object:
    got = load(saved({"t": content}, protocol))
    assert isinstance(got, dict)
    return got["t"]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.float32, "F32"),
        (torch.float64, "F64"),
        (torch.int64, "I64"),
        (torch.int32, "I32"),
        (torch.int16, "I16"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
    ],
)
def test_typed_storages(dtype: torch.dtype, name: str) -> None:
    want = TensorRef(StorageRef("0", name, 6), name, (2, 2), (1, 3), 1)
    assert tensor_ref(torch.zeros(6, dtype=dtype).as_strided((2, 2), (1, 3), 1)) == want


@pytest.mark.parametrize(
    ("dtype", "name", "size"),
    [
        (torch.uint16, "U16", 2),
        (torch.uint32, "U32", 4),
        (torch.uint64, "U64", 8),
        (torch.float8_e4m3fn, "F8_E4M3", 1),
        (torch.float8_e5m2, "F8_E5M2", 1),
    ],
)
def test_untyped_storages_of_version_3(dtype: torch.dtype, name: str, size: int) -> None:
    want = TensorRef(StorageRef("0", "U8", 6 * size), name, (2,), (3,), 2)
    assert tensor_ref(torch.zeros(6, dtype=dtype).as_strided((2,), (3,), 2)) == want


def test_parameters_and_tensors_with_attributes() -> None:
    plain = tensor_ref(torch.zeros(2))
    assert isinstance(plain, TensorRef)
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert tensor_ref(parameter) == plain
    parameter.partition_dim = 0  # pyright: ignore[reportAttributeAccessIssue]
    assert tensor_ref(parameter) == plain
    tensor = torch.zeros(2)
    tensor.note = "x"  # pyright: ignore[reportAttributeAccessIssue]
    assert tensor_ref(tensor) == plain


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantized tensors are deprecated
def test_tensors_without_a_dtype_stay_inert() -> None:
    assert isinstance(tensor_ref(torch.zeros(2, dtype=torch.complex64)), Inert)
    assert isinstance(
        tensor_ref(torch.quantize_per_tensor(torch.zeros(2), 1, 0, torch.qint8)), Inert
    )
    negated = torch.zeros(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg() and negated.dtype == torch.float32
    assert isinstance(tensor_ref(negated), Inert)


def test_npu_tensor() -> None:
    for module in ("torch_npu.utils.storage", "torch_npu.utils.serialization"):
        plain = emit_state({"t": TensorSlot("0", "F32", (2, 3))})
        npu = plain.replace(
            b"ctorch._utils\n_rebuild_tensor_v2\n", f"c{module}\n_rebuild_npu_tensor\n".encode()
        ).replace(b")RtR", b")R\x88tR")  # a seventh argument: the device format
        assert npu != plain and load(npu) == load(plain)


def test_shared_objects_and_cycles() -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    got = load(pickle.dumps(cycle))
    assert isinstance(got, list) and got[0] is got


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    data = pickle.dumps(Attack(marker), protocol)
    got = load(data)
    assert isinstance(got, Inert) and str(got.function) == "posix.system"
    assert load(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    assert load(f"(S'touch {marker}'\nios\nsystem\n.".encode())
    assert not marker.exists()
    pickle.loads(data)  # the attack is real
    assert marker.exists()


def shared_tuples(depth: int) -> bytes:
    return b"\x80\x02)" + b"q\x00h\x00\x86" * depth


BOMBS = {
    "binbytes8": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "binunicode8": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "binunicode": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "long4": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "long4 negative": b"\x80\x02\x8b" + struct.pack("<i", -1) + b"x.",
    "decimal": b"I" + b"9" * 100_000 + b"\n.",
    "shared key": b"\x80\x02}" + shared_tuples(200) + b"Ns.",
    "deep key": b"\x80\x02})" + b"\x85" * 20_000 + b"Ns.",
    "huge key": b"}\x8a\x09" + b"\x00" * 8 + b"\x01Ns.",
    "infinite key": b"}G" + struct.pack(">d", float("inf")) + b"Ns.",
}  # fmt: skip


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_bombs(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            load(data)
        assert tracemalloc.get_traced_memory()[1] < 200 * len(data) + 2**20
    finally:
        tracemalloc.stop()


def test_memo_index_costs_nothing() -> None:
    tracemalloc.start()
    try:
        assert load(b"\x80\x02Nr" + struct.pack("<I", 2**31) + b".") is None
        assert load(b"Np99999999999999999999\n.") is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "part",
    [b"\x8f", b"(\x91", b"}\x94", b"\x8fK\x01\x90", b"}NNs", b"]", b"N\x85", b"h\x00)RNNs"],
    ids=repr,
)
def test_objects_that_take_more_memory_than_any_pickle_of_this_size(
    part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty set is one byte in a pickle and 216 in memory."""
    monkeypatch.setattr("mmconvert.formats.containers.picklestack.FREE_MEMORY", 1 << 20)
    fill = part * (300_000 // len(part))
    made = b"\x80\x04(cx\ny\nq\x00" + fill.replace(b"\x8fK", b"\x8f(K") + b"l."
    with pytest.raises(FormatError, match="MiB of memory"):
        load(made)


def test_many_tensors_take_no_more_memory_than_they_may() -> None:
    tensors = {
        f"model.layers.{i}.mlp.experts.7.up_proj.weight": torch.zeros(2, 2) for i in range(5000)
    }
    moments = {
        i: {"exp_avg": t, "exp_avg_sq": torch.zeros(3), "step": 1}
        for i, t in enumerate(tensors.values())
    }
    got = load(saved({"model": tensors, "optimizer": {"state": moments}}, 2))
    assert len(got["model"]) == len(got["optimizer"]["state"]) == 5000


def test_too_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are limited by the size; a list that is written once may be copied by each call."""
    monkeypatch.setattr("mmconvert.formats.containers.picklestack.FREE_STEPS", 500)
    assert load(b"N0" * 10_000 + b"N.") is None
    shared = b"(" + b"N" * 100 + b"lq\x000"
    for module, name in [("__builtin__", "set"), ("torch", "Size"), ("builtins", "frozenset")]:
        call = f"c{module}\n{name}\nq\x010h\x00\x85q\x020".encode("latin-1")
        assert load(shared + call + b"h\x01h\x02R0" * 2 + b"N.") is None
        with pytest.raises(FormatError, match="steps"):
            load(shared + call + b"h\x01h\x02R0" * 20 + b"N.")


MALFORMED = {
    "empty": b"",
    "no stop": b"\x80\x02N",
    "trailing": b"N.N",
    "two objects": b"NN.",
    "open mark": b"N(.",
    "nothing": b".",
    "underflow": b"0.",
    "pop below a mark": b"N(K\x01\x86t0.",
    "no mark": b"t.",
    "unknown opcode": b"\xff.",
    "protocol": b"\x80\x06N.",
    "persistent text": b"Pabc\n.",
    "persistent number": b"K\x01Q.",
    "extension": b"\x82\x01.",
    "buffer": b"\x97.",
    "memo": b"h\x00.",
    "list key": b"}]Ns.",
    "set of lists": b"\x8f(]\x90.",
    "odd items": b"}(Nu.",
    "append to dict": b"}Na.",
    "add to list": b"](N\x90.",
    "call of a number": b"K\x01)R.",
    "call without a tuple": b"cos\nsystem\nNR.",
    "state of a number": b"K\x01Nb.",
    "bad utf-8": b"X\x01\x00\x00\x00\xff.",
    "unnamed global": b"K\x01K\x02\x93.",
    "pairs": b"ccollections\nOrderedDict\n(]K\x01atR.",
    "parameter": b"ctorch._utils\n_rebuild_parameter\n(K\x01\x89NtR.",
    "set of a number": b"cbuiltins\nset\nK\x01\x85R.",
    "encode": b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(data: bytes) -> None:
    with pytest.raises(FormatError, match="file: "):
        load(data)


def rebuilt(
    storage: tuple[object, ...] = ("FloatStorage", "0", 6),
    offset: object = 0,
    shape: object = (2, 3),
    strides: object = (3, 1),
) -> object:
    """What becomes of one _rebuild_tensor_v2 call with these arguments."""

    def value(item: object) -> bytes:
        return pickle.dumps(item, 2)[2:-1]

    kind, key, numel = storage
    data = b"ctorch._utils\n_rebuild_tensor_v2\n(("
    data += value("storage") + f"ctorch\n{kind}\n".encode() + value(key) + value("cpu")
    data += value(numel) + b"tQ" + value(offset) + value(shape) + value(strides)
    data += value(False) + b"}tR."
    return load(data)


def test_views_inside() -> None:
    assert isinstance(rebuilt(), TensorRef)
    assert isinstance(rebuilt(shape=(), strides=(), offset=5), TensorRef)
    assert isinstance(rebuilt(shape=(2**40,), strides=(0,)), TensorRef)
    assert isinstance(rebuilt(shape=(0, 9), strides=(9, 1), offset=99), TensorRef)
    assert isinstance(rebuilt(("UnheardOfStorage", "0", 6)), Inert)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**63},
        {"offset": 0.0},
        {"offset": True},
        {"shape": (2, 4)},
        {"shape": (-2, 3)},
        {"shape": (2, 3, 1)},
        {"shape": [2, 3]},
        {"shape": ("2", 3)},
        {"shape": (2**62, 2**62), "strides": (0, 0)},
        {"strides": (4, 1)},
        {"strides": (3, -1)},
        {"shape": (), "strides": (), "offset": 6},
        {"shape": (1,) * 65, "strides": (1,) * 65},
        {"storage": ("FloatStorage", "0", -1)},
        {"storage": ("FloatStorage", 0, 6)},
        {"storage": ("FloatStorage", "0", 2**63)},
    ],
)
def test_views_outside(wrong: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        rebuilt(**wrong)  # pyright: ignore[reportArgumentType]


@examples(60, nightly=150)
@given(st.data())
def test_mutations_give_a_result_or_a_format_error(data: st.DataObject) -> None:
    whole = bytearray(
        saved({"model": {"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "set": {1}, "v": 3.0}, 2)
        if data.draw(st.booleans())
        else saved({"o": Plain(), "p": torch.nn.Parameter(torch.zeros(2)), "n": Color.RED}, 5)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        load(bytes(whole))


CODE = [bytes([n]) for n in b"().0123N}])\x85\x86\x8f\x90Rbsuaelt\x81\x92Qd"]
CODE += [b"K\x01", b"q\x00", b"h\x00", b"cos\nsystem\n", b"ctorch\nByteStorage\n"]
CODE += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]
CODE += [b"X\x07\x00\x00\x00storage"]


@examples(60, nightly=150)
@given(st.lists(st.sampled_from(CODE), max_size=40))
def test_any_program_gives_a_result_or_a_format_error(parts: list[bytes]) -> None:
    with contextlib.suppress(FormatError):
        load(b"\x80\x04" + b"".join(parts) + b".")


# The emitter.


def test_emitted_pickle_equals_that_of_torch() -> None:
    shapes = {"BF16": (3, 2), "F32": (), "F64": (0, 3), "I64": (2, 3, 4), "BOOL": (2, 1, 1, 2, 3)}
    shapes |= {"F16": (70_000,), "I32": (300,), "I16": (3, 0), "I8": (1,), "U8": (2,)}
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    dtypes |= {"I64": torch.int64, "BOOL": torch.bool, "F16": torch.float16, "I32": torch.int32}
    dtypes |= {"I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    scalars = {"checkpoint_version": 3.0, "n": -1, "m": 2**40, "k": 65_535, "on": True, "s": "né"}
    ours = emit_state(
        {
            "model": {"in": {n: TensorSlot(str(i), n, shapes[n]) for i, n in enumerate(shapes)}},
            "empty": {},
            **scalars,
        }
    )  # fmt: skip
    tensors = {n: torch.empty(s, dtype=dtypes[n]) for n, s in shapes.items()}
    theirs = saved({"model": {"in": tensors}, "empty": {}, **scalars})
    assert load(ours) == load(theirs)
    assert list(load(ours)) == ["model", "empty", *scalars]
    # Identical but for memo entries that nothing reads.
    assert torch_calls(ours) == torch_calls(theirs)


def torch_calls(data: bytes) -> list[tuple[str, object]]:
    """The opcodes without memo ones, each memo read replaced by what it stands for."""
    calls: list[tuple[str, object]] = []
    memo: dict[object, tuple[str, object]] = {}
    for opcode, arg, _ in pickletools.genops(data):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = calls[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            calls.append(memo[arg])
        else:
            calls.append((opcode.name, arg))
    return calls


@pytest.mark.parametrize(
    "tree",
    [
        {"t": TensorSlot("0", "U16", (1,))},
        {"t": TensorSlot("0", "F8_E4M3", (1,))},
        {"t": TensorSlot("0", "F32", (-1,))},
        {"t": {1}},
        {b"k": 2},
        {"n": 2**2048},
    ],
)
def test_emitter_refuses(tree: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        emit_state(tree)  # pyright: ignore[reportArgumentType]
