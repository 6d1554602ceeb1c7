"""The pickle in a new ``.pt`` file: its containers, scalars and tensors, as torch.save writes them.

Rules: ``_save`` in ``torch/serialization.py``, and protocol 2 in ``pickletools``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, cast

from mmconvert.errors import RequestError
from mmconvert.formats.containers.torch_objects import STORAGE_DTYPE, TORCH_DTYPE, Global
from mmconvert.narrow import is_array, is_tuple

_STORAGE_NAME = {dtype: name for name, dtype in STORAGE_DTYPE.items() if name != "UntypedStorage"}


class Namespace(NamedTuple):
    """An ``argparse.Namespace``, as Megatron saves its arguments."""

    values: Mapping[str, object]


class TensorSlot(NamedTuple):
    """A tensor in a pickle: its storage's key, safetensors dtype and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]


Scalar = float | int | str  # bool is an int
# What a file may hold, nested: dicts, lists and tuples of scalars and tensors, namespaces, and
# dtypes of torch.
SlotTree = Mapping[Any, Any]


def emit_state(tree: object) -> bytes:
    """Pickle (protocol 2) nested containers of scalars and tensors as torch.save would.

    Each tensor is contiguous, alone in its storage and on the CPU, without gradient.

    Raises:
        RequestError: a dtype that has no typed torch storage, or a value of another type.
    """
    emitter = _Emitter()
    emitter.value(tree)
    return bytes(emitter.out + b".")


class _Emitter:
    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[bytes, int] = {}
        # Of tensors of one dtype and shape, which layers have many of: what stands before and
        # behind the storage's key.
        self.forms: dict[tuple[str, tuple[int, ...]], tuple[bytes, bytes]] = {}

    def shared(self, code: bytes) -> None:
        """Code whose object is used again and again: globals and the strings in each tensor."""
        if code in self.memo:
            self.out += b"h" + bytes([self.memo[code]])
        else:
            # At most 30: two functions, ten storage types, two strings, the dtypes, Namespace.
            self.memo[code] = len(self.memo)
            self.out += code + b"q" + bytes([self.memo[code]])

    def integer(self, value: int) -> None:
        if 0 <= value < 2**8:
            self.out += struct.pack("<cB", b"K", value)
        elif 0 <= value < 2**16:
            self.out += struct.pack("<cH", b"M", value)
        elif -(2**31) <= value < 2**31:
            self.out += struct.pack("<ci", b"J", value)
        elif (size := value.bit_length() // 8 + 1) < 256:  # floating-point operations are many
            self.out += b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        else:
            raise RequestError(f"an integer of {value.bit_length()} bits", "at most 2039 bits")

    def sizes(self, values: tuple[object, ...]) -> None:
        """A tuple."""
        self.out += b"(" if len(values) > 3 else b""
        for value in values:
            self.value(value)
        self.out += {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(values), b"t")

    def value(self, value: object) -> None:
        if isinstance(value, TensorSlot):
            self.tensor(value)
        elif isinstance(value, Namespace):
            self.shared(b"cargparse\nNamespace\n")
            self.out += b")\x81"
            self.mapping(value.values)
            self.out += b"b"
        elif isinstance(value, Global):
            self.dtype(value)
        elif isinstance(value, Mapping):
            self.mapping(cast("Mapping[object, object]", value))
        elif is_tuple(value):
            self.sizes(value)
        elif is_array(value):
            self.array(value)
        else:
            self.scalar(value)

    def scalar(self, value: object) -> None:
        if value is None:
            self.out += b"N"
        elif isinstance(value, bool):
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out += struct.pack(">cd", b"G", value)
        elif isinstance(value, str):
            self.out += _text(value)
        else:
            raise RequestError(
                f"a {type(value).__name__} cannot be written to a .pt file",
                expected="dicts, lists, tensors, numbers and text",
            )

    def dtype(self, value: Global) -> None:
        if value.module != "torch" or value.name not in TORCH_DTYPE:
            raise RequestError(f"{value} cannot be written to a .pt file", "a dtype of torch")
        self.shared(f"ctorch\n{value.name}\n".encode())

    def array(self, items: Sequence[object]) -> None:
        self.out += b"](" if items else b"]"
        for item in items:
            self.value(item)
        self.out += b"e" if items else b""

    def mapping(self, items: Mapping[Any, object]) -> None:
        self.out += b"}" + b"(" * (len(items) > 1)
        for key, item in items.items():
            self.value(_key(key))
            self.value(item)
        self.out += (b"", b"s", b"u")[min(len(items), 2)]

    def tensor(self, slot: TensorSlot) -> None:
        form = (slot.dtype, slot.shape)
        if (found := self.forms.get(form)) is None:
            known, start = len(self.memo), len(self.out)
            found = self.new_form(slot)
            del self.out[start:]
            if len(self.memo) == known:  # so the next one is written with the same bytes
                self.forms[form] = found
        self.out += found[0] + _text(slot.key) + found[1]

    def new_form(self, slot: TensorSlot) -> tuple[bytes, bytes]:
        """What stands before and behind the storage's key; ``out`` is left as it comes."""
        if slot.dtype not in _STORAGE_NAME:
            raise RequestError(
                f"a tensor of dtype {slot.dtype} cannot be written to a .pt file",
                expected=f"one of {', '.join(_STORAGE_NAME)}",
                fix="convert it to another dtype",
            )
        if any(n < 0 for n in slot.shape):
            raise RequestError(f"a tensor of shape {slot.shape} cannot be written")
        strides = tuple(
            prod(max(n, 1) for n in slot.shape[i + 1 :]) for i in range(len(slot.shape))
        )
        start = len(self.out)
        self.shared(b"ctorch._utils\n_rebuild_tensor_v2\n")
        self.out += b"(("
        self.shared(_text("storage"))
        self.shared(f"ctorch\n{_STORAGE_NAME[slot.dtype]}\n".encode())
        middle = len(self.out)
        self.shared(_text("cpu"))
        self.integer(prod(slot.shape))
        self.out += b"tQ"
        self.integer(0)
        self.sizes(slot.shape)
        self.sizes(strides)
        self.out += b"\x89"
        self.shared(b"ccollections\nOrderedDict\n")
        self.out += b")RtR"
        return bytes(self.out[start:middle]), bytes(self.out[middle:])


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<cI", b"X", len(data)) + data


def _key(key: object) -> object:
    """A key of a dict, if it can be one: text, a number, or a tuple of dtypes."""
    if isinstance(key, (str, int)) or (is_tuple(key) and all(isinstance(k, Global) for k in key)):
        return key
    raise RequestError(
        f"a {type(key).__name__} cannot be a key in a .pt file", expected="text or a number"
    )
