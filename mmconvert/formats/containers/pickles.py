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
from typing import Any, NamedTuple, cast

from mmconvert.errors import FormatError
from mmconvert.formats.containers.torch_objects import (
    Global,
    Inert,
    StorageRef,
    TensorRef,
    rebuild,
    storage_ref,
)
from mmconvert.narrow import is_array, is_dict, is_frozenset, is_sequence, is_set, is_tuple

__all__ = ["Global", "Inert", "StorageRef", "TensorRef", "load_pickle"]

# Steps that one pickle may take: opcodes, which are at most as many as bytes, plus items that calls
# copy.  So the time is proportional to the size: some 20 s for the 20 MB of metadata of 140,000
# chunks and the moments of each, and a hostile file takes no longer than an honest one of its size.
FREE_STEPS = 100_000
# Bytes that the objects of one pickle may take, by the estimates below: so many for each of its
# own bytes, and in all.  Tensors take 20 to 30 for each; an empty set takes 232 for one.
MEMORY_PER_BYTE, FREE_MEMORY, MAX_MEMORY = 40, 64 << 20, 4 << 30
# Parts of one dict key or set item: hashing a tuple visits every path through it, so a tuple
# of shared tuples would take exponential time, and a deep one overflows the C stack.
MAX_KEY_PARTS = 64
# Hashes of numbers repeat modulo 2**61 - 1: larger keys could be made to collide at will.
_KEY_NUMBER = 2**60


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
    machine = _Machine(len(data))
    try:
        return machine.run(data)
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


