"""Which cases of a test belong to `make test`, and which to `make nightly` alone."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet


def night(*values: object) -> ParameterSet:
    """One case that is nightly."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def nightly(names: Iterable[str], but: tuple[str, ...]) -> list[ParameterSet]:
    """All cases, nightly all but those named, of which each must be one of them."""
    known = list(names)
    assert set(but) <= set(known), set(but) - set(known)
    return [pytest.param(n, marks=() if n in but else pytest.mark.nightly) for n in known]
