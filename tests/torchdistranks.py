"""Megatron-core's own distributed checkpoints of its text model, on the CPU, a process a rank."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

import megatron_experts
from megatron_experts import ExpertCase
from megatron_ranks import Case, build, weights_of
from megatron_text import model_parallel, process

KEY = "language_model."
# The norm before experts, without Transformer Engine and with it.
FUSED, BEFORE = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"


def run(rank: int, folder: Path, text: dict[str, Any], cases: list[Case | ExpertCase]) -> None:
    """Loads ``dist`` into a model of each layout, whose weights must be those of the case's rank
    files; saves it as ``CASE.saved``, and with a tensor for each layer, expert and half of a gated
    linear as ``CASE.single``. Leaves the names that differ in a file.
    """
    warnings.simplefilter("ignore")
    with process(rank, folder):
        for case in cases:
            layout = {"ep": case.ep} if isinstance(case, ExpertCase) else {"pp": case.pp}
            with model_parallel(case.tp, **layout):
                differing = _differing(folder, text, case)
                torch.save(differing, folder / f"{case.name}.{rank}.differ")


def _differing(folder: Path, text: dict[str, Any], case: Case | ExpertCase) -> list[str]:
    """The names whose tensors differ in this rank's model of a case, which is saved too."""
    from megatron.core import dist_checkpointing, parallel_state

    tp = parallel_state.get_tensor_model_parallel_rank()
    model, expected = _built(text, case, tp)
    state = {k: v for k, v in model.sharded_state_dict(prefix=KEY).items() if "_extra" not in k}
    for tensor in state.values() if isinstance(case, ExpertCase) else ():
        tensor.key = tensor.key.replace(FUSED, BEFORE)
    loaded: Any = dist_checkpointing.load(state, str(folder / "dist" / "release"))
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
    save(model, folder / f"{case.name}.single", {"singleton_local_shards": True})
    return differing


def _built(text: dict[str, Any], case: Case | ExpertCase, tp: int) -> tuple[Any, dict[str, Any]]:
    """A rank's model, and its weights."""
    from megatron.core import parallel_state

    if isinstance(case, ExpertCase):
        ep = parallel_state.get_expert_model_parallel_rank()
        expected = megatron_experts.weights_of(case, tp, ep)
        return megatron_experts.build(text, case).to(torch.bfloat16), expected
    pp = parallel_state.get_pipeline_model_parallel_rank()
    return build(text, case, pp).to(torch.bfloat16), weights_of(case, tp, pp)


def save(model: Any, out: Path, metadata: dict[str, bool] | None = None) -> None:
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

    whole = model.sharded_state_dict(prefix=KEY, metadata=metadata)
    state = {k: v for k, v in whole.items() if "_extra" not in k}
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
