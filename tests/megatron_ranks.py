"""Megatron-core's own text model on converted weights, one process for each rank, on the CPU.

Run by test_megatron_oracle.py with `torch.multiprocessing`; a module of its own since spawned
processes import it by name. Nothing of mmconvert is used here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_text import model_parallel, process, text_config, text_of


class Case(NamedTuple):
    """An MM checkpoint and how Megatron is to run it.

    Attributes:
        name: names the result file.
        mm: the checkpoint.
        tp, pp: parallel sizes of Megatron's run.
        stages: text layers by pipeline rank.
        joined: the pipeline stages are put together into one model (then pp is 1).
        tied: the model uses the word embedding as its output layer.
    """

    name: str
    mm: Path
    tp: int
    pp: int
    stages: list[int]
    joined: bool = False
    tied: bool = False


class Outcome(NamedTuple):
    """What one rank found; logits only on ranks that end the model."""

    missing: list[str]
    unexpected: list[str]
    logits: torch.Tensor | None


def read_text(case: Case, tp: int, pp: int) -> dict[str, torch.Tensor]:
    """The text decoder in one rank file, without its prefix."""
    folder = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if len(case.stages) > 1 else "")
    return text_of(case.mm / "release" / folder / "model_optim_rng.pt")


def weights_of(case: Case, tp: int, pp: int) -> dict[str, torch.Tensor]:
    """The weights of one rank; joined, those of all stages with their layers renumbered."""
    if not case.joined:
        return read_text(case, tp, pp)
    found: dict[str, torch.Tensor] = {}
    for stage in range(len(case.stages)):
        for name, tensor in read_text(case, tp, stage).items():
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                words[2] = str(int(words[2]) + sum(case.stages[:stage]))
            if ".".join(words) in found:
                raise ValueError(f"{name} stands on two stages")
            found[".".join(words)] = tensor
    return found


def build(text: dict[str, Any], case: Case, pp: int) -> torch.nn.Module:
    """Megatron's text model, or one pipeline stage of it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    pipeline: dict[str, Any] = {}
    if case.pp > 1:
        pipeline = {
            "pipeline_model_parallel_size": case.pp,
            "pipeline_dtype": torch.float32,
            "num_layers_in_first_pipeline_stage": case.stages[0],
            "num_layers_in_last_pipeline_stage": case.stages[-1],
        }
    rope = text["rope_parameters"]
    config = text_config(
        text,
        num_layers=sum(case.stages),
        tensor_model_parallel_size=case.tp,
        mrope_section=rope["mrope_section"],
        **pipeline,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=text["vocab_size"],
        max_sequence_length=text["max_position_embeddings"],
        pre_process=pp == 0,
        post_process=pp == case.pp - 1,
        parallel_output=False,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="mrope",
        rotary_base=int(rope["rope_theta"]),
    )


def forward(
    model: Any, case: Case, pp: int, ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | None:
    """The logits, [batch, sequence, vocabulary], on the last stage."""
    length = ids.shape[1]
    masked = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    shape = (length, ids.shape[0], model.config.hidden_size)
    if pp > 0:
        received = torch.empty(shape)
        dist.recv(received, pp - 1)
        model.set_input_tensor(received)
    with torch.no_grad():
        out = model(ids, positions, masked)
    if pp < case.pp - 1:
        assert out.shape == shape
        dist.send(out.contiguous(), pp + 1)
        return None
    return out


def run(rank: int, folder: Path, text: dict[str, Any], cases: list[Case]) -> None:
    """One rank of all cases; leaves an Outcome in `folder` for each."""
    from megatron.core import parallel_state

    with process(rank, folder):
        given = torch.load(folder / "inputs.pt", weights_only=True)
        for case in cases:
            with model_parallel(case.tp, case.pp):
                tp = parallel_state.get_tensor_model_parallel_rank()
                pp = parallel_state.get_pipeline_model_parallel_rank()
                model = build(text, case, pp).eval()
                # strict=False only in order to report every name; the test wants none.
                loaded = model.load_state_dict(weights_of(case, tp, pp), strict=False)
                logits = forward(model, case, pp, given["ids"], given["positions"])
                outcome = Outcome(list(loaded.missing_keys), list(loaded.unexpected_keys), logits)
                torch.save(tuple(outcome), folder / f"{case.name}.{rank}.pt")
