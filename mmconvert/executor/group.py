"""Several processes on one conversion, started by torch's launcher:

    torchrun --nproc-per-node 4 -m mmconvert CONVERTER VERB ...

Every process makes the same plan; the first one creates the files and gives them their final
name, all of them share the bytes, and all of them fail if one does. The processes may run on
several machines that see the same folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from mmconvert import errors
from mmconvert.errors import LostProcessError, MMConvertError, RequestError, disagreement

T = TypeVar("T")
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun for every process that it starts


class ProcessGroup:
    """The processes of one run; this one is alone.

    Attributes:
        rank: this process, from 0.
        size: number of processes.
    """

    rank = 0
    size = 1

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        return [value]

    def leave(self) -> None:
        """Says goodbye to the others."""

    @property
    def leads(self) -> bool:
        """Whether this process creates and commits the output, and speaks to the user."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Does this process's work; returns what every process's gave, in their order.

        Raises:
            MMConvertError: the first error of any process, in all of them.
        """
        failure: BaseException | None = None
        result: Any = None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must not wait for ever
            failure = error
        answers = self.gather(_told(failure) or (None, result))
        if failure is not None:
            raise failure
        for rank, (said, _) in enumerate(answers):
            if said is not None:
                raise _rebuilt(said, rank)
        results: list[Any] = [answer for _, answer in answers]
        return results

    def lead(self, work: Callable[[], T]) -> T:
        """Lets the first process alone do something; all get its result, or its error."""
        answers: list[Any] = self.together(work if self.leads else _nothing)
        return answers[0]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Makes sure that all processes want the same, before one of them writes anything.

        Args:
            facts: what decides the output, by what to call it in a message.

        Raises:
            RequestError: they differ; in all processes.
        """
        if error := disagreement(self.gather(dict(facts))):
            raise error

    def share(self, items: Sequence[T], weight: Callable[[T], int]) -> list[T]:
        """The part of a sequence for this process: neighbours, about equally heavy."""
        total = sum(weight(item) for item in items)
        mine: list[T] = []
        before = 0
        for item in items:
            middle = before + weight(item) / 2
            if min(self.size - 1, int(middle * self.size / max(1, total))) == self.rank:
                mine.append(item)
            before += weight(item)
        return mine


class Launched(ProcessGroup):
    """The processes that torchrun has started."""

    def __init__(self) -> None:
        # No accelerator is used, and torch_npu must not stop a run on a machine without drivers.
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        try:
            from datetime import timedelta

            import torch.distributed as dist
        except ImportError as error:
            raise RequestError(
                f"torchrun has started this process, but torch cannot be imported: {error}",
                "torch, which carries the messages between the processes",
                "pip install 'mmconvert[runtime]', or run mm-convert without torchrun",
            ) from None
        self._dist: Any = dist  # its functions for objects have no types
        try:
            # Processes may finish days apart; one that dies is noticed at once all the same.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        except (RuntimeError, ValueError) as error:
            raise _lost(error) from None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def leave(self) -> None:
        """Ends the connection, so that torch does not complain that nobody did."""
        with suppress(RuntimeError):
            self._dist.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """The values of all processes; they are pickled, and only these processes listen."""
        found: list[Any] = [None] * self.size
        try:
            self._dist.all_gather_object(found, value)
        except RuntimeError as error:
            raise _lost(error) from None
        return found


def _nothing() -> Any:  # noqa: ANN401 - stands for any work
    return None


def _lost(error: Exception) -> LostProcessError:
    return LostProcessError(
        f"the processes of this run have lost each other: {' '.join(str(error).split())[:200]}",
        "all of them, until the end",
        "see what the others printed; the same command goes on where it stopped",
    )


def _told(error: BaseException | None) -> tuple[tuple[str, str, str, str], None] | None:
    """An error as plain words, for the other processes."""
    if error is None:
        return None
    if isinstance(error, MMConvertError):
        return (type(error).__name__, error.what, error.expected, error.fix), None
    return (type(error).__name__, f"{type(error).__name__}: {error}", "", ""), None


def _rebuilt(said: tuple[str, str, str, str], rank: int) -> MMConvertError:
    name, what, expected, fix = said
    kind = getattr(errors, name, MMConvertError)
    known = isinstance(kind, type) and issubclass(kind, MMConvertError)
    return (kind if known else MMConvertError)(f"process {rank}: {what}", expected, fix)


_current = ProcessGroup()


def current() -> ProcessGroup:
    """The processes that work on this run."""
    return _current


def join() -> ProcessGroup:
    """Joins the processes of torchrun, if it has started this one.

    Only ``python -m mmconvert`` asks: the command mm-convert may well be called by a program that
    torchrun has started, and is no part of that program's group.

    Raises:
        RequestError: they cannot be reached.
    """
    global _current
    if TORCHRUN in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        _current = Launched()
    return _current
