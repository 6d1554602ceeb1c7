"""Tiny models with experts of the transformers library itself, with random weights.

Nothing of mmconvert is used here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tinyfamilies import randomise

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 16,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}


def qwen3vl_moe(**text: Any) -> Any:
    """Qwen3-VL with experts."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    vision = {**VISION, "intermediate_size": 24, "deepstack_visual_indexes": [0, 2]}
    vision |= {"num_position_embeddings": 16}
    config = Qwen3VLMoeConfig(
        text_config={**TEXT, "rope_parameters": ROPE, "num_experts": 8, **text},
        vision_config=vision,
        tie_word_embeddings=False,
    )
    return _made(Qwen3VLMoeForConditionalGeneration, config)


def glm45v(**more: Any) -> Any:
    """GLM-4.5V; its first layer is dense."""
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    text = {**TEXT, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    text |= more
    config = Glm4vMoeConfig(
        text_config={**text, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        vision_config={**VISION, "intermediate_size": 24, "image_size": 56},
        tie_word_embeddings=False,
    )
    return _made(Glm4vMoeForConditionalGeneration, config)


def internvl_moe(**more: Any) -> Any:
    """InternVL3.5 with experts, in transformers' own class."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen3MoeConfig

    del more  # no sections of rotary positions
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"intermediate_size": 24, "image_size": [28, 28], "patch_size": [14, 14]}
    text = Qwen3MoeConfig(**TEXT, num_experts=8)
    config = InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    return _made(InternVLForConditionalGeneration, config)


def _thinker(more: dict[str, Any]) -> dict[str, Any]:
    """The parts of Qwen3-Omni's thinker."""
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 4}
    audio |= {"encoder_ffn_dim": 16, "output_dim": 32, "downsample_hidden_size": 8}
    vision = {**VISION, "intermediate_size": 24, "deepstack_visual_indexes": [0, 2]}
    return {
        "text_config": {**TEXT, "rope_parameters": ROPE, "num_experts": 8, **more},
        "vision_config": {**vision, "num_position_embeddings": 16},
        "audio_config": audio,
    }


def omni3_thinker(**more: Any) -> Any:
    """The thinker of Qwen3-Omni."""
    from transformers import (
        Qwen3OmniMoeThinkerConfig,
        Qwen3OmniMoeThinkerForConditionalGeneration,
    )

    config = Qwen3OmniMoeThinkerConfig(**_thinker(more))
    return _made(Qwen3OmniMoeThinkerForConditionalGeneration, config)


def omni3(**more: Any) -> Any:
    """Qwen3-Omni with its speech parts, whose talker has experts too."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    text = {**TEXT, "rope_parameters": ROPE, "num_experts": 4, **more}
    text |= {"shared_expert_intermediate_size": 24}
    code = {**TEXT, "num_code_groups": 2, "num_hidden_layers": 1}
    wav = {**TEXT, "num_hidden_layers": 1, "decoder_dim": 32, "codebook_size": 16}
    talker = {"text_config": text, "code_predictor_config": code, "thinker_hidden_size": 32}
    talker |= {"num_code_groups": 2, "accept_hidden_layer": 1, "spatial_merge_size": 2}
    config = Qwen3OmniMoeConfig(
        thinker_config=_thinker(more), talker_config=talker, code2wav_config=wav
    )
    return _made(Qwen3OmniMoeForConditionalGeneration, config)


def _made(model_class: Any, config: Any) -> Any:
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    return randomise(model_class(config).eval())


def save(model: Any, folder: Path) -> Path:
    """Its own save_pretrained."""
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    """What it says of a few words."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None]).logits
