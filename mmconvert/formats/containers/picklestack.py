"""The stack machine of :mod:`pickles`: what its opcodes do, within limits on memory and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from mmconvert.formats.containers.torch_objects import (
    Global,
    Inert,
    StorageRef,
    TensorRef,
    rebuild,
)
from mmconvert.narrow import is_array, is_dict, is_frozenset, is_sequence, is_set, is_tuple

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
# Bytes of a place on the stack, and of an entry of a dict or set, with room to grow.
WORD, ENTRY = 8, 100


class Machine:
    """The machine's stack, marks and memo; one instance reads one pickle."""

    def __init__(self, size: int) -> None:
        self.position = 0
        self.steps = self.most_steps = FREE_STEPS + size
        self.memory = self.most = min(FREE_MEMORY + MEMORY_PER_BYTE * size, MAX_MEMORY)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []  # in the order of their numbers, as every pickler gives them
        self.odd_memo: dict[int, Any] = {}  # others: an index costs nothing by its size

    def at_mark(self) -> bool:
        """Whether nothing may be taken from the stack."""
        return bool(self.marks) and self.marks[-1] >= len(self.stack)

    def spend(self, steps: int, nbytes: int) -> None:
        """Counts steps and bytes of memory; ValueError beyond the limits."""
        self.steps -= steps
        self.memory -= nbytes
        if self.steps < 0:
            raise ValueError(f"more than {self.most_steps} steps")
        if self.memory < 0:
            raise ValueError(f"its objects take more than {self.most >> 20} MiB of memory")

    # The stack.  A mark is a floor below which nothing may be taken.

    def pop(self) -> object:
        """Takes the top object."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Takes all objects above the last mark, and the mark."""
        if not self.marks:
            raise ValueError("there is no mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self) -> object:
        """The top object, which stays."""
        item = self.pop()
        self.stack.append(item)
        return item

    def discard(self) -> None:
        """Drops the top object or mark (POP)."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def tuple_of(self, count: int) -> None:
        """Makes a tuple of the top ``count`` objects."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def get(self, index: int) -> None:
        """Pushes a memo entry."""
        if 0 <= index < len(self.memo):
            self.stack.append(self.memo[index])
        elif index in self.odd_memo:
            self.stack.append(self.odd_memo[index])
        else:
            raise ValueError("a memo entry is read that was never set")

    def put(self, index: int) -> None:
        """Sets a memo entry to the top object."""
        if index == len(self.memo) and not self.odd_memo:
            self.memo.append(self.top())
        elif 0 <= index < len(self.memo):
            self.memo[index] = self.top()
        else:
            self.odd_memo[index] = self.top()

    def memoize(self) -> None:
        """Appends the top object to the memo."""
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
        """Adds the marked objects to the set below them."""
        items, target = self.pop_mark(), self.top()
        if not is_set(target):
            raise ValueError(f"items are added to a {type(target).__name__}")
        self.spend(0, ENTRY * len(items))
        target.update(map(self.key, items))

    def extend(self, items: list[Any]) -> None:
        """Appends to the list on top."""
        target = self.top()
        if isinstance(target, Inert):
            target.items = [] if target.items is None else target.items
            target = cast("object", target.items)
        if not is_array(target):
            raise ValueError(f"items are appended to a {type(target).__name__}")
        target.extend(items)

    def set_entries(self, flat: list[Any]) -> None:
        """Sets keys and values, one after the other, in the dict on top."""
        target = self.top()
        if isinstance(target, Inert):
            target.entries = {} if target.entries is None else target.entries
            target = cast("object", target.entries)
        if not is_dict(target) or len(flat) % 2:
            raise ValueError(f"{len(flat)} keys and values for a {type(target).__name__}")
        self.spend(0, ENTRY * (len(flat) // 2))
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[self.key(key)] = value

    def new_dict(self) -> None:
        """Makes a dict of the marked keys and values."""
        flat = self.pop_mark()
        self.stack.append({})
        self.set_entries(flat)

    # Objects.

    def push_global(self, module: object, name: object) -> None:
        """Pushes a name; nothing is imported."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a global without a name")
        self.stack.append(Global(module, name))

    def reduce(self) -> None:
        """Calls what is below the arguments on top (REDUCE, NEWOBJ)."""
        args, function = self.pop(), self.pop()
        self.stack.append(self.call(function, args))

    def new_with_keywords(self) -> None:
        """Makes an object of positional and keyword arguments (NEWOBJ_EX)."""
        keywords, args, function = self.pop(), self.pop(), self.pop()
        if not is_dict(keywords) or not is_tuple(args):
            raise ValueError("wrong arguments for a new object")
        self.spend(len(args), WORD * len(args))  # memoized arguments may be copied many times
        made = Inert(function, (*args, keywords)) if keywords else self.call(function, args)
        self.stack.append(made)

    def build(self) -> None:
        """Sets the state of the object below it."""
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes (_metadata) are dropped
            raise ValueError(f"state is set on a {type(target).__name__}")

    def old_instance(self, function: Global, args: list[Any]) -> None:
        """Makes an object as protocol 0 does (INST)."""
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
            raise ValueError("a collection of something other than a list or tuple")
        self.spend(len(items), ENTRY * len(items))  # a memoized list may be copied many times
        return items

    def ordered_dict(self, args: tuple[Any, ...]) -> object:
        """A dict of a list of pairs."""
        made: dict[Any, Any] = {}
        for pair in self.items_of(args):
            if not is_sequence(pair) or len(pair) != 2:
                raise ValueError("an OrderedDict of something other than pairs")
            made[self.key(pair[0])] = pair[1]
        return made

    def new_set(self, args: tuple[Any, ...]) -> object:
        """A set of a list."""
        return set(map(self.key, self.items_of(args)))

    def new_frozenset(self, args: tuple[Any, ...]) -> object:
        """A frozenset of a list."""
        return frozenset(map(self.key, self.items_of(args)))

    def encode(self, args: tuple[Any, ...]) -> object:
        """Bytes as protocol 2 spells them: text in Latin-1."""
        if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
            raise ValueError("text is encoded in an unexpected way")
        self.spend(len(args[0]), len(args[0]))
        return args[0].encode("latin-1")

    def protocol(self, version: int) -> None:
        """Refuses protocols that are not known."""
        if version > 5:
            raise ValueError(f"pickle protocol {version}")


_BYTES_TYPE = Global("__builtin__", "bytes")
_KEY_TYPES = (str, bytes, type(None), Global, Inert, StorageRef, TensorRef)

_CALLS: dict[tuple[str, str], Callable[[Machine, tuple[Any, ...]], object]] = {
    ("collections", "OrderedDict"): Machine.ordered_dict,
    ("collections", "defaultdict"): lambda m, args: {},  # its argument is the default factory
    ("torch", "Size"): lambda m, args: tuple(m.items_of(args)),
    ("_codecs", "encode"): Machine.encode,
    ("__builtin__", "bytes"): lambda m, args: Inert(_BYTES_TYPE, args) if args else b"",
    ("builtins", "set"): Machine.new_set,
    ("builtins", "frozenset"): Machine.new_frozenset,
    ("__builtin__", "set"): Machine.new_set,  # protocol 2 uses the names of Python 2
    ("__builtin__", "frozenset"): Machine.new_frozenset,
}
