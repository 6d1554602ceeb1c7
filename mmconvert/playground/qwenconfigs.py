"""config.json of the Qwen models, from their sizes."""

from __future__ import annotations

from mmconvert.playground.weights import Json

MROPE = {"type": "mrope", "mrope_section": [1, 1, 1]}
ROPE_DEFAULT = {"type": "default", "rope_type": "default"}
TOKENS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654}


def text_config(s: Json) -> Json:
    """What the text configs of all families share."""
    return {
        "hidden_act": "silu",
        "hidden_size": s["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": s["inter"],
        "max_position_embeddings": 32768,
        "num_attention_heads": s["heads"],
        "num_hidden_layers": s["layers"],
        "num_key_value_heads": s["kv"],
        "tie_word_embeddings": s.get("tie", False),
        "use_cache": True,
        "vocab_size": s["vocab_size"],
    }


def _qwen_text(s: Json) -> Json:
    return {
        **text_config(s),
        "attention_dropout": 0.0,
        "max_window_layers": s["layers"],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
    }


def _flat_qwen(s: Json, architecture: str, model_type: str, version: str) -> Json:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **_qwen_text(s),
        **TOKENS,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "torch_dtype": "bfloat16",
        "transformers_version": version,
    }


def _qwen_patches(s: Json) -> Json:
    return {
        "depth": s["vit_layers"],
        "num_heads": s["vit_heads"],
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }


def _qwen25_vision(s: Json) -> Json:
    return {
        **_qwen_patches(s),
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": s["vit_dim"],
        "intermediate_size": s["vit_inter"],
        "out_hidden_size": s["hidden"],
        "window_size": 112,
    }


def qwen2_config(s: Json) -> Json:
    """config.json of Qwen2, a language model alone."""
    return _flat_qwen(s, "Qwen2ForCausalLM", "qwen2", "4.43.1")


def qwen2vl_config(s: Json) -> Json:
    """config.json of Qwen2-VL."""
    vision = {"embed_dim": s["vit_dim"], "hidden_size": s["hidden"], "mlp_ratio": 4}
    return {
        **_flat_qwen(s, "Qwen2VLForConditionalGeneration", "qwen2_vl", "4.41.2"),
        "rope_scaling": MROPE,
        "vision_config": {**_qwen_patches(s), **vision},
    }


