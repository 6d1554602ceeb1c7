"""What is said of a training: one line for each iteration, in a file, and their picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmconvert import durable
from mmconvert.errors import cannot_write
from mmconvert.runtime.curve import Series, draw
from mmconvert.runtime.verdict import finite

LOG, PICTURE = "loss.jsonl", "loss.svg"


@dataclass(frozen=True)
class Line:
    """What is said of one iteration.

    Attributes:
        loss: mean over the tokens that are learnt; None at an evaluation.
        evaluation: the same over the validation data; None else.
        seconds: of the step.
        tokens: a second, padding not counted.
        samples: of the step.
    """

    iteration: int
    loss: float | None = None
    evaluation: float | None = None
    rate: float = 0.0
    norm: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0
    samples: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The line as JSON; an evaluation that is no number is null."""
        kept = {k: v for k, v in asdict(self).items() if v is not None}
        return {k: finite(v) if isinstance(v, float) else v for k, v in kept.items()}


class Interval:
    """The lines of some iterations in a row become one, as Megatron logs them.

    Args:
        every: how many; 0 for never.
    """

    def __init__(self, every: int) -> None:
        self._every, self._lines = every, list[Line]()

    def add(self, line: Line) -> Line | None:
        """The mean loss and speed since the last time, with the rate and the norm of this line;
        None where it is not yet time.
        """
        self._lines.append(line)
        if not self._every or line.iteration % self._every:
            return None
        lines, self._lines = self._lines, []
        count = len(lines)
        seconds = sum(one.seconds for one in lines)
        return replace(
            line,
            loss=sum(one.loss or 0.0 for one in lines) / count,
            seconds=seconds / count,
            tokens=sum(one.tokens * one.seconds for one in lines) / max(seconds, 1e-9),
        )


class TrainingLog:
    """The lines of a training in a file, and their picture.

    Args:
        start: the iteration that a restart goes on from; later lines are dropped.
        log: the picture has a logarithmic axis.
    """

    def __init__(self, save: Path, start: int, log: bool = False) -> None:
        self._save, self._path, self._log = save, save / LOG, log
        self._lines: list[dict[str, Any]] = []
        try:
            save.mkdir(parents=True, exist_ok=True)
            if start and self._path.is_file():
                for text in self._path.read_text(encoding="utf-8").splitlines():
                    line = json.loads(text)
                    if line["iteration"] <= start:
                        self._lines.append(line)
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            durable.replace_file(self._path, text.encode())
        except OSError as error:
            raise cannot_write(self._path, error) from None
        except (ValueError, TypeError, KeyError):
            self._lines = []  # a journal that somebody edited: the curve begins here

    def add(self, line: Line) -> None:
        """Writes a line down."""
        kept = line.as_dict()
        self._lines.append(kept)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(kept) + "\n")
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def sync(self) -> None:
        """Brings the lines to the disk: a checkpoint has no less of a curve than it was."""
        try:
            durable.sync_file(self._path)
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def picture(self) -> None:
        """Draws the loss."""
        lines: dict[str, Series] = {
            name: [
                (line["iteration"], line[key]) for line in self._lines if line.get(key) is not None
            ]
            for name, key in (("training", "loss"), ("validation", "evaluation"))
        }
        path = self._save / PICTURE
        try:
            durable.replace_file(path, draw("loss", lines, log=self._log).encode())
        except OSError as error:
            raise cannot_write(path, error) from None
