"""Where a reader's faults go: strict reading raises the first, an examination collects them all."""

from __future__ import annotations

from mmconvert.errors import MMConvertError


class Faults:
    """The strict sink."""

    def add(self, error: MMConvertError) -> None:
        """A fault after which the reader could go on.

        Raises:
            MMConvertError: this one.
        """
        raise error


class Collected(Faults):
    """Keeps every fault.

    Attributes:
        errors: in the order in which they were found.
    """

    def __init__(self) -> None:
        self.errors: list[MMConvertError] = []

    def add(self, error: MMConvertError) -> None:
        """A fault after which the reader goes on."""
        self.errors.append(error)


STRICT = Faults()