def qwen25vl_config(s: Json) -> Json:
    """config.json of Qwen2.5-VL."""
    return {
        **_flat_qwen(s, "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "4.41.2"),
        "rope_scaling": MROPE,
        "vision_config": {**_qwen25_vision(s), "tokens_per_second": 2},
    }


def omni_config(s: Json) -> Json:
    """config.json of Qwen2.5-Omni."""
    init = {"init_std": 0.02, "initializer_range": 0.02}
    kind = "qwen2_5_omni"
    audio = {
        **init,
        "model_type": f"{kind}_audio_encoder",
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "attention_dropout": 0.0,
        "d_model": s["audio_dim"],
        "dropout": 0.0,
        "encoder_attention_heads": s["audio_heads"],
        "encoder_ffn_dim": 4 * s["audio_dim"],
        "encoder_layerdrop": 0.0,
        "encoder_layers": s["audio_layers"],
        "max_source_positions": 1500,
        "n_window": 100,
        "num_hidden_layers": s["audio_layers"],
        "num_mel_bins": s["mel"],
        "output_dim": s["hidden"],
        "scale_embedding": False,
    }
    text = {
        **init,
        **_qwen_text(s),
        "model_type": f"{kind}_text",
        "rope_scaling": {**ROPE_DEFAULT, "mrope_section": [1, 1, 1]},
    }
    vision = {
        **init,
        **_qwen25_vision(s),
        "model_type": f"{kind}_vision_encoder",
        "embed_dim": s["vit_dim"],
        "in_channels": 3,
        "tokens_per_second": 25,
    }
    thinker = {
        **init,
        **TOKENS,
        "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        "model_type": f"{kind}_thinker",
        "audio_config": audio,
        "text_config": text,
        "vision_config": vision,
        "audio_token_index": 151646,
        "audio_start_token_id": 151647,
        "audio_end_token_id": 151648,
        "image_token_index": 151655,
        "video_token_index": 151656,
        "bos_token_id": 151644,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
        "user_token_id": 872,
        "ignore_index": -100,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "torch_dtype": "bfloat16",
    }
    talker = {
        "architectures": ["Qwen2OmniTalkerForConditionalGeneration"],
        "model_type": f"{kind}_talker",
        "embedding_size": s["hidden"],
        "head_dim": 4,
        "hidden_size": s["talker_hidden"],
        "intermediate_size": 48,
        "num_attention_heads": 12,
        "num_hidden_layers": s["talker_layers"],
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {**ROPE_DEFAULT, "mrope_section": [1, 1, 0]},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 96,
    }
    bigvgan = {"mel_dim": 8, "model_type": f"{kind}_bigvgan", "upsample_initial_channel": 24}
    dit = {"depth": 1, "dim": 16, "heads": 2, "head_dim": 8}
    dit |= {"model_type": f"{kind}_dit", "torch_dtype": "float32"}
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": kind,
        "enable_audio_output": True,
        "enable_talker": True,
        "thinker_config": thinker,
        "talker_config": talker,
        "token2wav_config": {
            "model_type": f"{kind}_token2wav",
            "bigvgan_config": bigvgan,
            "dit_config": dit,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
    }


def qwen3vl_config(s: Json) -> Json:
    """config.json of Qwen3-VL."""
    kind = "qwen3_vl_moe" if s["experts"] else "qwen3_vl"
    text = {**text_config(s), "model_type": f"{kind}_text", "head_dim": s["head_dim"]}
    text |= {"attention_bias": False, "dtype": "bfloat16", "rms_norm_eps": 1e-06}
    if s["experts"]:
        del text["tie_word_embeddings"]
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        text |= {"moe_intermediate_size": s["moe_inter"], "num_experts": s["experts"]}
        text |= {"num_experts_per_tok": 2}
    moe = "Moe" if s["experts"] else ""
    return {
        "architectures": [f"Qwen3VL{moe}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": 151655,
        "text_config": text,
        "tie_word_embeddings": s["tie"],
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "deepstack_visual_indexes": s["deepstack"],
            "depth": s["vit_layers"],
            "hidden_size": s["vit_dim"],
            "in_channels": 3,
            "intermediate_size": s["vit_inter"],
            "model_type": kind,
            "num_heads": s["vit_heads"],
            "num_position_embeddings": 64,
            "out_hidden_size": s["hidden"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def omni3_config(s: Json) -> Json:
    """config.json of Qwen3-Omni."""
    text = {**text_config(s), "model_type": "qwen3_omni_moe_text", "head_dim": s["head_dim"]}
    text |= {"moe_intermediate_size": s["moe_inter"], "num_experts": s["experts"]}
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": text},
        "transformers_version": "4.57.0.dev0",
    }


def nested_config(config: Json) -> Json:
    """A flat Qwen2-VL or Qwen2.5-VL config in the form that transformers 5.x writes."""
    stays = {*TOKENS, "image_token_id", "video_token_id", "architectures", "model_type"}
    outer = {k: v for k, v in config.items() if k in stays}
    text = {k: v for k, v in config.items() if k not in stays}
    for key in ("torch_dtype", "transformers_version", "vision_config"):
        del text[key]
    rope = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    text |= {
        "model_type": f"{config['model_type']}_text",
        "dtype": config["torch_dtype"],
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
        "pad_token_id": None,
        "rope_parameters": {**text.pop("rope_scaling"), **rope},
        "sliding_window": config["sliding_window"] if config["use_sliding_window"] else None,
    }
    vision = {
        **config["vision_config"],
        "model_type": f"{config['model_type']}_vision",
        "in_channels": 3,
        "initializer_range": 0.02,
    }
    return {
        **outer,
        "dtype": config["torch_dtype"],
        "text_config": text,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "transformers_version": "5.23.0",
        "vision_config": vision,
    }
