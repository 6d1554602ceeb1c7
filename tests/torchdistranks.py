"""Megatron-core's own distributed checkpoints of its text model, on the CPU, a process a rank."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ranks import WORLD, Case, build, weights_of

KEY = "language_model."


def run(rank: int, folder: Path, text: dict[str, Any], cases: list[Case]) -> None:
    """Loads ``dist`` into a model of each layout, whose weights must be those of the case's rank
    files; saves it as ``CASE.saved``. Leaves the names that differ in a file.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue] - Megatron asks
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    for case in cases:
        parallel_state.initialize_model_parallel(case.tp, case.pp)
        tp = parallel_state.get_tensor_model_parallel_rank()
        pp = parallel_state.get_pipeline_model_parallel_rank()
        model: Any = build(text, case, pp).to(torch.bfloat16)
        state = {k: v for k, v in model.sharded_state_dict(prefix=KEY).items() if "_extra" not in k}
        loaded: Any = dist_checkpointing.load(state, str(folder / "dist" / "release"))
        expected = weights_of(case, tp, pp)
        found = {k.removeprefix(KEY): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
        differing = [
            name
            for name in {*expected, *found}
            if name not in found
            or name not in expected
            or not torch.equal(found[name], expected[name].to(found[name].dtype))
        ]
        model.load_state_dict(found, strict=False)
        save(model, folder / f"{case.name}.saved")
        torch.save(differing, folder / f"{case.name}.{rank}.differ")
        parallel_state.destroy_model_parallel()
        dist.barrier()
    dist.destroy_process_group()


def save(model: Any, out: Path) -> None:
    """As Megatron-core saves it, but for its writer, which asks for CUDA: its tensors in torch's
    own.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save_state_dict

    state = {k: v for k, v in model.sharded_state_dict(prefix=KEY).items() if "_extra" not in k}
    apply_factories(state)
    assert all(isinstance(value, ShardedTensor) for value in nested_values(state))
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(state, True)
    plain = mcore_to_pyt_state_dict(flat, False)
    save_state_dict(
        plain,
        FileSystemWriter(out),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    (out / "common.pt").touch()