class _Machine:
    """The stack machine; one instance reads one pickle."""

    def __init__(self, size: int) -> None:
        self.position = 0
        self.steps = self.most_steps = FREE_STEPS + size
        self.memory = self.most = min(FREE_MEMORY + MEMORY_PER_BYTE * size, MAX_MEMORY)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []  # in the order of their numbers, as every pickler gives them
        self.odd_memo: dict[int, Any] = {}  # others: an index costs nothing by its size

    def run(self, data: bytes) -> object:
        at, end = 0, len(data)
        stack, memo, memory = self.stack, self.memo, 0
        while at < end:
            code = data[at]
            # The three that are two thirds of all.
            if code == _MEMOIZE and not self.odd_memo and stack and not self._at_mark():
                memo.append(stack[-1])
                at += 1
                memory += _PLACE
                continue
            if code == _BINGET and at + 1 < end and data[at + 1] < len(memo):
                stack.append(memo[data[at + 1]])
                at += 2
                memory += _WORD
                continue
            if code == _BININT1 and at + 1 < end:
                stack.append(data[at + 1])
                at += 2
                memory += _WORD
                continue
            op, at = self.step(data, at, memory)
            memory = 0
            if op.name == "STOP":
                break
        else:
            raise ValueError("there is no STOP at the end")
        if at != end:
            raise ValueError(f"{end - at} bytes follow the end")
        if len(stack) != 1 or self.marks:
            raise ValueError(f"{len(stack)} objects at the end instead of one")
        return stack[0]

    def step(self, data: bytes, at: int, nbytes: int) -> tuple[_Op, int]:
        """Does what stands at a place; says where the next opcode stands.

        Args:
            nbytes: of memory that those before it took.
        """
        self.position = at
        op = _OPS.get(data[at])
        if op is None:
            raise ValueError(f"opcode {data[at]:#04x} is unknown or not supported")
        argument, at = (None, at + 1) if op.argument is None else op.argument(data, at + 1)
        self.spend(1, op.nbytes + nbytes)
        if op.handler is not None:
            op.handler(self, argument)
        elif op.name != "STOP":
            self.spend(0, getsizeof(argument))
            self.stack.append(argument)
        return op, at

    def _at_mark(self) -> bool:
        """Whether nothing may be taken from the stack."""
        return bool(self.marks) and self.marks[-1] >= len(self.stack)

    def spend(self, steps: int, nbytes: int) -> None:
        self.steps -= steps
        self.memory -= nbytes
        if self.steps < 0:
            raise ValueError(f"more than {self.most_steps} steps")
        if self.memory < 0:
            raise ValueError(f"its objects take more than {self.most >> 20} MiB of memory")

    # The stack.  A mark is a floor below which nothing may be taken.

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("there is no mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self) -> object:
        item = self.pop()
        self.stack.append(item)
        return item

    def discard(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def get(self, index: int) -> None:
        if 0 <= index < len(self.memo):
            self.stack.append(self.memo[index])
        elif index in self.odd_memo:
            self.stack.append(self.odd_memo[index])
        else:
            raise ValueError("a memo entry is read that was never set")

    def put(self, index: int) -> None:
        if index == len(self.memo) and not self.odd_memo:
            self.memo.append(self.top())
        elif 0 <= index < len(self.memo):
            self.memo[index] = self.top()
        else:
            self.odd_memo[index] = self.top()

    def memoize(self) -> None:
        self.put(len(self.memo) + len(self.odd_memo))

    # Containers.

    def key(self, key: object) -> object:
        """Let a dict key or set item pass if hashing it is possible and cheap."""
        pending, left = [key], MAX_KEY_PARTS
        while pending:
            item = pending.pop()
            if is_tuple(item) or is_frozenset(item):
                left -= len(item)
                if left < 0:
                    raise ValueError(f"a key of more than {MAX_KEY_PARTS} parts")
                pending.extend(item)
            elif isinstance(item, (int, float)):
                if not -_KEY_NUMBER < item < _KEY_NUMBER:
                    raise ValueError("a number is out of range as a key")
            elif not isinstance(item, _KEY_TYPES):
                raise ValueError(f"a {type(item).__name__} is not a key")
        return key

    def add_items(self) -> None:
        items, target = self.pop_mark(), self.top()
        if not is_set(target):
            raise ValueError(f"items are added to a {type(target).__name__}")
        self.spend(0, _ENTRY * len(items))
        target.update(map(self.key, items))

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target.items = [] if target.items is None else target.items
            target = cast("object", target.items)
        if not is_array(target):
            raise ValueError(f"items are appended to a {type(target).__name__}")
        target.extend(items)

    def set_entries(self, flat: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target.entries = {} if target.entries is None else target.entries
            target = cast("object", target.entries)
        if not is_dict(target) or len(flat) % 2:
            raise ValueError(f"{len(flat)} keys and values for a {type(target).__name__}")
        self.spend(0, _ENTRY * (len(flat) // 2))
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[self.key(key)] = value

    def new_dict(self) -> None:
        flat = self.pop_mark()
        self.stack.append({})
        self.set_entries(flat)

    # Objects.

    def push_global(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a global without a name")
        self.stack.append(Global(module, name))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.stack.append(self.call(function, args))

    def new_with_keywords(self) -> None:
        keywords, args, function = self.pop(), self.pop(), self.pop()
        if not is_dict(keywords) or not is_tuple(args):
            raise ValueError("wrong arguments for a new object")
        self.spend(len(args), _WORD * len(args))  # memoized arguments may be copied many times
        made = Inert(function, (*args, keywords)) if keywords else self.call(function, args)
        self.stack.append(made)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes (_metadata) are dropped
            raise ValueError(f"state is set on a {type(target).__name__}")

    def old_instance(self, function: Global, args: list[Any]) -> None:
        self.stack.append(self.call(function, tuple(args)))

    def call(self, function: object, args: object) -> object:
        """What the call would give if it is known here, else an inert object."""
        if not isinstance(function, (Global, Inert)) or not is_tuple(args):
            raise ValueError(f"a call of a {type(function).__name__}")
        if isinstance(function, Global):
            known = _CALLS.get((function.module, function.name))
            if known is not None:
                return known(self, args)
            tensor = rebuild(function, args)
            if tensor is not None:
                return tensor
        return Inert(function, args)

    def items_of(self, args: tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        """The one list or tuple that a collection is made of."""
        items = args[0] if args else ()
        if len(args) > 1 or not is_sequence(items):
            raise ValueError("a collection of something else than a list or tuple")
        self.spend(len(items), _ENTRY * len(items))  # a memoized list may be copied many times
        return items

    def ordered_dict(self, args: tuple[Any, ...]) -> object:
        made: dict[Any, Any] = {}
        for pair in self.items_of(args):
            if not is_sequence(pair) or len(pair) != 2:
                raise ValueError("an OrderedDict of something else than pairs")
            made[self.key(pair[0])] = pair[1]
        return made

    def new_set(self, args: tuple[Any, ...]) -> object:
        return set(map(self.key, self.items_of(args)))

    def new_frozenset(self, args: tuple[Any, ...]) -> object:
        return frozenset(map(self.key, self.items_of(args)))

    def encode(self, args: tuple[Any, ...]) -> object:
        # How protocol 2 spells bytes.
        if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
            raise ValueError("text is encoded in an unexpected way")
        self.spend(len(args[0]), len(args[0]))
        return args[0].encode("latin-1")

    def protocol(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"pickle protocol {version}")


_BYTES_TYPE = Global("__builtin__", "bytes")
_KEY_TYPES = (str, bytes, type(None), Global, Inert, StorageRef, TensorRef)

_CALLS: dict[tuple[str, str], Callable[[_Machine, tuple[Any, ...]], object]] = {
    ("collections", "OrderedDict"): _Machine.ordered_dict,
    ("collections", "defaultdict"): lambda m, args: {},  # its argument is the default factory
    ("torch", "Size"): lambda m, args: tuple(m.items_of(args)),
    ("_codecs", "encode"): _Machine.encode,
    ("__builtin__", "bytes"): lambda m, args: Inert(_BYTES_TYPE, args) if args else b"",
    ("builtins", "set"): _Machine.new_set,
    ("builtins", "frozenset"): _Machine.new_frozenset,
    ("__builtin__", "set"): _Machine.new_set,  # protocol 2 uses the names of Python 2
    ("__builtin__", "frozenset"): _Machine.new_frozenset,
}

# Bytes that CPython 3.10 to 3.13 takes for what an opcode makes, rounded up.
_WORD, _ENTRY = 8, 100  # a place on the stack; an entry of a dict or set, with room to grow
_PLACE = 10  # a place in the memo, with room to grow
_SMALL = {"EMPTY_LIST", "EMPTY_DICT", "LIST", "DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_CALLED = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "GLOBAL", "STACK_GLOBAL", "BINPERSID"}
_SIZES = {
    **dict.fromkeys(_SMALL, 96),
    **dict.fromkeys(_CALLED, 160),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _ENTRY),
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
_HANDLERS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": _Machine.protocol,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.discard(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
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
}


class _Op(NamedTuple):
    """An opcode.

    Attributes:
        name: as pickletools has it.
        argument: reads it from the data at a place, and says where it ends; None if there is none.
        handler: what it does; None for STOP, and for those whose argument is the object itself.
        nbytes: of memory that it takes.
    """

    name: str
    argument: Callable[[bytes, int], tuple[Any, int]] | None
    handler: Callable[[_Machine, Any], object] | None
    nbytes: int


def _fixed(size: int, signed: bool = False) -> Callable[[bytes, int], tuple[Any, int]]:
    def read(data: bytes, at: int) -> tuple[Any, int]:
        if at + size > len(data):
            raise ValueError("the data ends within an argument")
        return int.from_bytes(data[at : at + size], "little", signed=signed), at + size

    return read


def _short_text(data: bytes, at: int) -> tuple[Any, int]:
    end = at + 1 + data[at] if at < len(data) else len(data) + 1
    if end > len(data):
        raise ValueError("the data ends within an argument")
    return data[at + 1 : end].decode("utf-8", "surrogatepass"), end


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
    "SHORT_BINUNICODE": _short_text,
}


def _op(info: pickletools.OpcodeInfo) -> _Op:
    read = _READERS.get(info.name)
    if read is None and info.arg is not None:
        read = _by_pickletools(info.arg.reader)
    return _Op(info.name, read, _HANDLERS.get(info.name), _SIZES.get(info.name, _WORD))


_OPS: dict[int, _Op] = {
    ord(info.code): _op(info)
    for info in pickletools.opcodes
    if info.name in _HANDLERS or info.name in _LITERALS or info.name == "STOP"
}
_MEMOIZE, _BINGET, _BININT1 = 0x94, 0x68, 0x4B
