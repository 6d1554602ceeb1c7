"""What a value from a file may be taken for: JSON, YAML and pickles come without types.

``isinstance`` alone says nothing of what is in a list or dict; these say that it may be anything.
"""

from __future__ import annotations

from typing import TypeGuard


def is_object(value: object) -> TypeGuard[dict[str, object]]:
    """Whether it is an object of JSON, whose keys are text."""
    return isinstance(value, dict)


def is_texts(value: object) -> TypeGuard[dict[str, str]]:
    """Whether it is an object of JSON that holds text alone."""
    return is_object(value) and all(isinstance(inner, str) for inner in value.values())


def is_array(value: object) -> TypeGuard[list[object]]:
    """Whether it is an array of JSON."""
    return isinstance(value, list)


def is_dict(value: object) -> TypeGuard[dict[object, object]]:
    """Whether it is a dict with keys of any kind."""
    return isinstance(value, dict)


def is_tuple(value: object) -> TypeGuard[tuple[object, ...]]:
    """Whether it is a tuple."""
    return isinstance(value, tuple)


def is_set(value: object) -> TypeGuard[set[object]]:
    """Whether it is a set that can grow."""
    return isinstance(value, set)


def is_frozenset(value: object) -> TypeGuard[frozenset[object]]:
    """Whether it is a set that stays as it is."""
    return isinstance(value, frozenset)


def is_sequence(value: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    """Whether it is a list or a tuple."""
    return isinstance(value, (list, tuple))
