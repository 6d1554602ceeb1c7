"""The same tests with the same numbers everywhere; `make nightly` alone draws new ones."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Each process of a run has a core; more threads would wait for each other. Before torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Hypothesis would choose by itself: new examples each time, others where CI is set, and those of
# a database that a run before has left.
settings.register_profile("same", deadline=None, database=None, derandomize=True)
settings.register_profile("nightly", deadline=None, database=None, print_blob=True)
settings.load_profile("same")


def pytest_collection() -> None:
    """Nothing that imports leave behind is worth collecting."""
    gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What the libraries made stays until the end: no collection looks at it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whatever a test draws without a seed of its own does not depend on the tests before it."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_handler_is_left() -> Iterator[None]:
    """A test that leaves a handler behind would change what those after it see of a signal."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: tests wait for processes, for disks, and for what they try to stop."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else 2


WAIT_FOR_THE_DISK = ("test_power_loss", "test_saving", "test_output_safety", "test_apart")


@pytest.fixture(autouse=True)
def no_waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced is the matter of a few modules; the others do not wait for the disk."""
    from mmconvert import durable

    if not request.module.__name__.rpartition(".")[2].startswith(WAIT_FOR_THE_DISK):
        monkeypatch.setattr(durable, "sync_fd", lambda fd: None)
