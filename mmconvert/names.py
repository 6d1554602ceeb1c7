"""Tensor-name templates: ``{}`` stands for a layer number, everything else for itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

NO_LAYER = -1  # the "layer" of a tensor that stands before or after the layers


class NameTemplate(NamedTuple):
    """A name with at most one ``{}``; :meth:`match` and :meth:`fill` are inverses."""

    text: str

    def fill(self, layer: int) -> str:
        """The name of ``layer``; a template without ``{}`` is its own name."""
        return self.text.replace("{}", str(layer))

    def match(self, name: str) -> int | None:
        """The layer that ``name`` has in this template, NO_LAYER if it has none, None if it
        does not fit. Numbers are plain decimals without leading zeros, as ``fill`` writes them.
        """
        head, hole, tail = self.text.partition("{}")
        if not hole:
            return NO_LAYER if name == self.text else None
        if len(name) <= len(head) + len(tail):
            return None
        if not (name.startswith(head) and name.endswith(tail)):
            return None
        return _number(name[len(head) : len(name) - len(tail)])


def _number(text: str) -> int | None:
    plain = text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if plain and str(int(text)) == text else None


class TemplateIndex(Generic[T]):
    """Finds the entry whose template fits a name, without trying every template."""

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        self._entries: dict[str, T] = {}
        for template, entry in entries:
            if template in self._entries:
                raise ValueError(f"the template {template!r} occurs twice in a table")
            self._entries[template] = entry

    def find(self, name: str) -> tuple[T, int] | None:
        """The entry and the layer number (NO_LAYER if none) for ``name``, or None."""
        if name in self._entries and "{}" not in name:
            return self._entries[name], NO_LAYER
        for template, layer in _readings(name):
            if template in self._entries:
                return self._entries[template], layer
        return None

    def closest(self, name: str) -> str | None:
        """The known template that looks most like ``name``, for an error message."""
        shape = next((template for template, _ in _readings(name)), name)
        found = get_close_matches(shape, list(self._entries), n=1, cutoff=0.6)
        return found[0] if found else None


def _readings(name: str) -> Iterator[tuple[str, int]]:
    """Every way to read one number of a dotted name as the layer number."""
    words = name.split(".")
    for i, word in enumerate(words):
        layer = _number(word)
        if layer is not None:
            yield ".".join((*words[:i], "{}", *words[i + 1 :])), layer


def summarise(names: Iterable[str], limit: int = 5) -> str:
    """At most ``limit`` names, the rest as a count, for one line of a message."""
    listed = sorted(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def number(things: Collection[object], word: str, words: str = "") -> str:
    """A count with its word: 1 tensor, 2 tensors; ``words`` is a plural of another form."""
    return f"{len(things)} " + (word if len(things) == 1 else words or f"{word}s")
