"""Megatron-core's own text model with experts on converted weights, on two processes on the CPU.

Run by test_megatron_experts.py; a module of its own since forked processes import it by name.
Nothing of mmconvert is used here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_text import (
    expert_count,
    expert_options,
    model_parallel,
    process,
    text_config,
    text_of,
)


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
    return text_of(case.mm / "release" / folder / "model_optim_rng.pt")


def build(text: dict[str, Any], case: ExpertCase) -> torch.nn.Module:
    """GPTModel with local experts and norms of q and k."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    experts = expert_count(text)
    config = text_config(text, **expert_options(text, case.tp, case.ep))
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
    from megatron.core import parallel_state

    with process(rank, folder):
        ids = torch.load(folder / "ids.pt", weights_only=True)
        for case in cases:
            with model_parallel(case.tp, ep=case.ep):
                tp = parallel_state.get_tensor_model_parallel_rank()
                ep = parallel_state.get_expert_model_parallel_rank()
                found = logits_of(build(text, case).eval(), weights_of(case, tp, ep), ids)
                torch.save(found, folder / f"{case.name}.{rank}.pt")


def logits_of(
    model: Any, weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> tuple[list[str], list[str], torch.Tensor]:
    """The names that did not fit, missing and unexpected, and the logits."""
    # strict=False only in order to report every name; the test wants none.
    loaded = model.load_state_dict(weights, strict=False)
    length = ids.shape[1]
    masked = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    positions = torch.arange(length)[None].expand_as(ids)
    with torch.no_grad():
        logits = model(ids, positions, masked)
    return list(loaded.missing_keys), list(loaded.unexpected_keys), logits
