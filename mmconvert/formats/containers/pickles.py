"""The pickle inside a ``.pt`` file, read without running anything.

A pickle is a program for a stack machine that may call any importable function.  The machine
here imports and calls nothing: a named global stays a :class:`Global`, a call stays an
:class:`Inert`, and only a short table of containers and tensor rebuilders is understood.  The
standard unpickler is not used, because its C memo allocates by index: a ten-byte pickle can ask
for gigabytes.  Rules: the opcode documentation in ``pickletools`` of the standard library.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from io import BytesIO
from sys import getsizeof
from typing import Any, NamedTuple

from mmconvert.errors import FormatError
from mmconvert.formats.containers.picklestack import ENTRY, WORD, Machine
from mmconvert.formats.containers.torch_objects import (
    Global,
    Inert,
    StorageRef,
    TensorRef,
    storage_ref,
)

__all__ = ["Global", "Inert", "StorageRef", "TensorRef", "load_pickle"]


def load_pickle(data: bytes, where: str) -> object:
    """Read a pickle (protocols 0 to 5) into plain containers, refs and inert objects.

    ``OrderedDict`` and ``defaultdict`` become dicts, ``torch.Size`` a tuple, parameters their
    tensor.  Tensors without a dtype of ours (complex, quantized, negated views) and everything
    unknown become :class:`Inert`.  The result may share objects and may contain itself.

    Args:
        data: the whole pickle.
        where: what to call it in messages, e.g. the file and the record.

    Raises:
        FormatError: anything malformed, and persistent ids that torch.save does not write.
    """
    machine = Machine(len(data))
    try:
        return _run(machine, data)
    except (ValueError, OverflowError, RecursionError, MemoryError, Warning) as error:
        # The one place where an error gets its name.  ValueError is what the machine raises, and
        # how pickletools reports unknown opcodes and short or undecodable arguments
        # (UnicodeDecodeError is one); a Warning, where warnings are errors, is its invalid escape
        # in Python 2 text; the others come from absurd sizes in the data.
        reason = str(error)[:300] or type(error).__name__
        raise FormatError(
            f"{where}: {reason} (near byte {machine.position} of the pickle)",
            expected="a pickle as torch.save writes it",
            fix="copy or save the file again; if you do not know its origin, do not load it",
        ) from error


def _run(machine: Machine, data: bytes) -> object:
    at, end = 0, len(data)
    stack, memo, ops, memory = machine.stack, machine.memo, _OPS, 0
    while at < end:
        code = data[at]
        # The three that are two thirds of all.
        if code == _MEMOIZE and not machine.odd_memo and stack and not machine.at_mark():
            memo.append(stack[-1])
            at += 1
            memory += _PLACE
            continue
        if code == _BINGET and at + 1 < end and data[at + 1] < len(memo):
            stack.append(memo[data[at + 1]])
            at += 2
            memory += WORD
            continue
        if code == _BININT1 and at + 1 < end:
            stack.append(data[at + 1])
            at += 2
            memory += WORD
            continue
        machine.position = at
        read, handler, nbytes = ops[code]
        argument, at = (None, at + 1) if read is None else read(data, at + 1)
        machine.spend(1, nbytes + memory)
        memory = 0
        handler(machine, argument)
        if code == _STOP:
            break
    else:
        raise ValueError("there is no STOP at the end")
    if at != end:
        raise ValueError(f"{end - at} bytes follow the end")
    if len(stack) != 1 or machine.marks:
        raise ValueError(f"{len(stack)} objects at the end instead of one")
    return stack[0]


# Bytes that CPython 3.10 to 3.13 takes for what an opcode makes, rounded up.
_PLACE = 10  # a place in the memo, with room to grow
_SMALL = {"EMPTY_LIST", "EMPTY_DICT", "LIST", "DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_CALLED = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "GLOBAL", "STACK_GLOBAL", "BINPERSID"}
_SIZES = {
    **dict.fromkeys(_SMALL, 96),
    **dict.fromkeys(_CALLED, 160),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ENTRY),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), 232),
    **dict.fromkeys(("SETITEM", "SETITEMS"), 184),  # the first entries of a dict
    **dict.fromkeys(("APPEND", "APPENDS"), 64),
    "MARK": 40,
}

# Opcodes whose argument is the object itself.
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_TEXT = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_PYTHON2_TEXT = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_LITERALS = _NUMBERS | _BYTES | _TEXT | _PYTHON2_TEXT

# The other opcodes.  Missing on purpose: PERSID, EXT1, EXT2, EXT4, NEXT_BUFFER and
# READONLY_BUFFER, which name things outside the pickle.
_HANDLERS: dict[str, Callable[[Machine, Any], object]] = {
    "PROTO": Machine.protocol,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.discard(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "GET": Machine.get,
    "BINGET": Machine.get,
    "LONG_BINGET": Machine.get,
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": lambda m, _: m.memoize(),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_SET": lambda m, _: m.stack.append(set()),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "DICT": lambda m, _: m.new_dict(),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(map(m.key, m.pop_mark()))),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.add_items(),
    "SETITEM": lambda m, _: m.set_entries([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_entries(m.pop_mark()),
    "GLOBAL": lambda m, arg: m.push_global(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.push_global(*[m.pop(), m.pop()][::-1]),
    "INST": lambda m, arg: m.old_instance(Global(*arg.split(" ", 1)), m.pop_mark()),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.reduce(),
    "NEWOBJ_EX": lambda m, _: m.new_with_keywords(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.stack.append(storage_ref(m.pop())),
    "STOP": lambda m, _: None,
}


class _Op(NamedTuple):
    """What an opcode does.

    Attributes:
        argument: reads it from the data at a place, and says where it ends; None if there is none.
        handler: does it.
        nbytes: of memory that it takes.
    """

    argument: Callable[[bytes, int], tuple[Any, int]] | None
    handler: Callable[[Machine, Any], object]
    nbytes: int


def _literal(machine: Machine, value: object) -> None:
    machine.spend(0, getsizeof(value))
    machine.stack.append(value)


def _unknown(code: int) -> _Op:
    def refuse(machine: Machine, _: None) -> None:
        raise ValueError(f"opcode {code:#04x} is unknown or not supported")

    return _Op(None, refuse, 0)


def _fixed(size: int, signed: bool = False) -> Callable[[bytes, int], tuple[Any, int]]:
    def read(data: bytes, at: int) -> tuple[Any, int]:
        if at + size > len(data):
            raise ValueError("the data ends within an argument")
        return int.from_bytes(data[at : at + size], "little", signed=signed), at + size

    return read


def _text(size: int) -> Callable[[bytes, int], tuple[Any, int]]:
    """Text after its length, which takes ``size`` bytes."""
    length = _fixed(size)

    def read(data: bytes, at: int) -> tuple[Any, int]:
        nbytes, start = length(data, at)
        if start + nbytes > len(data):
            raise ValueError("the data ends within an argument")
        end = start + nbytes
        return data[start:end].decode("utf-8", "surrogatepass"), end

    return read


def _by_pickletools(read: Callable[[Any], object]) -> Callable[[bytes, int], tuple[Any, int]]:
    """Arguments of the other kinds; pickletools bounds each by what is left of the data."""

    def argument(data: bytes, at: int) -> tuple[Any, int]:
        rest = BytesIO(data)  # shares the bytes
        rest.seek(at)
        return read(rest), rest.tell()

    return argument


_READERS = {
    "BININT2": _fixed(2),
    "BININT": _fixed(4, signed=True),
    "BININT1": _fixed(1),
    "BINGET": _fixed(1),
    "BINPUT": _fixed(1),
    "LONG_BINGET": _fixed(4),
    "LONG_BINPUT": _fixed(4),
    "FRAME": _fixed(8),
    "SHORT_BINUNICODE": _text(1),
    "BINUNICODE": _text(4),
}


def _op(info: pickletools.OpcodeInfo) -> _Op:
    read = _READERS.get(info.name)
    if read is None and info.arg is not None:
        read = _by_pickletools(info.arg.reader)
    return _Op(read, _HANDLERS.get(info.name, _literal), _SIZES.get(info.name, WORD))


_OPS = [_unknown(code) for code in range(256)]
for _info in pickletools.opcodes:
    if _info.name in _HANDLERS or _info.name in _LITERALS:
        _OPS[ord(_info.code)] = _op(_info)
_MEMOIZE, _BINGET, _BININT1, _STOP = b"\x94hK."
