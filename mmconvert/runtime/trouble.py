"""What has gone wrong in a run of several processes: memory, lost neighbours, stopped processes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from mmconvert.errors import LostProcessError, MMConvertError, RequestError

CUT_OFF = ("Connection", "connection", "gloo", "NCCL", "HCCL")  # in errors of broken collectives
FULL = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
SILENT = 60.0  # seconds that a process may be stopped, or silent, before the run ends
BEAT = 5.0  # seconds between signs of life


def chain(error: BaseException) -> list[BaseException]:
    """An error and what it came from: pipelines wrap what happened in their stages."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def no_memory(error: BaseException, who: str) -> MMConvertError | None:
    """What to say if the memory of the machine or of its device did not suffice."""
    for one in chain(error):
        full = isinstance(one, MemoryError | torch.OutOfMemoryError)
        if full or (isinstance(one, RuntimeError) and any(word in str(one) for word in FULL)):
            text = " ".join(str(one).split())[:160]
            return RequestError(
                f"{who} has run out of memory: {text or 'the system gives no more'}",
                "room for its part of the model, and for what is computed",
                "bf16 in place of fp32, --recompute_granularity full, a smaller micro-batch, "
                "--use_distributed_optimizer, or a resplit to more ranks",
            )
    return None


def lost(error: RuntimeError, told: str) -> Exception:
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


def stopped(pid: int) -> bool:
    """Whether a process of this machine has been stopped by a signal, and not gone on since."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # gone, or a system without /proc
        return False
    return text.rpartition(")")[2].split()[:1] == ["T"]


class ProcessWatch:
    """Looks for stopped processes among those that this one has started.

    Args:
        pids: of the processes, by their numbers in the run.
        say: gets a warning when one is first seen stopped.
    """

    def __init__(self, pids: Sequence[int], say: Callable[[object], None]) -> None:
        self._pids, self._say = pids, say
        self._since: dict[int, float] = {}

    def look(self) -> None:
        """Looks once.

        Raises:
            LostProcessError: one has been stopped for too long; the others wait for it.
        """
        now = time.monotonic()
        for number, pid in enumerate(self._pids):
            if not stopped(pid):
                self._since.pop(number, None)
            elif number not in self._since:
                self._since[number] = now
                self._say(
                    f"warning: process {number} of the run (pid {pid}) is stopped; kill -CONT "
                    f"{pid} lets it go on; otherwise the run ends in {SILENT:.0f} s"
                )
            elif now - self._since[number] > SILENT:
                raise LostProcessError(
                    f"process {number} of the run (pid {pid}) is stopped",
                    "processes that go on",
                    "start it again; --resume goes on from the last checkpoint",
                )


class Pulse:
    """Signs of life between the processes that torchrun has started, through its store.

    Each process looks after the next one. One that is silent for too long ends the run: else the
    others would wait for it until their collective times out.
    """

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._next = rank, (rank + 1) % world
        self._done = threading.Event()
        if world > 1:
            threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        with suppress(Exception):  # a store that is gone says nothing of processes
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store: Any = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
            count, seen, since = 0, b"", time.monotonic()
            while not self._done.wait(BEAT):
                count += 1
                store.set(f"mmconvert/beat/{self._rank}", str(count))
                key = f"mmconvert/beat/{self._next}"
                found = store.get(key) if store.check([key]) else b""
                if found != seen:
                    seen, since = found, time.monotonic()
                elif found and found != b"end" and time.monotonic() - since > SILENT:
                    print(
                        f"error: process {self._next} of the run gives no sign of life for "
                        f"{SILENT:.0f} s: it is stopped, or its machine is",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(LostProcessError.exit_code)
            store.set(f"mmconvert/beat/{self._rank}", "end")

    def end(self) -> None:
        """The process has done its work, and may be silent."""
        self._done.set()
