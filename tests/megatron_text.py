"""Megatron-core's text model on MM checkpoints, and the processes that run it on the CPU.

Modules of their own have what each process does, since forked and spawned ones import it by name.
Nothing of mmconvert is used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PREFIX = "text_decoder."
WORLD = 2


def text_of(rank_file: Path) -> dict[str, torch.Tensor]:
    """The text decoder in a rank file, without its prefix."""
    weights = torch.load(rank_file, weights_only=True)["model"]
    return {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}


def text_config(text: dict[str, Any], **more: Any) -> Any:
    """Megatron's options for a text_config of transformers: RMS norms, gated linears."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": text["num_hidden_layers"],
        "hidden_size": text["hidden_size"],
        "num_attention_heads": text["num_attention_heads"],
        "num_query_groups": text["num_key_value_heads"],
        "ffn_hidden_size": text["intermediate_size"],
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": text["rms_norm_eps"],
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**{**options, **more})


def expert_count(text: dict[str, Any]) -> int:
    """The experts of a layer; 0 without any."""
    return text.get("num_experts") or text.get("num_local_experts") or 0


def expert_options(text: dict[str, Any], tp: int, ep: int) -> dict[str, Any]:
    """Megatron's options for local experts, and norms of q and k."""
    from megatron.core.transformer.moe import moe_utils

    # Without Transformer Engine this name is asked for and never defined.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    return {
        "kv_channels": text["head_dim"],
        "num_moe_experts": expert_count(text),
        "moe_ffn_hidden_size": text["moe_intermediate_size"],
        "moe_router_topk": text["num_experts_per_tok"],
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": tp,
        "sequence_parallel": tp > 1 and ep > 1,  # Megatron before 0.13 wants it then
        "qk_layernorm": True,
        "add_qkv_bias": False,
    }


@contextmanager
def process(rank: int, folder: Path, world: int = WORLD) -> Iterator[None]:
    """One process of several, which meet in a folder."""
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue] - Megatron asks
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    yield
    dist.destroy_process_group()


@contextmanager
def model_parallel(tp: int, pp: int = 1, virtual: int | None = None, ep: int = 0) -> Iterator[None]:
    """Megatron's groups of a layout, while a case is run; with experts (``ep``) theirs too."""
    from megatron.core import parallel_state

    experts: Any = {}
    if ep:
        experts = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": tp}
    parallel_state.initialize_model_parallel(tp, pp, virtual, **experts)
    yield
    parallel_state.destroy_model_parallel()
    dist.barrier()
