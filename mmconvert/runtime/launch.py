"""Starts the processes of a run, unless torchrun has done so.

On a CPU the processes are forked from one that has imported torch and transformers, so that the
imports are paid for once; on an accelerator, whose driver does not outlive a fork, they are
started anew.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmconvert.errors import MMConvertError, RequestError
from mmconvert.runtime.device import backend, device, take_device

Emit = Callable[[object], None]
# What a run does on each of its processes: Job(device, emit) -> what process 0 returns.
Job = Callable[[torch.device, Emit], object]

TIMEOUT = timedelta(minutes=30)  # process 0 may compute alone for a while
AFTER_FAULT = 3.0  # seconds that the error behind another process's fault may take to arrive
DEBUG = "MMCONVERT_DEBUG"


class Message(NamedTuple):
    """What a process tells the one that started it."""

    kind: str  # event, result, error or fault
    content: Any


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(
        os.environ
    )


def leads() -> bool:
    """Whether this process is the one that speaks."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


def launch(job: Job, world: int, on_event: Emit) -> object:
    """Runs a job on ``world`` processes.

    Args:
        job: runs on every process; it must be picklable where there is an accelerator.
        on_event: gets what process 0 emits, as it comes.

    Returns:
        what the job returns on process 0; under torchrun, on each process what it returns there.

    Raises:
        MMConvertError: what a process raised; RequestError: torchrun started another number.
    """
    if under_torchrun():
        return _in_torchrun(job, world, on_event)
    here = device()
    if here.type != "cpu" and world > torch.accelerator.device_count():
        raise RequestError(
            f"the checkpoint has {world} ranks, this machine {torch.accelerator.device_count()} "
            f"{here.type} devices",
            "a device for each rank",
            "resplit the checkpoint to fewer ranks, or use torchrun over several machines",
        )
    return _spawn(job, world, on_event, "fork" if here.type == "cpu" else "spawn")


def _in_torchrun(job: Job, world: int, on_event: Emit) -> object:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != world:
        raise RequestError(
            f"torchrun started {size} processes",
            f"{world}, one for each rank of the checkpoint",
            f"torchrun --nproc-per-node {world} ...",
        )
    where = take_device()
    _calm(where)
    dist.init_process_group(backend(where), timeout=TIMEOUT)
    try:
        return job(where, on_event if dist.get_rank() == 0 else _nothing)
    finally:
        dist.destroy_process_group()


def _nothing(event: object) -> None:
    del event


def _calm(where: torch.device) -> None:
    if where.type == "cpu":  # several processes share the cores
        torch.set_num_threads(1)


def _spawn(job: Job, world: int, on_event: Emit, method: str) -> object:
    context: Any = mp.get_context(method)  # torch's stubs know no Process
    threads = torch.get_num_threads()
    if method == "fork":
        torch.set_num_threads(1)  # threads do not survive a fork
    processes, pipes = [], []
    result: object = None
    with tempfile.TemporaryDirectory(prefix="mmconvert-") as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (job, rank, world, meeting, theirs)
                process = context.Process(target=_child, args=arguments, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            result = _listen(pipes, on_event)
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(5 if result is not None else 0)
                if process.is_alive():
                    process.kill()
                process.join()
            torch.set_num_threads(threads)
    return result[0] if isinstance(result, tuple) else None


def _listen(pipes: list[Connection], on_event: Emit) -> tuple[object]:
    """Passes events on until every process has ended.

    Once a process has failed its neighbours hang or fail in turn. So an error of mmconvert, from
    whichever process, ends the run at once; another fault does after a moment, in which the
    error behind it may still arrive.
    """
    left, ended = list(pipes), set[int]()
    result: tuple[object] = (None,)
    fault = ""
    while left:
        ready = wait(left, timeout=AFTER_FAULT if fault else None)
        if not ready:
            break
        for pipe in ready:
            number = pipes.index(pipe)  # type: ignore[arg-type] - wait returns what it was given
            try:
                kind, content = pipes[number].recv()
            except (EOFError, OSError):
                left.remove(pipes[number])
                if number not in ended:
                    fault = fault or f"process {number} of the run was killed"
                continue
            if kind == "event":
                on_event(content)
                continue
            ended.add(number)
            if kind == "error":
                raise content
            if kind == "fault":
                fault = fault or content
            elif number == 0:
                result = (content,)
    if fault:
        raise RuntimeError(fault)
    return result


def _child(job: Job, rank: int, world: int, meeting: str, pipe: Connection) -> None:
    """One process of the run."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        where = take_device()
        _calm(where)
        dist.init_process_group(
            backend(where), init_method=meeting, rank=rank, world_size=world, timeout=TIMEOUT
        )

        def emit(event: object) -> None:
            if rank == 0:
                pipe.send(Message("event", event))

        message = Message("result", job(where, emit) if rank == 0 else job(where, emit) and None)
        dist.barrier()
    except MMConvertError as error:
        message = Message("error", error)
    except BaseException as error:
        text = traceback.format_exc() if os.environ.get(DEBUG) else ""
        message = Message("fault", f"{type(error).__name__}: {error}\n{text}".strip())
    with suppress(pickle.PicklingError, OSError, TypeError):  # the parent sees a closed pipe
        pipe.send(message)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # the parent's own clean-up is not this process's business
