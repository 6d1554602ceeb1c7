"""Where a reader's faults go: strict reading raises the first, an examination collects them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmconvert.errors import MMConvertError

T = TypeVar("T")


class Faults:
    """The strict sink."""

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
    """Keeps every fault.

    Attributes:
        errors: in the order in which they were found.
        remarks: what is no fault.
    """

    def __init__(self) -> None:
        self.errors: list[MMConvertError] = []
        self.remarks: list[MMConvertError] = []

    def add(self, error: MMConvertError) -> None:
        """A fault after which the reader goes on."""
        self.errors.append(error)

    def remark(self, remark: MMConvertError) -> None:
        """Something that is no fault."""
        self.remarks.append(remark)


STRICT = Faults()
