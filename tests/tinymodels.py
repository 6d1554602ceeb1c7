"""Tiny models of the transformers library itself, with random weights.

Nothing of mmconvert is used here. All parameters are set from a seed, biases and norms too,
since the library's own initialisation leaves them at 0 and 1, where a mix-up would not show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CONVERTERS = {"qwen2_vl": "Qwen2VLConverter", "qwen2_5_vl": "Qwen2_5_VLConverter"}
CONVERTERS |= dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), "Qwen3VLMegatronConverter")
CONVERTERS |= {"glm4v": "GlmConverter"}
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


# Of each kind: the prefix of its classes in transformers, and what differs in its parts.
CLASSES = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "glm4v": "Glm4v",
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 4},
    "qwen2_5_vl": {"hidden_size": 32, "intermediate_size": 44, "window_size": 56,
                   "fullatt_block_indexes": [1], "out_hidden_size": 64},
    "qwen3_vl": {"hidden_size": 32, "intermediate_size": 44, "num_position_embeddings": 36,
                 "deepstack_visual_indexes": [0, 1, 2], "out_hidden_size": 64},
    "glm4v": {"hidden_size": 32, "intermediate_size": 44, "image_size": 84, "out_hidden_size": 64},
}  # fmt: skip
VISION["qwen3_vl_moe"] = {**VISION["qwen3_vl"], "deepstack_visual_indexes": [0, 2]}
MORE_TEXT: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"head_dim": 16, "num_attention_heads": 4},
    "qwen3_vl_moe": {"head_dim": 16, "num_attention_heads": 4, "num_experts": 8,
                     "num_experts_per_tok": 3, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
}  # fmt: skip


def tiny_model(
    kind: str, *, tied: bool = False, dtype: torch.dtype = torch.float32, **text: Any
) -> Any:
    """A model of `kind`, a key of CONVERTERS; `text` are further words of its text_config."""
    import transformers

    prefix = CLASSES[kind]
    made = {**TEXT, **MORE_TEXT.get(kind, {}), **text, "tie_word_embeddings": tied}
    if kind.startswith("qwen3"):
        made["rope_parameters"] = {**TEXT["rope_parameters"], "mrope_section": [4, 2, 2]}
    ends = {"vision_start_token_id": START, "vision_end_token_id": END}
    if kind == "glm4v":
        ends = {"image_start_token_id": START, "image_end_token_id": END}
    config = getattr(transformers, f"{prefix}Config")(
        text_config=made,
        vision_config={**PATCHES, **VISION[kind]},
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **ends,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
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
