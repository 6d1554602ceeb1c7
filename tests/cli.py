"""Running the command line as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_cli(
    *args: str | Path,
    cwd: Path | None = None,
    check: int | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m mmconvert`` with `args`.

    Args:
        cwd: the folder to run in.
        check: the exit code that is expected; another one fails with what was printed.
        env: environment variables to set besides the present ones.
    """
    command = [sys.executable, "-m", "mmconvert", *map(str, args)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    if check is not None and done.returncode != check:
        raise AssertionError(
            f"exit code {done.returncode}, expected {check}: {' '.join(command)}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done
