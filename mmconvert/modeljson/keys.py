"""A model.json out of config.json: every key that MindSpeed-MM wants, and where its value is from.

Keys as pretrain_vlm.py and pretrain_internvl.py of MindSpeed-MM 2.0.0 to 26.1.0 read them. What is
no matter of the model stands at the values of its examples: frozen encoders, no dropout, bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mmconvert.errors import CheckpointError, RequestError

Config = Mapping[str, Any]
# How a value is computed in every module of the examples.
COMMON = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "bf16": True, "params_dtype": "bf16"}
FAMILIES = {
    "qwen2_vl": ("qwen2vl", "qwen2lm"),
    "qwen2_5_vl": ("qwen2_5vl", "qwen2_5_lm"),
    "qwen2_5_omni": ("qwen2_5vl", "qwen2_5_omni_thinker"),
}
OMNI = ("qwen2_5_omni", "qwen2_5_omni_thinker")
ORIGINAL = "internvl_chat"
# Why none is made of other families' config.json.
UNKNOWN = "the keys that MindSpeed-MM expects for it are not known here"
UNMADE: dict[str, str] = dict.fromkeys(
    ("qwen3_vl", "qwen3_vl_moe"),
    "MindSpeed-MM's own examples build Qwen3-VL from its Hugging Face folder, for FSDP2, and list "
    "no layers",
)
BIASED = {"Qwen2ForCausalLM"}  # InternVL's text decoders whose q, k, v have a bias


def derivable(config: Config) -> bool:
    """Whether a model.json can be made of a config.json: of the families that spell out their sizes
    there.
    """
    return config.get("model_type") in (*FAMILIES, *OMNI, ORIGINAL)


def model_keys(config: Config) -> dict[str, Any]:
    """The whole model.json of a model, on one pipeline stage.

    Raises:
        CheckpointError: config.json lacks a size.
        RequestError: config.json is of another family.
    """
    kind = config.get("model_type")
    if kind in OMNI:
        thinker = config.get("thinker_config", config)
        return _qwen(cast("Config", thinker), "qwen2_5_omni")
    if kind in FAMILIES:
        return _qwen(config, str(kind))
    if kind == ORIGINAL:
        return _intern(config)
    raise RequestError(
        f"no model.json can be made for model_type {kind!r}: {UNMADE.get(str(kind), UNKNOWN)}",
        f"one of {', '.join([*FAMILIES, ORIGINAL])}",
        "suggest --model_json FILE puts its layer lists into a model.json that you have; the "
        "conversion itself needs no such file",
    )


class _Part:
    """A part of config.json whose values must be there."""

    def __init__(self, content: object, name: str) -> None:
        if not isinstance(content, Mapping):
            raise CheckpointError(f"config.json has no {name}", "the config.json of the model")
        self.content, self._name = cast("Config", content), name

    def take(self, *names: str, default: object = None) -> Any:  # noqa: ANN401 - as it stands
        """The first of these values that is there."""
        for name in names:
            if self.content.get(name) is not None:
                return self.content[name]
        if default is None:
            raise CheckpointError(
                f"config.json: {self._name} has no {names[0]}", "the config.json of the model"
            )
        return default


def _qwen(config: Config, kind: str) -> dict[str, Any]:
    vision = _Part(config.get("vision_config"), "vision_config")
    has_text = isinstance(config.get("text_config"), Mapping)
    text = _Part(config["text_config"] if has_text else config, "text_config")
    newer = kind != "qwen2_vl"  # gated, RMS norm, windows
    width = int(vision.take("hidden_size" if newer else "embed_dim"))
    merge = int(vision.take("spatial_merge_size", default=2))
    ids = _Part(config, "the top level")
    content: dict[str, Any] = {
        "model_id": FAMILIES[kind][0],
        "img_context_token_id": ids.take("image_token_id", "image_token_index", default=151655),
        "vision_start_token_id": ids.take("vision_start_token_id", default=151652),
        "text_encoder": None,
        "video_encoder": None,
        "image_encoder": {
            "vision_encoder": _qwen_vision(vision, width, newer=newer, omni=kind == "qwen2_5_omni"),
            "vision_projector": {
                "model_id": "lnmlp", "num_layers": 1, "input_size": width,
                "ffn_hidden_size": width * merge**2, "hidden_size": text.take("hidden_size"),
                "activation_func": "gelu", "gated_linear_unit": False,
                "bias_activation_fusion": False, "add_bias_linear": True,
                "normalization": "RMSNorm" if newer else "LayerNorm", "layernorm_epsilon": 1e-6,
                "freeze": True, "bf16": True, "params_dtype": "bf16",
            },
        },
    }  # fmt: skip
    if kind == "qwen2_5_omni":
        content["audio_encoder"] = {"audio_encoder": _qwen_audio(config)}
    tied = config.get("tie_word_embeddings", text.content.get("tie_word_embeddings", False))
    content["text_decoder"] = _qwen_text(text, FAMILIES[kind][1], tied=tied is True)
    return content


def _qwen_vision(vision: _Part, width: int, *, newer: bool, omni: bool) -> dict[str, Any]:
    ratio = 0 if newer else vision.take("mlp_ratio", default=4)
    found: dict[str, Any] = {
        "model_id": "qwen2vit", "num_layers": vision.take("depth"), "hidden_size": width,
        "num_attention_heads": vision.take("num_heads"),
        "ffn_hidden_size": vision.take("intermediate_size") if newer else int(width * ratio),
        "gated_linear_unit": newer,
        "activation_func": vision.take("hidden_act", default="silu" if newer else "quick_gelu"),
        "normalization": "RMSNorm" if newer else "LayerNorm", "layernorm_epsilon": 1e-6,
        "in_channels": vision.take("in_channels", "in_chans", default=3),
        "patch_size": vision.take("patch_size", default=14),
        "temporal_patch_size": vision.take("temporal_patch_size", default=2),
        "spatial_merge_size": vision.take("spatial_merge_size", default=2),
        "attention_mask_type": "general", "use_fused_rotary_pos_emb": True, "freeze": True,
    }  # fmt: skip
    if newer:
        found |= {
            "window_attn_size": vision.take("window_size"),
            "fullatt_block_indexes": list(vision.take("fullatt_block_indexes")),
            "tokens_per_second": vision.take("tokens_per_second", default=25 if omni else 2),
        }
    return found | COMMON


def _qwen_audio(config: Config) -> dict[str, Any]:
    audio = _Part(config.get("audio_config"), "audio_config")
    width = audio.take("d_model")
    copied = ("num_mel_bins", "max_source_positions", "n_window", "output_dim")
    return {
        "model_id": "qwen_omni", "num_layers": audio.take("encoder_layers"), "hidden_size": width,
        "d_model": width, "num_attention_heads": audio.take("encoder_attention_heads"),
        "ffn_hidden_size": audio.take("encoder_ffn_dim"), "gated_linear_unit": False,
        "activation_func": "gelu", "normalization": "LayerNorm",
        **{name: audio.take(name) for name in copied},
        "scale_embedding": audio.take("scale_embedding", default=False),
        "attention_mask_type": "general", "freeze": True, **COMMON,
    }  # fmt: skip


def _qwen_text(text: _Part, model_id: str, *, tied: bool) -> dict[str, Any]:
    rope = text.content.get("rope_parameters") or text.content.get("rope_scaling")
    section = _Part(rope, "rope_scaling")
    theta = text.content.get("rope_theta") or section.take("rope_theta")
    heads = text.take("num_attention_heads")
    found = {
        "model_id": model_id, "num_layers": text.take("num_hidden_layers"),
        "hidden_size": text.take("hidden_size"), "ffn_hidden_size": text.take("intermediate_size"),
        "num_attention_heads": heads, "group_query_attention": True,
        "num_query_groups": text.take("num_key_value_heads", default=heads),
        "vocab_size": text.take("vocab_size"),
        "max_position_embeddings": text.take("max_position_embeddings"),
        "untie_embeddings_and_output_weights": not tied, "position_embedding_type": "mrope",
        "mrope_section": list(section.take("mrope_section")), "rope_theta": float(theta),
        "rope_scaling": None, "normalization": "RMSNorm",
        "layernorm_epsilon": text.take("rms_norm_eps"),
        "activation_func": text.take("hidden_act", default="silu"), "gated_linear_unit": True,
        "add_bias_linear": False, "add_qkv_bias": True, "attention_softmax_in_fp32": True,
        "use_fused_rotary_pos_emb": True, "parallel_output": True, **COMMON,
    }  # fmt: skip
    head = text.content.get("head_dim")
    return found | ({"kv_channels": head} if isinstance(head, int) else {})


def _intern(config: Config) -> dict[str, Any]:
    vision = _Part(config.get("vision_config"), "vision_config")
    text = _Part(config.get("llm_config"), "llm_config")
    top = _Part(config, "the top level")
    ratio = top.take("downsample_ratio", default=0.5)
    shuffle = {
        "downsample_ratio": ratio, "select_layer": top.take("select_layer", default=-1),
        "ps_version": top.take("ps_version", default="v2"),
    }  # fmt: skip
    normed = vision.take("qk_normalization", default=False) is True
    norm = (
        "RMSNorm" if vision.take("norm_type", default="layer_norm") == "rms_norm" else "LayerNorm"
    )
    named = text.content.get("architectures") or [""]
    heads, width = text.take("num_attention_heads"), text.take("hidden_size")
    return {
        "model_id": "InternVL",
        # The tokenizer's id of <IMG_CONTEXT>, which config.json need not have.
        "img_context_token_id": config.get("img_context_token_id"),
        "pre_process": True, "post_process": True, "img_embedding_idx": 1, **shuffle,
        "text_encoder": None, "video_encoder": None,
        "image_encoder": {
            "vision_encoder": {
                "model_id": "InternViT", "num_layers": vision.take("num_hidden_layers"),
                "hidden_size": vision.take("hidden_size"),
                "ffn_hidden_size": vision.take("intermediate_size"),
                "num_attention_heads": vision.take("num_attention_heads"),
                "num_channels": vision.take("num_channels", default=3),
                "patch_size": vision.take("patch_size", default=14),
                "image_size": vision.take("image_size", default=448),
                "add_qkv_bias": vision.take("qkv_bias", default=True) is True,
                "qk_layernorm": normed, "activation_func": "gelu", "normalization": norm,
                **({"q_layernorm": "RMSNorm", "k_layernorm": "RMSNorm"} if normed else {}),
                "layernorm_epsilon": vision.take("layer_norm_eps", default=1e-6),
                "drop_path_rate": vision.take("drop_path_rate", default=0.0),
                "initializer_factor": vision.take("initializer_factor", default=1.0),
                "post_layer_norm": False, **shuffle, "pre_tockens": 2147483647,
                "next_tockens": 2147483647, "freeze": True, **COMMON,
            },
            "vision_projector": {
                "model_id": "InternVLMLP", "num_layers": 1, "downsample_ratio": ratio,
                "vit_hidden_size": vision.take("hidden_size"), "llm_hidden_size": width,
                "params_dtype": "bf16",
            },
        },
        "text_decoder": {
            "model_id": "internllm", "num_layers": text.take("num_hidden_layers"),
            "hidden_size": width, "ffn_hidden_size": text.take("intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": text.take("num_key_value_heads", default=heads),
            "kv_channels": text.take("head_dim", default=width // heads),
            "vocab_size": text.take("vocab_size"),
            "max_position_embeddings": text.take("max_position_embeddings"),
            "rotary_base": text.take("rope_theta"), "rotary_percent": 1.0,
            "position_embedding_type": "rope", "normalization": "RMSNorm",
            "layernorm_epsilon": text.take("rms_norm_eps"), "qk_layernorm": False,
            "activation_func": "silu", "gated_linear_unit": True, "bias_activation_fusion": False,
            "add_bias_linear": False, "add_qkv_bias": named[0] in BIASED,
            "attention_softmax_in_fp32": True, "fp16_lm_cross_entropy": False,
            "parallel_output": True, **COMMON,
        },
    }  # fmt: skip
