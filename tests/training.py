"""Checkpoints as training leaves them: later text layers moved more, the vision encoder frozen."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from commands import copied
from mmconvert.playground.checkpoints import make_hf


def make_base(out: Path) -> Path:
    """Qwen2-VL with 12 text and 8 vision layers."""
    return make_hf("qwen2vl-2b", out, layers=12, vit_layers=8)


def make_trained(base: Path, out: Path) -> Path:
    """`base` with its projector and its text decoder moved; exact steps, so always the same."""
    copied(base, out)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if not (layer or "merger.mlp" in name) or "norm" in name:
                continue
            rate = 2.0**-11 * (1 + int(layer[1]) if layer else 2)
            steps = ((torch.arange(tensor.numel()) * 31) % 17 - 8).reshape(tensor.shape)
            tensors[name] = (tensor.float() + steps * rate / 4).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return out
