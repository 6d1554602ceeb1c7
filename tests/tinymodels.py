"""Tiny models of the transformers library itself, with random weights.

Nothing of mmconvert is used here. All parameters are set from a seed, biases and norms too,
since the library's own initialisation leaves them at 0 and 1, where a mix-up would not show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CONVERTERS = {"qwen2_vl": "Qwen2VLConverter", "qwen2_5_vl": "Qwen2_5_VLConverter"}
VIT_LAYERS, TEXT_LAYERS = 3, 4
VOCAB = 320
IMAGE, VIDEO, START, END = 301, 302, 303, 304

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": TEXT_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    },
}
PATCHES: dict[str, Any] = {
    "depth": VIT_LAYERS,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def tiny_model(kind: str, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A model of `kind`, a key of CONVERTERS."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    if kind == "qwen2_vl":
        vision = {**PATCHES, "embed_dim": 32, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 4}
        classes: tuple[Any, Any] = (Qwen2VLConfig, Qwen2VLForConditionalGeneration)
    else:
        vision = {
            **PATCHES,
            "hidden_size": 32,
            "out_hidden_size": TEXT["hidden_size"],
            "intermediate_size": 44,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        classes = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
    config_class, model_class = classes
    config = config_class(
        text_config={**TEXT, "tie_word_embeddings": tied},
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
            if "norm" in name or "ln_q" in name:
                parameter += 1
    return model.to(dtype)


def save(model: Any, folder: Path, max_shard_size: str = "5GB") -> Path:
    """The model as the library's `save_pretrained` writes it."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def inputs() -> dict[str, Any]:
    """A sentence with an image of 8 x 8 patches, 16 image tokens."""
    generator = torch.Generator().manual_seed(11)
    words = torch.randint(5, 300, (1, 12), generator=generator)
    picture = torch.full((1, 16), IMAGE)
    start, end = torch.tensor([[START]]), torch.tensor([[END]])
    ids = torch.cat([words[:, :4], start, picture, end, words[:, 4:]], dim=1)
    pixels = torch.randn(64, 3 * 2 * 14 * 14, generator=generator)
    batch: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return batch
