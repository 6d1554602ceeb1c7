"""Which cases of a test belong to `make test`, and which to `make nightly` alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import pytest
from _pytest.mark import ParameterSet
from hypothesis import settings


def night(*values: object) -> ParameterSet:
    """One case that is nightly."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def in_turns(*sides: Sequence[object], one_in: int = 2) -> list[ParameterSet]:
    """All combinations of sides that do not depend on each other; nightly all but one in so many.

    Of three sides and one in two, those of `make test` have every value of a side with every
    value of another. In any case they have every value that stands beside a side of at least
    `one_in` values.
    """
    places = product(*(range(len(side)) for side in sides))
    cases = product(*sides)
    return [
        pytest.param(*case, marks=pytest.mark.nightly if sum(place) % one_in else ())
        for case, place in zip(cases, places, strict=True)
    ]


def nightly(names: Iterable[str], but: tuple[str, ...]) -> list[ParameterSet]:
    """All cases, nightly all but those named, of which each must be one of them."""
    known = list(names)
    assert set(but) <= set(known), set(but) - set(known)
    return [pytest.param(n, marks=() if n in but else pytest.mark.nightly) for n in known]


def examples(today: int, nightly: int) -> settings:
    """The settings of a property with fewer examples in `make test`; no two sets are alike."""
    return settings(max_examples=today if settings().derandomize else nightly, deadline=None)
