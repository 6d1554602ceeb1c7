"""Qwen2.5-VL: vision transformer with RMS norms and a gated MLP, Qwen2 text decoder."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.converters.blocks import (
    V,
    attention_output,
    gated_rows,
    norms,
    qwen2_text,
    qwen_merger,
    qwen_patch_embed,
    text_dims,
    vision_dims,
    vision_qkv,
)
from mmconvert.converters.configs import Dims, section_or_defaults, text_or_whole
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.qwen2vl import (
    BUFFERS,
    SPELLINGS,
    TEXT_DEFAULTS,
    B,
)
from mmconvert.converters.rows import Module

# Class defaults of transformers' Qwen2_5_VLVisionConfig.
VISION_DEFAULTS = {"vit.layers": 32, "vit.heads": 16, "vit.width": 3584, "vit.ffn": 3420}


def dims(config: Mapping[str, object]) -> Dims:
    """Sizes from config.json."""
    names = {
        "vit.layers": ("depth",),
        "vit.heads": ("num_heads",),
        "vit.width": ("hidden_size",),
        "vit.ffn": ("intermediate_size",),
        "vit.merge": ("spatial_merge_size",),
    }
    vision = section_or_defaults(config, "vision_config")
    vit = vision_dims(vision, "vision_config", names, VISION_DEFAULTS)
    return vit | text_dims(text_or_whole(config), "text model", TEXT_DEFAULTS)


def modules(variant: Variant) -> tuple[Module, ...]:
    """The table."""
    w = "vit.width"
    vision = Module(
        key="vit",
        label="image_encoder",
        word="vision",
        before=(qwen_patch_embed("visual"),),
        layer=(
            *norms(("weight",), w, (f"{V}.input_layernorm", f"{B}.norm1")),
            *vision_qkv(f"{B}.attn", variant),
            *attention_output(f"{V}.self_attention.linear_proj", f"{B}.attn.proj", w, "vit.heads"),
            *norms(("weight",), w, (f"{V}.pre_mlp_layernorm", f"{B}.norm2")),
            *gated_rows(f"{V}.mlp", f"{B}.mlp", w, "vit.ffn", variant, bias=True),
        ),
        after=qwen_merger("visual.merger", ("weight",)),
    )
    return vision, qwen2_text("model", "lm_head.weight", variant)


FAMILY = Family(
    name="Qwen2.5-VL",
    converter="Qwen2_5_VLConverter",
    model_types=frozenset({"qwen2_5_vl"}),
    dims=dims,
    modules=modules,
    text_config=text_or_whole,
    spellings=SPELLINGS,
    dropped=BUFFERS,
)
