"""How much may be searched. Counted in steps, not seconds: the same answer on every machine."""

from __future__ import annotations


class EffortSpent(Exception):  # noqa: N818 - no error: the search stops with what it has
    """The search has taken as many steps as it may."""


class Effort:
    """A budget of steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        """Raises EffortSpent when nothing is left."""
        self._left -= steps
        if self._left < 0:
            raise EffortSpent
