"""One conversion that notes when its parts began and ended; see ``convert.py``.

    python benchmarks/split.py OUT WORD ...

Nothing is imported that ``python -m mmconvert WORD ...`` does not import: it would count as ours.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("start", "plan", "move", "sync", "commit")


def split(out: Path, words: list[str]) -> None:
    """Runs the command in this process, and writes when its parts began and ended."""
    marks = [time.monotonic()]

    def marked(room: Any, name: str, *, after: bool) -> None:  # noqa: ANN401 - a module or class
        function: Callable[..., object] = getattr(room, name)

        def call(*args: object, **more: object) -> object:
            if len(marks) < len(PARTS):
                marks.append(time.monotonic())
            result = function(*args, **more)
            if after:
                marks.append(time.monotonic())
            return result

        setattr(room, name, call)

    import mmconvert.executor.moving
    import mmconvert.formats.reading
    import mmconvert.run

    marked(mmconvert.run.Conversion, "__init__", after=False)
    marked(mmconvert.executor.moving, "run_jobs", after=True)
    marked(mmconvert.formats.reading.FileWatch, "check", after=False)
    sys.argv = ["mm-convert", *words]
    try:
        runpy.run_module("mmconvert", run_name="__main__")
    finally:
        out.write_text(json.dumps(marks))


if __name__ == "__main__":
    split(Path(sys.argv[1]), sys.argv[2:])
