"""The recorded numbers of a small Qwen-VL, and what the runtime computes in their place."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml

from mmconvert.playground.qwenvl import PlaygroundSizes
from mmconvert.runtime.qwenvl import weights
from mmconvert.runtime.qwenvl.model import QwenVLModel
from mmconvert.runtime.qwenvl.sizes import Positions
from qwenvl import make_qwenvl

FOLDER = Path(__file__).parent / "golden" / "qwenvl_runtime"
RECORDED = PlaygroundSizes(
    hidden=256, heads=4, layers=3, inter=176, vocab=482, width=64, vision_heads=4, vision_layers=2
)
PAD = 256
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
VISION, LOGITS = 1e-5, 5e-5  # what rounding may do


@cache
def arrays() -> dict[str, np.ndarray]:
    """Everything that is recorded; see README.md beside the file."""
    with np.load(FOLDER / "outputs.npz") as file:
        return dict(file)


def recorded(name: str) -> torch.Tensor:
    """A recorded array; ids and positions as int64, pictures normalised."""
    found = torch.from_numpy(arrays()[name])
    if name.startswith("pixels"):
        return (found.float() / 255 - MEAN) / STD
    return found if found.is_floating_point() else found.long()


def make(folder: Path, **settings: object) -> Path:
    """The checkpoint that the numbers are of, with the tokenizer of one-byte tokens."""
    plain = {"seq_length": 2048, "use_dynamic_ntk": True, "use_logn_attn": True}
    make_qwenvl(folder, RECORDED, settings={**plain, **settings})
    (folder / "qwen.tiktoken").write_bytes((FOLDER / "bytes.tiktoken").read_bytes())
    return folder


def load(path: Path, positions: Positions = "hub", config: Path | None = None) -> QwenVLModel:
    """The model in fp32 on the CPU."""
    sizes = weights.settled(weights.sizes_of(config or path), positions)
    return weights.load(sizes, path, torch.float32, torch.device("cpu"))


def away(found: torch.Tensor, name: str, every: int = 1) -> float:
    """The largest difference to a recorded array that has every so many rows."""
    return float((found[:, ::every] - recorded(name)).abs().max())


def short(model: QwenVLModel, length: int) -> QwenVLModel:
    """The model as if it had been trained on texts of another length."""
    model.sizes = replace(model.sizes, trained=length)
    return model


@torch.no_grad()
def mindformers(model: QwenVLModel) -> dict[str, float]:
    """How far the model is from MindFormers' numbers, each by its limit: above 1 is too far."""
    pixels, pos = recorded("pixels")[:1], recorded("one_pos")[0]
    found = {
        "vision": away(model.transformer.visual(pixels), "vis_out_every8", 8) / VISION,
        "picture": away(model(recorded("one_ids"), pixels, pos), "one_logits_every8", 8) / LOGITS,
    }
    for name in ("text", "pad", "leftpad"):
        ids = recorded(f"{name}_ids")
        found[name] = away(model(ids, keep=ids != PAD), f"{name}_logits") / LOGITS
    return found


def yaml_of(text: str) -> dict[object, object]:
    """A YAML file's content."""
    return yaml.safe_load(text)
