"""The processes of a run that mmconvert starts itself: their start, their words, their end."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmconvert.errors import LostProcessError, MMConvertError
from mmconvert.runtime import needs, trouble
from mmconvert.runtime.device import backend, take_device

Emit = Callable[[object], None]
# What a run does on each of its processes: Job(device, emit) -> what process 0 returns.
RankJob = Callable[[torch.device, Emit], object]

USUAL = "30"  # minutes: process 0 may compute alone for a while
AFTER_FAULT = 3.0  # seconds that the error behind another process's fault may take to arrive
DEBUG = "MMCONVERT_DEBUG"


class Message(NamedTuple):
    """What a process tells the one that started it."""

    kind: str  # event, result, error or fault; closed: nothing more can come
    content: Any


def patience() -> timedelta:
    """How long a process waits for the others in one operation."""
    return timedelta(minutes=int(os.environ.get(needs.TIMEOUT, USUAL)))


def start_method(where: torch.device) -> str:
    """How processes are started: forked on a CPU; an accelerator's driver does not outlive that."""
    return "fork" if where.type == "cpu" else "spawn"


def calm(where: torch.device) -> None:
    """Prepares a process for its device."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\b")  # not the user's
    if where.type == "cpu":  # several processes share the cores
        torch.set_num_threads(1)


def spawn(job: RankJob, world: int, on_event: Emit, method: str) -> object:
    """Runs a job on ``world`` processes that are forked or started anew; what process 0 returns."""
    context: Any = mp.get_context(method)  # torch's stubs know no Process
    threads = torch.get_num_threads()
    if method == "fork":
        torch.set_num_threads(1)  # threads do not survive a fork
    processes, pipes = list[Any](), list[Connection]()
    result: object = None
    with tempfile.TemporaryDirectory(prefix="mmconvert-") as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (job, rank, world, meeting, theirs, os.getpid())
                process = context.Process(target=_child, args=arguments, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            watch = trouble.ProcessWatch([process.pid for process in processes], on_event)
            with _passing_on(job, processes) as heard:
                result = _listen(pipes, lambda event: on_event(heard(event)), watch)
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(5 if result is not None else 0)
                if process.is_alive():
                    process.kill()
                process.join()
            torch.set_num_threads(threads)
    return result[0] if isinstance(result, tuple) else None


@contextmanager
def _passing_on(job: RankJob, processes: Sequence[Any]) -> Generator[Callable[[object], object]]:
    """Passes a SIGTERM on to processes that end by themselves then, once they have spoken.

    A second one, or one before that, ends the run as Ctrl-C does.
    """
    state = {"spoken": False, "asked": False}

    def terminated(number: int, frame: object) -> None:
        del number, frame
        if state["asked"] or not state["spoken"]:
            raise KeyboardInterrupt
        state["asked"] = True
        for process in processes:
            process.terminate()

    def heard(event: object) -> object:
        state["spoken"] = True
        return event

    if not getattr(job, "stops_gently", False) or not _in_main_thread():
        yield heard
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@dataclass
class _Heard:
    """What the processes of a run have said so far.

    Attributes:
        ended: the processes that have said their last word.
        result: what process 0 returns.
        fault: what ended one of them, if that was no error of mmconvert.
        killed: that one is gone without a word.
    """

    ended: set[int] = field(default_factory=set[int])
    result: tuple[object] = (None,)
    fault: str = ""
    killed: str = ""

    @property
    def broken(self) -> bool:
        """Whether what still comes can only be errors."""
        return bool(self.fault or self.killed)

    def take(self, number: int, said: Message) -> None:
        """The last word of a process, or that nothing more can come from it.

        Raises:
            MMConvertError: what the process raised.
        """
        if said.kind == "closed":
            if number not in self.ended:
                self.killed = self.killed or f"process {number} of the run was killed"
            return
        self.ended.add(number)
        if said.kind == "error":
            raise said.content
        if said.kind == "fault":
            self.fault = self.fault or said.content
        elif number == 0:
            self.result = (said.content,)

    def outcome(self) -> tuple[object]:
        """What process 0 returned; raises for what has gone wrong."""
        if self.killed:  # what the others say then is only that they cannot reach it
            raise LostProcessError(
                self.killed,
                "all processes until the end, and memory for each",
                "start it again; where memory is short, resplit to another layout or compute in "
                "bf16",
            )
        if self.fault:
            raise RuntimeError(self.fault)
        return self.result


def _listen(pipes: list[Connection], on_event: Emit, watch: trouble.ProcessWatch) -> tuple[object]:
    """Passes events on until every process has ended.

    Once a process has failed its neighbours hang or fail in turn. So an error of mmconvert, from
    whichever process, ends the run at once; another fault does after a moment, in which the
    error behind it may still arrive.

    Raises:
        MMConvertError: what a process raised; LostProcessError: one is gone without a word.
        RuntimeError: another fault.
    """
    left, heard = list(pipes), _Heard()
    while left:
        ready = wait(left, timeout=AFTER_FAULT if heard.broken else trouble.BEAT)
        if not ready and heard.broken:
            break
        watch.look()
        for pipe in ready:
            number = pipes.index(pipe)  # type: ignore[arg-type] - wait returns what it was given
            said = _received(pipes[number])
            if said.kind == "event":
                on_event(said.content)
                continue
            if said.kind == "closed":
                left.remove(pipes[number])
            heard.take(number, said)
    return heard.outcome()


def _received(pipe: Connection) -> Message:
    """What a process says next."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return Message("closed", None)


def _watch(parent: int) -> None:
    """Ends this process when the one that started it is gone, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _child(
    job: RankJob, rank: int, world: int, meeting: str, pipe: Connection, parent: int
) -> None:
    """One process of the run."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        where = take_device()
        calm(where)
        dist.init_process_group(
            backend(where), init_method=meeting, rank=rank, world_size=world, timeout=patience(),
            device_id=None if where.type == "cpu" else where,  # else barriers guess, and warn
        )  # fmt: skip

        def emit(event: object) -> None:
            if rank == 0:
                pipe.send(Message("event", event))

        message = Message("result", job(where, emit) if rank == 0 else job(where, emit) and None)
        dist.barrier()
    except MMConvertError as error:
        message = Message("error", error)
    except BaseException as error:
        full = trouble.no_memory(error, f"process {rank} of the run")
        cause = trouble.chain(error)[-1]
        text = traceback.format_exc() if os.environ.get(DEBUG) else ""
        told = f"{type(cause).__name__}: {cause}\n{text}".strip()
        message = Message("fault", told) if full is None else Message("error", full)
    with suppress(pickle.PicklingError, OSError, TypeError):  # the parent sees a closed pipe
        pipe.send(message)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # the parent's own clean-up is not this process's business
