"""Processes of torch.distributed that save and load DCP folders, as trainers do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

State = dict[str, Any]


def run(ranks: int, work: Callable[..., None], *args: object) -> None:
    """Runs ``work(rank, ranks, *args)`` in that many processes."""
    folder = Path(str(args[0])).parent
    init = folder / f"init-{work.__name__}-{ranks}"
    given = (ranks, f"file://{init}", work, args)
    # Forked: torch takes ten seconds to import anew in each.
    mp.start_processes(  # pyright: ignore[reportPrivateImportUsage] - torch's own documentation
        _started, given, nprocs=ranks, start_method="fork"
    )


def _started(rank: int, ranks: int, init: str, work: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks)
    try:
        work(rank, ranks, *args)
    finally:
        dist.destroy_process_group()


def mesh_of(ranks: int, how: str) -> DeviceMesh:
    """``rows``: FSDP2; ``both``: with tensor parallelism of 2."""
    sizes = (ranks,) if how == "rows" else (ranks // 2, 2)
    return init_device_mesh("cpu", sizes)


def divided(tensor: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor as a rank holds it: its rows, and of a matrix its columns, as torch.chunk cuts."""
    places = [Shard(dim) if tensor.dim() > dim else Replicate() for dim in range(mesh.ndim)]
    if tensor.dim() != 2:
        places[1:] = [Replicate()] * (mesh.ndim - 1)
    local = tensor
    for dim, place in enumerate(places):
        if isinstance(place, Shard):
            parts = torch.chunk(local, mesh.size(dim), dim)
            own = mesh.get_local_rank(dim)
            empty = local.narrow(dim, 0, 0)
            local = parts[own] if own < len(parts) else empty
    return DTensor.from_local(
        local.contiguous(),
        mesh,
        places,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def save(rank: int, ranks: int, folder: str, source: str, how: str, threads: int) -> None:
    """Saves the tensors of a torch file, divided."""
    mesh, whole = mesh_of(ranks, how), torch.load(source, weights_only=True)
    state = {name: divided(tensor, mesh) for name, tensor in whole.items()}
    writer = dcp.filesystem.FileSystemWriter(folder, thread_count=threads)
    dcp.state_dict_saver.save({"model": state, "checkpoint_version": 3.0}, storage_writer=writer)


def load(rank: int, ranks: int, folder: str, source: str, how: str) -> None:
    """Loads a folder into divided tensors; they must be those of a torch file."""
    mesh, whole = mesh_of(ranks, how), torch.load(source, weights_only=True)
    state = {name: divided(torch.zeros_like(tensor), mesh) for name, tensor in whole.items()}
    dcp.state_dict_loader.load({"model": state}, checkpoint_id=folder)
    for name, tensor in whole.items():
        assert torch.equal(state[name].to_local(), divided(tensor, mesh).to_local()), name
