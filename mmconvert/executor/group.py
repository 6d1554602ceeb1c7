"""Several processes on one conversion:

    mm-convert CONVERTER VERB ... --ranks 0/4 & mm-convert CONVERTER VERB ... --ranks 1/4 & ...

or started by torchrun, mpirun or Slurm. Every process makes the same plan; the first one creates
the files and gives them their final name, all of them share the bytes, and all of them fail if one
does. The processes may run on several machines that see the same folders.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mmconvert import errors
from mmconvert.errors import MMConvertError, RequestError, disagreement
from mmconvert.executor.ranks import ALONE, Ranks, of_flag

T = TypeVar("T")


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
        try:
            answers = self.gather(_told(failure) or (None, result))
        finally:
            if failure is not None:  # it matters more than what the others say, or that they left
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


def _nothing() -> Any:  # noqa: ANN401 - stands for any work
    return None


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
_expected = ALONE


def current() -> ProcessGroup:
    """The processes that work on this run."""
    return _current


def expect(ranks: Ranks) -> None:
    """Says which processes the conversions of this command have, where ``--ranks`` says nothing."""
    global _expected
    _expected = ranks


def join(target: Path, flag: str, patience: float, note: Callable[[str], None]) -> ProcessGroup:
    """Meets the other processes of a conversion, if there are any.

    Args:
        target: what they write together.
        flag: ``--ranks``; "" for none.
        patience: seconds to wait for them.
        note: tells the user that they are waited for.

    Raises:
        RequestError: they do not come.
    """
    global _current
    leave()
    ranks = of_flag(flag) if flag else _expected
    if ranks.size > 1:
        try:
            from mmconvert.executor.rendezvous import Rendezvous  # seldom needed
        except ImportError:  # Windows has no fcntl
            if not ranks.certain:
                return _current
            raise RequestError(
                "--ranks needs file locks, which this system does not have",
                "Linux or macOS for several processes",
                "leave --ranks out: one process uses all cores",
            ) from None
        _current = found = Rendezvous(target, ranks)
        if not found.meet(patience, note, certain=ranks.certain):
            note(f"none of the other processes has come, of {ranks.size}: this one goes on alone")
            leave()
    return _current


def leave() -> None:
    """Ends the work with the other processes."""
    global _current
    _current.leave()
    _current = ProcessGroup()


atexit.register(leave)  # of a program that calls our functions
