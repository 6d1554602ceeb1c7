"""A SIGTERM that is noted, for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


class Stop:
    """Whether somebody has asked this process to stop, by SIGTERM."""

    asked = False

    @contextmanager
    def listening(self) -> Generator[None]:
        """Notes the signal while it is open, for the end of the step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda number, frame: self._note())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self) -> None:
        self.asked = True
