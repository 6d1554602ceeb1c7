"""The device that this machine computes on, and the engine that its processes talk through."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def device() -> torch.device:
    """The accelerator that is there (npu, cuda, ...), else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


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
