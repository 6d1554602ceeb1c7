"""What a torch pickle is made of: inert stand-ins, and the tensors that it describes.

Nothing here imports or calls what a pickle names.  The functions raise ValueError; the pickle
machine turns that into a FormatError that says where.  Rules: ``torch/_utils.py`` (rebuilders)
and ``torch/serialization.py`` (persistent ids).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

from mmconvert.narrow import is_tuple
from mmconvert.stored import ITEM_SIZE

# torch's typed storages (torch/_utils.py, _dtype_to_storage_type_map) and dtypes by attribute
# name, in safetensors spelling.  What is not here (complex, quantized) has no such spelling.
STORAGE_DTYPE: dict[str, str] = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
TORCH_DTYPE: dict[str, str] = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
# Keeps products of sizes small; torch's own kernels stop at 64 dimensions too.
MAX_DIMS = 64
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class Global:
    """Something a pickle names by module and attribute; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """An object that a pickle would have built by a call; compared and hashed by identity.

    Attributes:
        function: what would have been called.
        args: its arguments; keyword arguments, if any, are one dict at the end.
        state: what ``__setstate__`` would have got, or None.
        items: what would have been appended, or None.
        entries: what would have been set by key, or None.
    """

    __slots__ = ("args", "entries", "function", "items", "state")

    def __init__(self, function: object, args: tuple[object, ...]) -> None:
        self.function = function
        self.args = args
        self.state: Any = None
        self.items: list[Any] | None = None
        self.entries: dict[Any, Any] | None = None


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage record of the archive.

    Attributes:
        key: the record is ``<root>/data/<key>``.
        dtype: safetensors spelling; "" when the storage type has none.
        numel: elements of that dtype (bytes for an untyped storage, whose dtype is U8).
    """

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor: a view of a storage, already proved to lie inside it.

    Attributes:
        storage: the storage viewed.
        dtype: safetensors spelling.
        shape: the tensor's shape.
        strides: strides in elements, as many as dimensions.
        offset: first element, in elements from the start of the storage.
    """

    storage: StorageRef
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def storage_ref(ident: object) -> StorageRef:
    """The storage of a persistent id ``("storage", type, key, location, numel)``.

    Raises:
        ValueError: it is not such a tuple.
    """
    if not is_tuple(ident) or len(ident) != 5 or ident[0] != "storage":
        raise ValueError("a persistent id that is not a storage")
    _, kind, key, _, numel = ident
    if not isinstance(kind, Global) or not isinstance(key, str) or not _is_size(numel):
        raise ValueError("a storage without type, key or size")
    known = kind.module in ("torch", "torch.storage")
    return StorageRef(key, STORAGE_DTYPE.get(kind.name, "") if known else "", numel)


def rebuild(function: Global, args: tuple[Any, ...]) -> TensorRef | Inert | None:
    """The tensor that a call would give, or None when the function makes no tensor.

    A tensor whose values are not the stored elements of a known dtype (complex, quantized,
    a negated view, a subclass) is given as an :class:`Inert`.

    Raises:
        ValueError: the arguments do not fit, or the view leaves its storage.
    """
    if function in _PARAMETERS:
        if not args or not isinstance(args[0], (TensorRef, Inert)):
            raise ValueError(f"{function} of something other than a tensor")
        return args[0]
    if function == _FROM_TYPE:
        # A tensor with attributes: (rebuilder, type, arguments of the rebuilder, attributes).
        if len(args) != 4 or not isinstance(args[0], Global) or not is_tuple(args[2]):
            raise ValueError(f"wrong arguments for {function}")
        arity = _arity(args[0])
        if args[1] not in _PLAIN_TENSOR or arity is None:
            return Inert(function, args)
        return _tensor(args[0], args[2], *arity)
    arity = _arity(function)
    return None if arity is None else _tensor(function, args, *arity)


_PARAMETERS = (
    Global("torch._utils", "_rebuild_parameter"),
    Global("torch._utils", "_rebuild_parameter_with_state"),
    Global("torch.nn.parameter", "Parameter"),
)
_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_PLAIN_TENSOR = (Global("torch", "Tensor"), Global("torch._tensor", "Tensor"))


def _arity(function: Global) -> tuple[int, int, int] | None:
    """Least and most arguments of a tensor rebuilder and the index of its metadata, or None."""
    if function.name == "_rebuild_npu_tensor" and function.module.split(".")[0] == "torch_npu":
        # torch_npu/utils/storage.py: as version 2, with the device format as a seventh
        # argument; the record holds the data of a plain CPU copy.
        return 6, 7, 7
    if function.module != "torch._utils":
        return None
    return {
        "_rebuild_tensor": (4, 4, 4),
        "_rebuild_tensor_v2": (6, 7, 6),
        "_rebuild_tensor_v3": (7, 8, 7),
    }.get(function.name)


def _tensor(
    function: Global, args: tuple[Any, ...], least: int, most: int, metadata: int
) -> TensorRef | Inert:
    """``(storage, offset, size, strides, ...)``, with a dtype at 6 in version 3."""
    if not least <= len(args) <= most or not isinstance(args[0], StorageRef):
        raise ValueError(f"wrong arguments for {function}")
    storage, offset, shape, strides = args[:4]
    if not (_is_size(offset) and _is_sizes(shape) and _is_sizes(strides)):
        raise ValueError(f"{function}: offset, size or strides are not sizes")
    if len(shape) != len(strides) or prod(shape) >= _INT64:
        raise ValueError(f"{function}: impossible size {shape} with strides {strides}")
    dtype = storage.dtype
    if function.name == "_rebuild_tensor_v3":
        if not isinstance(args[6], Global):
            raise ValueError(f"{function}: no dtype")
        dtype = TORCH_DTYPE.get(args[6].name, "") if args[6].module == "torch" else ""
    # Metadata are the conjugate and negative bits: the values are not the stored elements.
    if not dtype or not storage.dtype or (len(args) > metadata and args[metadata]):
        return Inert(function, args)
    numel = storage.numel * ITEM_SIZE[storage.dtype] // ITEM_SIZE[dtype]
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= numel:
        raise ValueError(
            f"a view of size {shape}, strides {strides}, offset {offset} leaves storage "
            f"{storage.key[:80]!r} of {numel} elements"
        )
    return TensorRef(storage, dtype, shape, strides, offset)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _INT64


def _is_sizes(values: object) -> bool:
    return is_tuple(values) and len(values) <= MAX_DIMS and all(map(_is_size, values))
