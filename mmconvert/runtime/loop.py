"""The loop of steps, evaluations and checkpoints that every process of a training runs."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import torch
import torch.distributed as dist

from mmconvert.errors import DatasetError, MMConvertError, RequestError
from mmconvert.runtime import iterations
from mmconvert.runtime.checking import BackgroundCheck
from mmconvert.runtime.journal import Interval, Line, TrainingLog
from mmconvert.runtime.parameters import gather
from mmconvert.runtime.processes import Emit
from mmconvert.runtime.stopping import Stop
from mmconvert.runtime.trainplan import SAVE_EVERY, TrainingOutcome, TrainingPlan


class Agreed(NamedTuple):
    """What all processes know after a step.

    Attributes:
        stop: one of them was asked to stop.
        late: the last checkpoint is old.
        due: it is time for one.
    """

    stop: bool
    late: bool
    due: bool


class ProcessPlace(NamedTuple):
    """Where a process stands among the others.

    Attributes:
        device: where flags are exchanged.
        lead: it is the process that writes and speaks.
        speaks: it is the one of its replica that counts for the others.
        processes: of a replica.
    """

    device: torch.device
    lead: bool
    speaks: bool
    processes: int = 1


class Trainee(Protocol):
    """A model that learns, as this process has it.

    Attributes:
        bad: samples that turned out to be useless, by number, and what is wrong with them.
        evaluates: there is data for evaluations.
    """

    bad: dict[int, str]
    evaluates: bool

    def read(self, step: int) -> list[Any]:
        """The micro-batches of this replica in a step.

        Raises:
            DatasetError: they cannot be read.
        """
        ...

    def tokens(self, step: int) -> int:
        """Tokens of these, padding not counted."""
        ...

    def update(self, step: int, batches: list[Any]) -> tuple[float, float, float]:
        """(loss, learning rate, gradient norm) of an update."""
        ...

    def evaluate(self) -> float:
        """Mean loss over the validation data, or its first batches."""
        ...

    def write(self, number: int) -> Path:
        """Writes the checkpoint of an iteration, whole or not at all; every process calls this."""
        ...


def check_numbers(step: int, loss: float, norm: float) -> None:
    """Raises RequestError where an update would lose the weights."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RequestError(
            f"iteration {step + 1}: the loss is {loss}, the gradient norm {norm}",
            "numbers; the weights of this iteration are not saved",
            "a smaller --lr, or --clip_grad; --resume goes on from the last checkpoint",
        )


@dataclass(frozen=True)
class Known:
    """What is known of samples before the first step.

    Attributes:
        told: numbers of those that have been named as useless.
        strict: one that cannot be used is an error.
    """

    told: frozenset[int] = frozenset()
    strict: bool = False


