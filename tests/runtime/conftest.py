"""The tests of the runtime: one thread for each process, as the runtime itself wants it."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
FEW = 6


@pytest.fixture(autouse=True)
def few_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`validate` generates twenty tokens; some tell as much, as each stands on those before it.

    Nightly tests have all of them.
    """
    if request.node.get_closest_marker("nightly") is None:
        monkeypatch.setattr("mmconvert.runtime.validation.GREEDY", FEW)
