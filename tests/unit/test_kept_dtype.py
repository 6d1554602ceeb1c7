"""The correction bias of a router stays in fp32, whatever --dtype says."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mmconvert import converters
from mmconvert.config import HFConfig, HFToMM, MMToHF, Options
from mmconvert.directions.mm import hf_to_mm, mm_to_hf
from mmconvert.playground.checkpoints import make_hf

BIAS = "language.model.layers.1.mlp.gate.e_score_correction_bias"
FAMILY = converters.load("DeepSeekVLConverter")


def test_no_cast_touches_the_correction_bias(tmp_path: Path) -> None:
    hf = make_hf("deepseekvl2", tmp_path / "hf", shards=1)
    path = hf / "model.safetensors"
    tensors = {
        name: torch.randn(t.shape, dtype=torch.float32) if "correction_bias" in name else t
        for name, t in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    hf_to_mm(FAMILY, HFToMM(tmp_path / "mm", HFConfig(hf)), Options(dtype="fp16"))
    file = tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    part = torch.load(file, weights_only=True)["model"]
    held = part["text_decoder.decoder.layers.1.mlp.router.expert_bias"]
    assert torch.equal(held, tensors[BIAS])
    assert {t.dtype for name, t in part.items() if "expert_bias" not in name} == {torch.float16}
    back = tmp_path / "back"
    mm_to_hf(FAMILY, MMToHF(back, tmp_path / "mm", HFConfig(hf)), Options(dtype="bf16"))
    found = load_file(back / "model.safetensors")
    assert torch.equal(found[BIAS], tensors[BIAS])
    assert found["language.lm_head.weight"].dtype == torch.bfloat16
