"""What a conversion tells its caller while it runs. The command line draws it; a library call
may ignore it.
"""

from __future__ import annotations


class Events:
    """Receives progress; this one ignores it. Methods may be called from any thread."""

    def start(self, what: str, nbytes: int) -> None:
        """A phase begins that will move or read ``nbytes``."""

    def advance(self, nbytes: int) -> None:
        """So many bytes are done."""

    def note(self, text: str) -> None:
        """Something worth knowing."""
