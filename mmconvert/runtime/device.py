"""The device that this machine computes on, and the engine that its processes talk through."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from mmconvert.errors import RequestError
from mmconvert.runtime.needs import DEVICE

KNOWN = ("cuda", "npu")  # accelerators that have an engine for their processes to talk through


def device() -> torch.device:
    """What ``--device`` says: the accelerator that is there, or the CPU.

    Raises:
        RequestError: the accelerator that was asked for is not there.
    """
    asked = os.environ.get(DEVICE, "auto")
    found = torch.accelerator.current_accelerator(check_available=True)
    if asked == "cpu" or (asked == "auto" and (found is None or found.type not in KNOWN)):
        return torch.device("cpu")
    if found is None or (asked != "auto" and found.type != asked):
        there = "none" if found is None else found.type
        raise RequestError(
            f"--device {asked}: torch finds no such device; it finds {there}",
            f"a build of torch for {asked}, and its driver",
            "--device cpu",
        )
    return found


def backend(where: torch.device) -> str:
    """The process-group backend of a device: gloo (cpu), nccl (cuda), hccl (npu)."""
    return dist.get_default_backend_for_device(where)


def take_device() -> torch.device:
    """The device of this process, by LOCAL_RANK."""
    where = device()
    if where.type == "cpu":
        return where
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.accelerator.set_device_index(index)
    return torch.device(where.type, index)
