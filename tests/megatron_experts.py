"""Megatron-core's own text model with experts on converted weights, on two processes on the CPU.

Run by test_megatron_experts.py; a module of its own since forked processes import it by name.
Nothing of mmconvert is used here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

PREFIX = "text_decoder."
WORLD = 2


class ExpertCase(NamedTuple):
    """An MM checkpoint, and the sizes that Megatron runs it with."""

    mm: Path
    tp: int
    ep: int

    @property
    def name(self) -> str:
        return f"tp{self.tp} ep{self.ep}"


def weights_of(case: ExpertCase, tp: int, ep: int) -> dict[str, torch.Tensor]:
    """The text decoder in one rank file, without its prefix."""
    folder = f"mp_rank_{tp:02d}" + (f"_{ep:03d}" if case.ep > 1 else "")
    path = case.mm / "release" / folder / "model_optim_rng.pt"
    weights = torch.load(path, weights_only=True)["model"]
    return {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}


def build(text: dict[str, Any], case: ExpertCase) -> torch.nn.Module:
    """GPTModel with local experts and norms of q and k."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = text.get("num_experts") or text["num_local_experts"]
    config = TransformerConfig(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        num_attention_heads=text["num_attention_heads"],
        num_query_groups=text["num_key_value_heads"],
        kv_channels=text["head_dim"],
        ffn_hidden_size=text["intermediate_size"],
        num_moe_experts=experts,
        moe_ffn_hidden_size=text["moe_intermediate_size"],
        moe_router_topk=text["num_experts_per_tok"],
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        moe_grouped_gemm=False,
        tensor_model_parallel_size=case.tp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.tp,
        sequence_parallel=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        normalization="RMSNorm",
        layernorm_epsilon=text["rms_norm_eps"],
        qk_layernorm=True,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
        ),
        vocab_size=text["vocab_size"],
        max_sequence_length=text["max_position_embeddings"],
        parallel_output=False,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=int(text["rope_parameters"]["rope_theta"]),
    )


def run(rank: int, folder: Path, text: dict[str, Any], cases: list[ExpertCase]) -> None:
    """One rank of all cases; leaves names that did not fit, and logits."""
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue] - the rotary embedding asks
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.moe import moe_utils

    # Without Transformer Engine this name is asked for and never defined.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    initialize_rng_tracker(inference_rng_tracker=True)
    ids = torch.load(folder / "ids.pt", weights_only=True)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    for case in cases:
        parallel_state.initialize_model_parallel(
            case.tp, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.tp
        )
        tp = parallel_state.get_tensor_model_parallel_rank()
        ep = parallel_state.get_expert_model_parallel_rank()
        model = build(text, case).eval()
        # strict=False only in order to report every name; the test wants none.
        loaded = model.load_state_dict(weights_of(case, tp, ep), strict=False)
        length = ids.shape[1]
        masked = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
        positions = torch.arange(length)[None].expand_as(ids)
        with torch.no_grad():
            logits = model(ids, positions, masked)
        found = (list(loaded.missing_keys), list(loaded.unexpected_keys), logits)
        torch.save(found, folder / f"{case.name}.{rank}.pt")
        parallel_state.destroy_model_parallel()
        dist.barrier()
    dist.destroy_process_group()