class Loop:
    """A training under way.

    Args:
        first: the iteration that it goes on from.
        inspection: decodes files in the background.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        trainee: Trainee,
        place: ProcessPlace,
        first: int,
        emit: Emit,
        stop: Stop,
        known: Known,
        inspection: BackgroundCheck | None = None,
    ) -> None:
        self._plan, self._trainee, self._place, self._first = plan, trainee, place, first
        self._emit, self._stop, self._strict = emit, stop, known.strict
        self._told, self._left_out = set(known.told), 0  # the latter by each replica for itself
        self._inspection = inspection
        self._rolling = 0  # the last checkpoint that the clock made
        self._tokens = self._next_tokens = 0
        self._ahead: list[Any] | MMConvertError = []
        self._journal = TrainingLog(plan.save, first, plan.log_axis) if place.lead else None
        self._saved, self._clock = first, time.monotonic()

    def train(self) -> TrainingOutcome:
        """All steps, or as many as there is time for."""
        if self._inspection is None:
            return self._steps()
        if self._place.lead:
            self._inspection.start()
        try:
            return self._steps()
        finally:
            self._inspection.end()

    def _steps(self) -> TrainingOutcome:
        plan, loss = self._plan, float("nan")
        interval = Interval(plan.log_every)
        self._ahead = self._read(self._first)
        done = self._agree(self._first)
        for step in range(self._first, plan.steps):
            number = step + 1
            line = self._step(step)
            loss = line.loss or 0.0
            self._ahead = self._read(number)
            done = self._agree(number)
            line = replace(line, tokens=self._tokens / line.seconds)
            self._write_down(line)
            if (mean := interval.add(line)) is not None:
                self._emit(mean)
            if self._trainee.evaluates and plan.evaluates(number):
                line = Line(number, evaluation=self._trainee.evaluate())
                self._emit(line)
                self._write_down(line)
            if number == plan.steps or done.stop or done.due:
                self._save(number, rolling=done.late and number < plan.steps)
            if done.stop:
                return TrainingOutcome(loss, number, stopped=number < plan.steps)
        if self._journal is not None:
            self._journal.picture()
        return TrainingOutcome(loss, plan.steps, stopped=False)

    def _step(self, step: int) -> Line:
        """One update; its tokens are known when all processes have agreed."""
        began, plan = time.perf_counter(), self._plan
        assert isinstance(self._ahead, list)  # noqa: S101 - else all processes have stopped
        loss, rate, norm = self._trainee.update(step, self._ahead)
        seconds = time.perf_counter() - began
        samples = plan.size * plan.count
        return Line(step + 1, loss, None, rate, norm, seconds, samples=samples)

    def _write_down(self, line: Line) -> None:
        if self._journal is not None:
            self._journal.add(line)

    def _read(self, step: int) -> list[Any] | MMConvertError:
        """The micro-batches of this replica in a step, or why there are none."""
        if step == self._plan.steps:
            return []
        try:
            return self._trainee.read(step)
        except DatasetError as error:
            return error

    def _agree(self, number: int) -> Agreed:
        """What all processes know of each other after iteration ``number``.

        Raises:
            MMConvertError: one of them could not read the samples of the next step; what has been
                learnt is saved.
        """
        self._hear()
        place, every, bad_ones = self._place, self._plan.save_every, self._trainee.bad
        late = every is None and place.lead and time.monotonic() - self._clock > SAVE_EVERY
        wrong = isinstance(self._ahead, MMConvertError)
        counts = place.speaks and not wrong and bool(self._ahead)
        tokens = self._trainee.tokens(number) if counts else 0
        bad = len(bad_ones) if place.speaks else 0
        mine = crc32(repr(sorted(bad_ones)).encode())
        flags = torch.tensor(
            [self._stop.asked, late, wrong, tokens, bad, mine, mine if place.speaks else 0],
            device=place.device,
        )
        dist.all_reduce(flags)
        stop, late, wrong, tokens, bad, every_process, every_replica = flags.tolist()
        if not wrong and every_process != place.processes * every_replica:  # read on some alone
            for one in gather(bad_ones):
                bad_ones |= one
            self._ahead = self._read(number)
            return self._agree(number)
        if bad != self._left_out:
            self._left_out = bad
            self._tell_left_out()
        if wrong:
            mine = self._ahead if isinstance(self._ahead, MMConvertError) else None
            found = [error for error in gather(mine) if error is not None]
            self._rescue(number)
            raise found[0]
        self._tokens, self._next_tokens = self._next_tokens, tokens
        return Agreed(bool(stop), bool(late), bool(late or (every and number % every == 0)))

    def _hear(self) -> None:
        """Names samples that were found useless in the background, before their turn."""
        found = {} if self._inspection is None else self._inspection.news()
        for sample, what in found.items():
            if self._strict:
                self._ahead = DatasetError(what, "files that can be decoded")
            elif sample not in self._told:
                self._told.add(sample)
                self._emit(f"warning: left out, {len(self._told)} so far: {what}")

    def _tell_left_out(self) -> None:
        """Names the samples that turned out to be useless, on whichever process."""
        found: dict[int, str] = {}
        for one in gather(self._trainee.bad):
            found |= one
        for sample in sorted(found.keys() - self._told):
            self._told.add(sample)
            self._emit(f"warning: left out, {len(self._told)} so far: {found[sample]}")

    # -------------------------------------------------------------------------------- saving
    def _rescue(self, number: int) -> None:
        """Saves what has been learnt before an error that all processes know of ends the run."""
        if number > self._saved:
            self._save(number)

    def _save(self, number: int, rolling: bool = False) -> None:
        """Writes the checkpoint of an iteration.

        Args:
            rolling: it was due by the clock, and takes the place of the last such one.
        """
        if self._journal is not None:
            self._journal.sync()
        folder = self._trainee.write(number)
        if rolling and self._rolling and self._place.lead:
            iterations.remove(self._plan.save, self._rolling)
        dist.barrier()
        self._rolling = number if rolling else self._rolling
        self._saved, self._clock = number, time.monotonic()
        self._emit(f"saved {folder}")
