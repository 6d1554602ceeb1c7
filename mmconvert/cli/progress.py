"""What a training says on the screen: lines of the log to stdout, notes to stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.words import printable

if TYPE_CHECKING:
    from mmconvert.runtime.journal import Line
    from mmconvert.runtime.trainplan import TrainingOutcome

INTERRUPTED = 130
RULE = "-" * 100
NOTE = 2000  # characters of a note; it may have names from a data file


@dataclass(frozen=True)
class TrainingScreen:
    """Where the lines of a training go.

    Attributes:
        save: the folder of checkpoints.
        steps: iterations in all.
        megatron: lines in Megatron's form, which scripts look through for times.
        speed: tokens are told, too.
    """

    save: Path
    steps: int
    json: bool
    quiet: bool
    megatron: bool
    speed: bool

    def tell(self, event: object) -> None:
        """A line of the log, or a note."""
        from mmconvert.runtime.journal import Line

        if not isinstance(event, Line):
            if not self.quiet:
                print(printable(str(event), NOTE), file=sys.stderr)
        elif self.json:
            print(json.dumps(event.as_dict()), flush=True)
        elif not self.quiet:
            print(self.as_megatron(event) if self.megatron else self.words(event), flush=True)

    def end(self, ended: TrainingOutcome) -> int:
        """How it ended; the exit code."""
        if ended.stopped:
            return self.interrupted(f"stopped after iteration {ended.iteration}")
        last = {"iteration": ended.iteration, "loss": ended.loss, "save": str(self.save)}
        print(json.dumps(last) if self.json else f"done: loss {ended.loss:.6f}, {self.save}")
        return 0

    def interrupted(self, how: str) -> int:
        """That it was interrupted, and what to do; the exit code."""
        from mmconvert.runtime.iterations import last_saved

        last = last_saved(self.save)
        if last is None:
            what, fix = f"{how}: no checkpoint was saved yet", ""
        else:
            what = f"{how}: the newest checkpoint in {self.save} is that of iteration {last}"
            fix = "--resume goes on from it"
        if self.json:
            told = {"error": "Interrupted", "what": what, "expected": "", "fix": fix}
            print(json.dumps(told | {"exit_code": INTERRUPTED}))
        print(f"{what}; {fix}" if fix else what, file=sys.stderr)
        return INTERRUPTED

    def words(self, line: Line) -> str:
        """A line of the log."""
        head = f"iteration {line.iteration:>6}/{self.steps}"
        if line.loss is None:
            return f"{head} | validation loss {line.evaluation:.6f}"
        tail = f" | {line.tokens:.0f} tokens/s" if self.speed else ""
        return (
            f"{head} | loss {line.loss:.6f} | lr {line.rate:.3e} | grad norm {line.norm:.3f} | "
            f"{line.seconds:.3f} s{tail}"
        )

    def as_megatron(self, line: Line) -> str:
        """A line of the log as MindSpeed-MM prints it (``training.py`` of 2.2.0).

        Its scripts take the fifth field between colons for the time of an iteration.
        """
        if line.loss is None:
            value = line.evaluation or 0.0
            said = (
                f" validation loss at iteration {line.iteration} | loss value: {value:.6E} | "
                f"loss PPL: {math.exp(min(20.0, value)):.6E} | "
            )
            return f"{RULE}\n{said}\n{RULE}"
        fields = [
            f"iteration {line.iteration:8d}/{self.steps:8d}",
            f"consumed samples: {line.iteration * line.samples:12d}",
            f"elapsed time per iteration (ms): {1000 * line.seconds:.1f}",
            f"learning rate: {line.rate:.6E}",
            f"global batch size: {line.samples:5d}",
        ]
        if self.speed:
            each = line.tokens * line.seconds / max(1, line.samples)
            fields.append(f"tokens per sample: {each:.6E}")
        fields += [
            f"loss: {line.loss:.6E}", "loss scale: 1.0", f"grad norm: {line.norm:.3f}",
            "number of skipped iterations:   0", "number of nan iterations:   0",
        ]  # fmt: skip
        return f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] {' | '.join(fields)} |"
