"""Where a reader's faults go: strict reading raises the first, an examination collects them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

from mmconvert.errors import MMConvertError

T = TypeVar("T")


class Faults:
    """The strict sink."""

    @property
    def found(self) -> int:
        """The number of faults so far."""
        return 0

    def stop(self) -> NoReturn:
        """Nothing more can be read, because of faults that were added.

        Raises:
            MMConvertError: the last of them.
        """
        raise AssertionError("a strict sink has raised its fault")

    def add(self, error: MMConvertError) -> None:
        """A fault after which the reader could go on.

        Raises:
            MMConvertError: this one.
        """
        raise error

    def remark(self, remark: MMConvertError) -> None:
        """Something that is no fault and worth knowing; a reader has it in its notes too."""

    def attempt(self, step: Callable[[], T], otherwise: T) -> T:
        """What a step returns; ``otherwise`` where it fails and the reader goes on.

        Raises:
            MMConvertError: the step's, if this sink is strict.
        """
        try:
            return step()
        except MMConvertError as error:
            self.add(error)
            return otherwise


class Collected(Faults):
    """Keeps every fault and remark, each once.

    Attributes:
        errors: in the order in which they were found.
        remarks: what is no fault.
    """

    def __init__(self) -> None:
        self.errors: list[MMConvertError] = []
        self.remarks: list[MMConvertError] = []
        self._seen: set[str] = set()

    @property
    def found(self) -> int:
        """The number of faults so far."""
        return len(self.errors)

    def stop(self) -> NoReturn:
        """Nothing more can be read. Raises the last fault, once more."""
        raise self.errors[-1]

    def add(self, error: MMConvertError) -> None:
        """A fault after which the reader goes on."""
        self._keep(error, self.errors)

    def remark(self, remark: MMConvertError) -> None:
        """Something that is no fault."""
        self._keep(remark, self.remarks)

    def _keep(self, error: MMConvertError, among: list[MMConvertError]) -> None:
        if error.what not in self._seen:
            self._seen.add(error.what)
            among.append(error)


STRICT = Faults()
