"""The order in which training registers its parameters, learnt from files and applied to others.

An optimizer numbers its parameters in the order of ``named_parameters()``: module by module, as
they were registered. The keys of a saved model have that order, each chunk's its part of it.
"""

from __future__ import annotations

from collections.abc import Iterable

NUMBER = "#"  # a layer or an expert; these are in the order of their numbers


class Order:
    """What follows what within each module, of all chunks that were seen."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, ...], list[str]] = {}

    def learn(self, names: Iterable[str]) -> None:
        """Takes over the order of one model chunk's names."""
        last: dict[tuple[str, ...], str] = {}
        for name in names:
            path: tuple[str, ...] = ()
            for word in name.split("."):
                step = NUMBER if word.isdigit() else word
                self._insert(path, last.get(path, ""), step)
                last[path] = step
                path = (*path, step)

    def _insert(self, path: tuple[str, ...], before: str, word: str) -> None:
        known = self._children.setdefault(path, [])
        if word not in known:
            known.insert(known.index(before) + 1 if before else len(known), word)

    def key(self, name: str) -> tuple[int, ...]:
        """Sorts names in this order."""
        places: list[int] = []
        path: tuple[str, ...] = ()
        for word in name.split("."):
            step = NUMBER if word.isdigit() else word
            known = self._children.get(path, [])
            places.append(known.index(step) if step in known else len(known))
            places.append(int(word) if word.isdigit() else 0)
            path = (*path, step)
        return tuple(places)
