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
import threading
import time
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
from torch.distributed.rendezvous import rendezvous

from mmconvert.errors import LostProcessError, MMConvertError, RequestError
from mmconvert.runtime.device import backend, device, take_device

Emit = Callable[[object], None]
# What a run does on each of its processes: Job(device, emit) -> what process 0 returns.
Job = Callable[[torch.device, Emit], object]

TIMEOUT = timedelta(minutes=30)  # process 0 may compute alone for a while
FAILED = "mmconvert/failed"  # key of torchrun's store: what the first failure was
CUT_OFF = ("Connection", "connection", "gloo", "NCCL", "HCCL")  # in errors of broken collectives
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


def replicas_for(world: int) -> int:
    """How many copies of a model of ``world`` ranks run: under torchrun as many as its processes
    make, on accelerators as many as there is room for, one on a CPU.

    Raises:
        RequestError: torchrun's processes are not whole copies.
    """
    if under_torchrun():
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size % world:
            raise RequestError(
                f"torchrun started {size} processes",
                f"{world}, one for each rank of the checkpoint, or a multiple of it",
                f"torchrun --nproc-per-node {world} ...",
            )
        return size // world
    here = device()
    return 1 if here.type == "cpu" else max(1, torch.accelerator.device_count() // world)


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
    store, rank, _ = next(rendezvous("env://"))
    dist.init_process_group(
        backend(where), store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    try:
        return job(where, on_event if rank == 0 else _nothing)
    except MMConvertError as error:
        store.set(FAILED, f"process {rank}: {error.what}")
        raise
    except RuntimeError as error:  # a process whose neighbour has failed cannot reach it
        raise _lost(error, _told(store)) from None
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _nothing(event: object) -> None:
    del event


def _told(store: Any) -> str:  # noqa: ANN401 - torch types its Store as private
    """What another process under torchrun said of its failure, if it does so within a moment."""
    until = time.monotonic() + AFTER_FAULT
    with suppress(RuntimeError):
        while time.monotonic() < until:
            if store.check([FAILED]):
                return store.get(FAILED).decode()
            time.sleep(0.1)
    return ""


def _lost(error: RuntimeError, told: str) -> Exception:
    """The error of a process that has lost the others; one of its own stays what it is."""
    if told:
        return LostProcessError(f"another process of the run has failed: {told}")
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or any(word in text for word in CUT_OFF):
        return LostProcessError(
            f"the processes of this run have lost each other: {text[:200]}",
            "all of them, until the end",
            "see what the others printed",
        )
    return error


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
                arguments = (job, rank, world, meeting, theirs, os.getpid())
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

    Raises:
        MMConvertError: what a process raised; LostProcessError: one is gone without a word.
        RuntimeError: another fault.
    """
    left, ended = list(pipes), set[int]()
    result: tuple[object] = (None,)
    fault = killed = ""
    while left:
        ready = wait(left, timeout=AFTER_FAULT if fault or killed else None)
        if not ready:
            break
        for pipe in ready:
            number = pipes.index(pipe)  # type: ignore[arg-type] - wait returns what it was given
            try:
                kind, content = pipes[number].recv()
            except (EOFError, OSError):
                left.remove(pipes[number])
                if number not in ended:
                    killed = killed or f"process {number} of the run was killed"
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
    if killed:  # what the others say then is only that they cannot reach it
        raise LostProcessError(
            killed,
            "all processes until the end, and memory for each",
            "start it again; where memory is short, resplit to another layout or compute in bf16",
        )
    if fault:
        raise RuntimeError(fault)
    return result


def _watch(parent: int) -> None:
    """Ends this process when the one that started it is gone, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _child(job: Job, rank: int, world: int, meeting: str, pipe: Connection, parent: int) -> None:
    """One process of the run."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
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
