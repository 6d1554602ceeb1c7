"""Tensor-name templates: ``{layer}`` and ``{expert}`` stand for numbers, all else for itself."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

NO_LAYER = -1  # the "layer" of a tensor that stands before or after the layers
NO_EXPERT = -1  # the "expert" of a tensor that is no expert's

LAYER, EXPERT = "{layer}", "{expert}"
INDEX = "{index}"  # which of the layers that have this row, where HF counts those alone


def fill(template: str, layer: int, expert: int = NO_EXPERT, index: int = NO_LAYER) -> str:
    """The name with these numbers in the fields that the template has."""
    name = template.replace(LAYER, str(layer))
    return name.replace(EXPERT, str(expert)).replace(INDEX, str(index)) if "{" in name else name


def fields(template: str) -> str:
    """The template with ``{layer}`` for the short ``{}``."""
    return template.replace("{}", LAYER)


class NameTemplate(NamedTuple):
    """A name with fields; :meth:`match` and :meth:`fill` are inverses."""

    text: str

    def fill(self, layer: int, expert: int = NO_EXPERT) -> str:
        """The name of ``layer``; a template without fields is its own name."""
        return fill(fields(self.text), layer, expert)

    def match(self, name: str) -> int | None:
        """The layer that ``name`` has in this template, NO_LAYER if it has none, None if it
        does not fit. Numbers are plain decimals without leading zeros, as ``fill`` writes them.
        """
        found = _pattern(fields(self.text)).fullmatch(name)
        if found is None:
            return None
        return int(found["layer"]) if "layer" in found.re.groupindex else NO_LAYER


@lru_cache(maxsize=256)
def _pattern(text: str) -> re.Pattern[str]:
    words = re.escape(text)
    for field in ("layer", "expert", "index"):
        words = words.replace(rf"\{{{field}\}}", rf"(?P<{field}>0|[1-9][0-9]{{0,8}})", 1)
    return re.compile(words, re.DOTALL)


def _is_plain(digits: str) -> bool:
    return digits.isascii() and len(digits) < 10 and str(int(digits)) == digits


class TemplateIndex(Generic[T]):
    """Finds the entry whose template fits a name, without trying every template."""

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        self._entries: dict[str, T] = {}
        self._known: dict[str, tuple[T, int, int] | None] = {}
        for template, entry in entries:
            text = fields(template).replace(INDEX, LAYER)
            if text in self._entries:
                raise ValueError(f"the template {template!r} occurs twice in a table")
            self._entries[text] = entry
        self._experts = any(EXPERT in template for template in self._entries)

    def find(self, name: str) -> tuple[T, int, int] | None:
        """The entry, the layer and the expert (NO_LAYER, NO_EXPERT if none) for ``name``, or
        None.
        """
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> tuple[T, int, int] | None:
        if "{" in name:
            return None
        for template, layer, expert in self._readings(name):
            if template in self._entries:
                return self._entries[template], layer, expert
        return None

    def closest(self, name: str) -> str | None:
        """The known template that looks most like ``name``, for an error message."""
        shapes = [template for template, *_ in self._readings(name)]
        from difflib import get_close_matches  # where something is wrong

        found = get_close_matches(shapes[-1], list(self._entries), n=1, cutoff=0.6)
        return found[0] if found else None

    def _readings(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Every way to read numbers of a dotted name as a layer, and one behind it as an expert."""
        yield name, NO_LAYER, NO_EXPERT
        words = name.split(".")
        numbers = [(i, int(w)) for i, w in enumerate(words) if w.isdigit() and _is_plain(w)]
        for place, (i, layer) in enumerate(numbers):
            one = [*words[:i], LAYER, *words[i + 1 :]]
            yield ".".join(one), layer, NO_EXPERT
            if self._experts:
                for j, expert in numbers[place + 1 :]:
                    yield ".".join([*one[:j], EXPERT, *one[j + 1 :]]), layer, expert


def summarise(names: Iterable[str], limit: int = 5) -> str:
    """At most ``limit`` names, the rest as a count, for one line of a message."""
    listed = sorted(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def number(things: Collection[object] | int, word: str, words: str = "") -> str:
    """A count with its word: 1 tensor, 2 tensors; ``words`` is a plural of another form."""
    count = things if isinstance(things, int) else len(things)
    return f"{count} " + (word if count == 1 else words or f"{word}s")
