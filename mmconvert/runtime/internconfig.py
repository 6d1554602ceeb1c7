"""The config of an original InternVL checkpoint in the names of transformers' own class."""

from __future__ import annotations

from typing import Any, cast

import transformers

from mmconvert.errors import CheckpointError

TEXT_CONFIGS = {
    "InternLM2ForCausalLM": "LlamaConfig",  # computes the same: RMS norm, rotary GQA, gated SiLU
    "LlamaForCausalLM": "LlamaConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
}


def intern_config(content: dict[str, Any]) -> Any:  # noqa: ANN401 - as above
    """The native config of an original InternVL checkpoint.

    Names of the original: config.json of the InternVL2 models; of the native one: transformers'
    InternVLVisionConfig. The original's projector is always a GELU MLP behind a layer norm.
    """
    vision, text = content.get("vision_config"), content.get("llm_config")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise CheckpointError("config.json has no vision_config or llm_config", "an InternVL model")
    vision, said = cast("dict[str, Any]", vision), cast("dict[str, Any]", text)
    named = said.get("architectures") or [""]
    if named[0] not in TEXT_CONFIGS:
        raise CheckpointError(
            f"config.json: llm_config.architectures is {named!r}",
            f"one of {', '.join(TEXT_CONFIGS)}",
        )
    size = content.get("force_image_size") or vision.get("image_size", 448)
    native = transformers.InternVLVisionConfig(
        hidden_size=vision["hidden_size"],
        num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"],
        intermediate_size=vision["intermediate_size"],
        attention_bias=vision.get("qkv_bias", True),
        use_qk_norm=vision.get("qk_normalization", False),
        norm_type=vision.get("norm_type", "layer_norm"),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
        hidden_act=vision.get("hidden_act", "gelu"),
        image_size=vision.get("image_size", size),
        patch_size=vision.get("patch_size", 14),
        num_channels=vision.get("num_channels", 3),
    )
    made = getattr(transformers, TEXT_CONFIGS[named[0]])
    left_out = ("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "_name_or_path")
    text = {k: v for k, v in said.items() if k not in left_out}
    if named[0] == "InternLM2ForCausalLM":
        text |= {"attention_bias": said.get("bias", False), "mlp_bias": said.get("bias", False)}
        if (text.get("rope_scaling") or dict[str, Any]()).get("type") == "dynamic":
            # Positions beyond max_position_embeddings only; the check stays far below.
            text["rope_scaling"] = None
    tied = bool(said.get("tie_word_embeddings", False))
    return transformers.InternVLConfig(
        vision_config=native,
        text_config=made.from_dict(text),
        image_token_id=content.get("img_context_token_id") or 0,
        downsample_ratio=content.get("downsample_ratio", 0.5),
        tie_word_embeddings=tied,
    )
