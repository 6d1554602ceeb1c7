"""The reference of a validation: right to the bit, and never whole in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import talking
import tinyfamilies
from mmconvert.errors import TensorError
from mmconvert.runtime import inputs, reference
from mmconvert.runtime.families import architecture
from mmconvert.runtime.hfweights import layers_of

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_transformers_own(
    dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    hf = tinyfamilies.make("qwen2_5_vl", tmp_path / "hf", tied=tied)
    arch = architecture(hf)
    model, weights = reference.load_reference(arch, hf, dtype, CPU)
    whole = arch.model_class().from_pretrained(hf, config=arch.config, dtype=dtype).eval()
    batch = inputs.synthetic(arch)
    ours, theirs = (reference.forward(arch, m, batch) for m in (model, whole))
    assert torch.equal(ours, theirs)
    for logits in (ours, theirs):
        logits.float().square().mean().backward()
    parts, others = arch.parts(model), arch.parts(whole)
    for layers, same in zip(layers_of(parts), layers_of(others), strict=True):
        for number, (layer, other) in enumerate(zip(layers, same, strict=True)):
            inner = 0 < number < len(layers) - 1
            named = dict(other.named_parameters())
            for name, parameter in layer.named_parameters():
                assert parameter.is_meta == inner  # it had its weights while it computed
                assert torch.equal(weights.value(parameter), named[name].detach())
                if not inner:
                    assert torch.equal(parameter.grad, named[name].grad)
    assert (parts.owner.lm_head.weight is parts.text.embed_tokens.weight) == tied


OWN_NAMES = {  # on the hub, and as the class has it
    "vision_tower.layernorm.weight": "model.vision_tower.layernorm.weight",
    "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
    "language_model.model.norm.weight": "model.language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
}


@pytest.mark.parametrize("name", OWN_NAMES)
def test_internvls_names_of_the_hub_and_of_its_class_are_one(name: str) -> None:
    assert reference.own_name(name) == OWN_NAMES[name]
    assert reference.own_name(OWN_NAMES[name]) == OWN_NAMES[name]


def test_a_folder_of_another_size_is_refused(tmp_path: Path) -> None:
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    path = hf / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 96', '"intermediate_size": 128'))
    with pytest.raises(TensorError, match="has shape"):
        reference.load_reference(architecture(hf), hf, torch.float32, CPU)


@pytest.mark.slow
def test_equal_says_that_both_sides_read_one_config(tmp_path: Path) -> None:
    """A wrong epsilon is wrong on both sides."""
    hf = talking.make("qwen2_vl", tmp_path / "hf")
    mm = tinyfamilies.convert("qwen2_vl", hf, tmp_path / "mm", "[4]", "[3]")
    path = hf / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    path.write_text(json.dumps(config))
    commands = talking.commands
    report = commands.validate(mm, hf, "", (), (), "fp32", 0.0, lambda event: None)
    assert report.passed
    assert any("both sides read" in note and "config.json" in note for note in report.notes)
