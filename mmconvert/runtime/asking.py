"""Prompts on their way to the processes of a run, which answer one after the other."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import pickle
import queue
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmconvert.runtime import engine as engines
from mmconvert.runtime.device import device
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.generation import Generation, PromptBatch
from mmconvert.runtime.launch import launch
from mmconvert.runtime.mmfiles import LoadableCheckpoint
from mmconvert.runtime.processes import Emit, start_method
from mmconvert.runtime.sampling import Sampling
from mmconvert.runtime.validation import DTYPES

PATIENCE = 30.0  # seconds between signs of life while nobody asks


class Ready(Enum):
    """Said by the processes when they wait for a prompt."""

    READY = "ready"


class Step(NamedTuple):
    """A token of each row that has not ended."""

    tokens: list[int | None]


class Ended(NamedTuple):
    """All tokens of the answers to one prompt, or of several side by side, by row."""

    answers: list[list[int]]


class Prompts:
    """The way of prompts from the process that reads them to all that answer."""

    def __init__(self) -> None:
        context: Any = mp.get_context(start_method(device()))
        self._queue = context.Queue()

    def put(self, asked: PromptBatch | None) -> None:
        """Sends prompts; None is the end."""
        self._queue.put(pickle.dumps(asked))

    def close(self) -> None:
        """Nothing more is sent, nor waited for."""
        self._queue.close()
        self._queue.cancel_join_thread()

    def next(self, where: torch.device) -> PromptBatch | None:
        """The next prompts, on every process; waits as long as it takes."""
        held: list[bytes] = [b""]
        while not held[0]:
            if dist.get_rank() == 0:
                try:
                    held = [self._queue.get(timeout=PATIENCE)]
                except queue.Empty:  # the others must not wait for too long at a time
                    held = [b""]
            on = None if where.type == "cpu" else where
            dist.broadcast_object_list(held, 0, device=on)
        asked: PromptBatch | None = pickle.loads(held[0])  # noqa: S301 - of our own process
        return None if asked is None else replace(asked, batch=asked.batch.to(where))


@dataclass(frozen=True)
class Answering:
    """The job of every process that answers prompts."""

    arch: Architecture
    stored: LoadableCheckpoint
    prompts: Prompts
    stop: frozenset[int]
    dtype: str
    how: Sampling

    def __call__(self, device: torch.device, emit: Emit) -> None:
        """Emits :class:`Ready`, and for each prompt every :class:`Step` and then :class:`Ended`."""
        run = engines.load(self.arch, self.stored, device, DTYPES[self.dtype])
        run.only_answer()
        answers = Generation(run, self.stop, self.how)
        emit(Ready.READY)
        while (asked := self.prompts.next(device)) is not None:
            emit(Ended(answers.answer(asked, lambda tokens: emit(Step([*tokens])))))
            emit(Ready.READY)


def converse(
    arch: Architecture,
    stored: LoadableCheckpoint,
    stop: frozenset[int],
    dtype: str,
    how: Sampling,
    ask: Callable[[], PromptBatch | None],
    hear: Callable[[Step | Ended], None],
) -> None:
    """Runs a checkpoint for as long as there are prompts.

    Args:
        stop: ids that end an answer.
        ask: gives the next prompts, once the answers before are heard; None ends the run.
        hear: gets the answers, as they come.

    Raises:
        MMConvertError: what a process, ``ask`` or ``hear`` raised.
    """
    prompts = Prompts()

    def on_event(event: object) -> None:
        if isinstance(event, Ready):
            prompts.put(ask())
        elif isinstance(event, (Step, Ended)):
            hear(event)

    try:
        launch(Answering(arch, stored, prompts, stop, dtype, how), stored.world, on_event)
    finally:
        prompts.close()
