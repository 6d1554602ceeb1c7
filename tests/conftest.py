"""The same tests with the same numbers everywhere; `make nightly` alone draws new ones."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import settings

# Hypothesis would choose by itself: new examples each time, others where CI is set, and those of
# a database that a run before has left.
settings.register_profile("same", deadline=None, database=None, derandomize=True)
settings.register_profile("nightly", deadline=None, database=None, print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whatever a test draws without a seed of its own does not depend on the tests before it."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
