"""The cost of a training step, against torch's own count of operations in transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmconvert.formats.hf.folder import read_config
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.recognise import family_of
from mmconvert.playground.checkpoints import make_hf
from mmconvert.tools.suggest.cost import Costs, module_costs
from mmconvert.tools.suggest.shapes import config_shapes, stored_shapes
from mmconvert.tools.suggest.workload import Workload, flows, patch_sizes
from tinymodels import CONVERTERS, inputs, save, tiny_model

ENCODER, TEXT = "image_encoder", "text_decoder"
FREEZE = {"nothing": set(), "encoder": {"vit"}, "text": {"llm"}}


@pytest.fixture(scope="module", params=sorted(CONVERTERS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny_model(request.param)
    return model, save(model, tmp_path_factory.mktemp(request.param))


def counted(model: Any, frozen: set[str]) -> int:
    """Operations of forward and backward, as torch counts them while they run."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(("vit" if "visual" in name else "llm") not in frozen)
    model.zero_grad()
    model.set_experts_implementation("eager")  # torch does not count its grouped products
    with FlopCounterMode(display=False) as counter:
        model(**inputs()).logits.sum().backward()
    counts = counter.get_flop_counts()
    rotary = {name: ops for name, ops in counts.items() if name.endswith("rotary_emb")}
    return sum(counts["Global"].values()) - sum(sum(ops.values()) for ops in rotary.values())


def costs_of(folder: Path, frozen: set[str], *, stored: bool = True) -> list[Costs]:
    """Our costs for the same sample: the formula's causal attention made the full one of eager."""
    config, family = read_config(folder), family_of(folder)
    model = config_model(family, folder)
    sizes = patch_sizes(model, config)
    tokens = inputs()["input_ids"].shape[1]
    flow = flows(model, sizes, Workload(seq_length=tokens, image_tokens=16))
    flow["llm"] = flow["llm"]._replace(pairs=tokens * tokens)
    if stored:
        model, wholes = stored_shapes(family, folder)
    else:
        wholes, warnings = config_shapes(model, config, sizes)
        assert warnings == []
    return module_costs(model, wholes, {"vit": 1, "llm": 1}, flow, frozen)


def total(costs: list[Costs], frozen: set[str]) -> int:
    vit, llm = costs
    chains = vit.chain("flops", gradient=False), llm.chain("flops", gradient="vit" not in frozen)
    return sum(chain.total for chain in chains)


@pytest.mark.parametrize("freeze", FREEZE)
def test_a_step_costs_what_torch_counts(tiny: Any, freeze: str) -> None:
    model, folder = tiny
    frozen = FREEZE[freeze]
    want, got = counted(model, frozen), total(costs_of(folder, frozen), frozen)
    # The vision attention is the mean of its layers, rounded down.
    assert want - 100 < got <= want


def test_frozen_parts_cost_less(tiny: Any) -> None:
    _, folder = tiny
    cost = {name: total(costs_of(folder, f), f) for name, f in FREEZE.items()}
    assert cost["text"] < cost["nothing"] and cost["encoder"] < cost["nothing"]


def test_config_alone_tells_the_same_as_the_headers(tiny: Any) -> None:
    _, folder = tiny
    here, there = costs_of(folder, set()), costs_of(folder, set(), stored=False)
    for part in ("before", "layer", "after"):
        for a, b in zip(here, there, strict=True):
            one, other = getattr(a, part), getattr(b, part)
            assert (one.matmul, one.attention, one.parameters) == (
                *(other.matmul, other.attention, other.parameters),
            )


def test_parameters_are_those_of_the_model(tiny: Any) -> None:
    model, folder = tiny
    chains = [costs.chain("parameters", gradient=False) for costs in costs_of(folder, set())]
    assert sum(c.total for c in chains) == sum(p.numel() for p in model.parameters())


AUDIO: dict[str, Any] = {
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "n_window": 10,
}


@pytest.mark.parametrize("tokens", [30, 33], ids=["whole chunks", "a rest"])
def test_the_audio_encoder_costs_what_torch_counts(tokens: int, tmp_path: Path) -> None:
    from transformers import Qwen2_5OmniAudioEncoderConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

    folder = make_hf(
        "qwen2.5omni-7b",
        tmp_path / "hf",
        edit_config=lambda c: {
            **c,
            "thinker_config": {**c["thinker_config"], "audio_config": dict(AUDIO)},
        },
    )
    config, family = read_config(folder), family_of(folder)
    model = config_model(family, folder)
    sizes = patch_sizes(model, config)
    wholes, _ = config_shapes(model, config, sizes)
    flow = flows(model, sizes, Workload(audio_tokens=tokens))
    costs = module_costs(model, wholes, {"vit": 1, "audio": 1, "llm": 1}, flow, {"audio"})
    ours = next(c for c in costs if c.key == "audio")

    hidden = model.dims["llm.hidden"]
    encoder_config = Qwen2_5OmniAudioEncoderConfig(**AUDIO, output_dim=hidden)
    encoder_config._attn_implementation = "eager"
    encoder = Qwen2_5OmniAudioEncoder(encoder_config)
    frames = torch.randn(16, 4 * tokens)  # two frames a position, two positions a token
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(frames, feature_lens=torch.tensor([4 * tokens]))
    padding = -4 * tokens % 20  # the library pads the last chunk of frames for its convolutions
    per_frame = ours.before.matmul / (4 * tokens)
    want = counter.get_total_flops() - round(per_frame * padding)
    assert ours.chain("flops", gradient=False).total == want
