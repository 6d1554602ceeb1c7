"""Starts the processes of a run, unless torchrun has done so.

On a CPU the processes are forked from one that has imported torch and transformers, so that the
imports are paid for once; on an accelerator, whose driver does not outlive a fork, they are
started anew.
"""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mmconvert.errors import MMConvertError, RequestError
from mmconvert.executor.ranks import RANK, TORCHRUN, WORLD_SIZE, of_torchrun
from mmconvert.names import number
from mmconvert.runtime import trouble
from mmconvert.runtime.device import backend, device, take_device
from mmconvert.runtime.processes import (
    AFTER_FAULT,
    Emit,
    RankJob,
    calm,
    patience,
    spawn,
    start_method,
)

FAILED = "mmconvert/failed"  # key of torchrun's store: what the first failure was


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return TORCHRUN in os.environ or {RANK, WORLD_SIZE, "MASTER_ADDR"} <= set(os.environ)


def leads() -> bool:
    """Whether this process is the one that speaks."""
    return not under_torchrun() or os.environ.get(RANK, "0") == "0"


def replicas_for(world: int) -> int:
    """How many copies of a model of ``world`` ranks run: under torchrun as many as its processes
    make, on accelerators as many as there is room for, one on a CPU.

    Raises:
        RequestError: torchrun's processes are not whole copies.
    """
    if under_torchrun():
        size = of_torchrun().size
        if size % world:
            raise RequestError(
                f"torchrun started {number(size, 'process', 'processes')}",
                f"{world}, one for each rank of the checkpoint, or a multiple of it",
                f"torchrun --nproc-per-node {world} ...",
            )
        return size // world
    here = device()
    return 1 if here.type == "cpu" else max(1, torch.accelerator.device_count() // world)


def launch(job: RankJob, world: int, on_event: Emit) -> object:
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
            f"the checkpoint has {number(world, 'rank')}, this machine "
            f"{number(torch.accelerator.device_count(), f'{here.type} device')}",
            "a device for each rank",
            "resplit the checkpoint to fewer ranks, or use torchrun over several machines",
        )
    return spawn(job, world, on_event, start_method(here))


def _in_torchrun(job: RankJob, world: int, on_event: Emit) -> object:
    size = of_torchrun().size
    if size != world:
        raise RequestError(
            f"torchrun started {number(size, 'process', 'processes')}",
            f"{world}, one for each rank of the checkpoint",
            f"torchrun --nproc-per-node {world} ...",
        )
    where = take_device()
    calm(where)
    store, rank, _ = next(rendezvous("env://"))
    dist.init_process_group(
        backend(where), store=store, rank=rank, world_size=size, timeout=patience(),
        device_id=None if where.type == "cpu" else where,
    )  # fmt: skip
    pulse = trouble.Pulse(rank, size)
    try:
        return job(where, on_event if rank == 0 else _nothing)
    except MMConvertError as error:
        store.set(FAILED, f"process {rank}: {error.what}")
        raise
    except (RuntimeError, MemoryError) as error:
        if (full := trouble.no_memory(error, f"process {rank} of the run")) is not None:
            store.set(FAILED, f"process {rank}: {full.what}")
            raise full from None
        if isinstance(error, MemoryError):
            raise
        # a process whose neighbour has failed cannot reach it
        raise trouble.lost(error, _told(store)) from None
    finally:
        pulse.end()
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
