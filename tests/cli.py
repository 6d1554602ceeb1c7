"""Running the command line as a user does: in this process, or in one of its own.

A process of its own costs a start of Python for each command. Only tests of streams, signals,
environment and entry point need it; they say ``process=True``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from inprocess import captured

Done = subprocess.CompletedProcess[str]


def run_cli(
    *args: str | Path,
    cwd: Path | None = None,
    check: int | None = None,
    env: Mapping[str, str] | None = None,
    process: bool = False,
) -> Done:
    """Run mm-convert with `args`.

    Args:
        cwd: the folder to run in.
        check: the exit code that is expected; another one fails with what was printed.
        env: environment variables to set besides the present ones; asks for a process.
        process: run ``python -m mmconvert`` in a process of its own.
    """
    words = [str(arg) for arg in args]
    if process or env:
        done = _in_a_process(words, cwd, env)
    else:
        with standing_in(cwd or Path.cwd()):
            done = captured(words)
    if check is not None and done.returncode != check:
        raise AssertionError(
            f"exit code {done.returncode}, expected {check}: mm-convert {' '.join(words)}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


@contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _in_a_process(words: list[str], cwd: Path | None, env: Mapping[str, str] | None) -> Done:
    return subprocess.run(
        [sys.executable, "-m", "mmconvert", *words],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
