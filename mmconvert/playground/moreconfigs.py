"""config.json of the InternVL, GLM and DeepSeek models, from their sizes."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.playground.qwenconfigs import text_config
from mmconvert.playground.weights import Json

INTERNVL_LLMS: Mapping[str, Json] = {
    "InternLM2ForCausalLM": {
        "model_type": "internlm2",
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "rope_theta": 1000000,
    },
    "Qwen2ForCausalLM": {
        "model_type": "qwen2",
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
    },
    "Qwen3ForCausalLM": {"model_type": "qwen3", "attention_bias": False},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "attention_bias": False},
    "LlamaForCausalLM": {
        "model_type": "llama",
        "attention_bias": False,
        "pretraining_tp": 1,
        "rope_theta": 500000.0,
    },
}


def internvl_config(s: Json) -> Json:
    """config.json of InternVL."""
    six_b = s["vit_6b"]
    llm = {
        "architectures": [s["arch"]],
        **text_config(s),
        **INTERNVL_LLMS[s["arch"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    if s["arch"].startswith("Qwen3"):
        llm["head_dim"] = s["head_dim"]
    if "experts" in s:
        llm |= {"num_experts": s["experts"], "moe_intermediate_size": s["moe_inter"]}
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.4 if six_b else 0.1,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": s["vit_dim"],
        "image_size": 448,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10 if six_b else 0.02,
        "intermediate_size": 4 * s["vit_dim"],
        "layer_norm_eps": 1e-06,
        "norm_type": "rms_norm" if six_b else "layer_norm",
        "num_attention_heads": s["vit_heads"],
        "num_channels": 3,
        "num_hidden_layers": s["vit_layers"],
        "output_attentions": False,
        "output_hidden_states": False,
        "patch_size": 14,
        "qk_normalization": six_b,
        "qkv_bias": not six_b,
        "return_dict": True,
        "torch_dtype": "bfloat16",
        "use_bfloat16": True,
        "use_flash_attn": True,
    }
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "llm_config": llm,
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
    }


def deepseek_config(s: Json) -> Json:
    """config.json of DeepSeek-VL2."""
    language = {**text_config(s), "model_type": "deepseek_v2", "first_k_dense_replace": 1}
    language |= {"kv_lora_rank": s["kv_lora"], "q_lora_rank": None, "n_shared_experts": 2}
    language |= {"moe_intermediate_size": s["moe_inter"], "n_routed_experts": s["experts"]}
    language |= {"num_key_value_heads": s["heads"], "qk_nope_head_dim": s["nope"]}
    language |= {"qk_rope_head_dim": s["rope"], "v_head_dim": s["v_dim"]}
    language |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    vision = {"layers": s["vit_layers"], "width": s["vit_dim"], "heads": s["vit_heads"]}
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "model_type": "deepseek_vl_v2",
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "language_config": language,
        "projector_config": {"model_type": "mlp_projector", "n_embed": s["hidden"]},
        "vision_config": {**vision, "mlp_ratio": 3.7362, "patch_size": 14},
    }


def glm_config(s: Json) -> Json:
    """config.json of GLM-4.1V."""
    text = {**text_config(s), "attention_bias": True, "torch_dtype": "bfloat16"}
    config = {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "vision_config": {
            "depth": s["vit_layers"],
            "hidden_size": s["vit_dim"],
            "image_size": 336,
            "intermediate_size": s["inter"],
            "num_heads": s["vit_heads"],
            "out_hidden_size": s["hidden"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    if s["nested_config"]:
        return {**config, "text_config": {"model_type": "glm4v_text", **text}}
    return {**text, **config}


def glm45v_config(s: Json) -> Json:
    """config.json of GLM-4.5V."""
    text = {**text_config(s), "model_type": "glm4v_moe_text", "first_k_dense_replace": 1}
    text |= {"moe_intermediate_size": s["moe_inter"], "n_routed_experts": s["experts"]}
    return {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "model_type": "glm4v_moe",
        "text_config": text,
        "vision_config": {"model_type": "glm4v_moe", "depth": 1},
        "transformers_version": "4.57.1",
    }
