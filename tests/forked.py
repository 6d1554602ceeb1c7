"""A command in a process of its own, forked from this one: torch is imported already.

For the signals and deaths of a command that trains or answers: starting Python and importing torch
and transformers would take longer than what is tried.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


class Forked:
    """What returns an exit code, in a session whose number is that of its first process.

    Args:
        terminal: stdin and stdout are a terminal; `stdout` is its other end.
    """

    def __init__(self, program: Callable[[], int], *, terminal: bool = False) -> None:
        ours, theirs = pty.openpty() if terminal else os.pipe()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - see `close`
        self.pid = os.fork()
        if self.pid == 0:
            _become(program, theirs, self._errors.fileno(), terminal=terminal)
        os.close(theirs)
        self.stdout = os.fdopen(ours, encoding="utf-8")

    def members(self) -> list[int]:
        """The processes of the session that are alive."""
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def ends(self) -> tuple[int, str]:
        """Exit code and stderr; no process of the session is left soon after."""
        until = time.monotonic() + 60
        pipe = self.stdout.fileno()
        while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            if not _read(pipe):
                break
        else:
            raise TimeoutError("its processes still hold their stdout")
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        until = time.monotonic() + 20
        while (left := self.members()) and time.monotonic() < until:
            time.sleep(0.1)
        assert left == []
        self._errors.seek(0)
        return code, self._errors.read()

    def close(self) -> None:
        """Kills what is left, and closes its streams."""
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # `ends` has seen it end
            os.waitpid(self.pid, 0)
        self.stdout.close()
        self._errors.close()


def _read(pipe: int) -> bytes:
    """What comes next; nothing at the end, which a terminal says with an error."""
    with suppress(OSError):
        return os.read(pipe, 1 << 16)
    return b""


def _become(program: Callable[[], int], out: int, errors: int, *, terminal: bool) -> NoReturn:
    """What the entry point does, in a child that never returns to the test."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts: a command that
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ended in this process has left its own
        os.dup2(out, 1)
        os.dup2(errors, 2)
        if terminal:
            os.dup2(out, 0)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        code = program()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
