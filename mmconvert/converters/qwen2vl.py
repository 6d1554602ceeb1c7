"""Qwen2-VL: vision transformer with a plain MLP, Qwen2 text decoder."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.converters.blocks import (
    V,
    attention_output,
    norms,
    plain_mlp,
    qwen2_text,
    qwen_merger,
    qwen_patch_embed,
    text_dims,
    vision_dims,
    vision_qkv,
)
from mmconvert.converters.configs import Dims, section_or_defaults, text_or_whole
from mmconvert.converters.family import Dropped, Family, Variant
from mmconvert.converters.rows import Module
from mmconvert.names import NameTemplate

B = "visual.blocks.{}"
BOTH = ("weight", "bias")

# transformers 4.52 and later may write the first of each pair; the hub has the second. Without
# "model." it is the inner model saved alone (AutoModel), which transformers loads as well.
SPELLINGS = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
)
BUFFERS = (
    Dropped(
        NameTemplate("model.layers.{}.self_attn.rotary_emb.inv_freq"),
        "a buffer that the model computes",
    ),
    Dropped(NameTemplate("model.rotary_emb.inv_freq"), "a buffer that the model computes"),
    Dropped(NameTemplate("visual.rotary_pos_emb.inv_freq"), "a buffer that the model computes"),
)


# Class defaults of transformers' Qwen2VLVisionConfig and Qwen2VLTextConfig.
VISION_DEFAULTS = {"vit.layers": 32, "vit.heads": 16, "vit.width": 1280, "vit.merge": 2}
TEXT_DEFAULTS = {"llm.layers": 80, "llm.heads": 64, "llm.query_groups": 8, "llm.hidden": 8192}


def dims(config: Mapping[str, object]) -> Dims:
    """Sizes from config.json."""
    vision = section_or_defaults(config, "vision_config")
    names = {
        "vit.layers": ("depth",),
        "vit.heads": ("num_heads",),
        "vit.width": ("embed_dim",),
        "vit.merge": ("spatial_merge_size",),
    }
    vit = vision_dims(vision, "vision_config", names, VISION_DEFAULTS)
    ratio = vision.get("mlp_ratio", 4)
    if isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 < ratio < 1024:
        vit["vit.ffn"] = int(vit["vit.width"] * ratio)
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
            *norms(BOTH, w, (f"{V}.input_layernorm", f"{B}.norm1")),
            *vision_qkv(f"{B}.attn", variant),
            *attention_output(f"{V}.self_attention.linear_proj", f"{B}.attn.proj", w, "vit.heads"),
            *norms(BOTH, w, (f"{V}.pre_mlp_layernorm", f"{B}.norm2")),
            *plain_mlp(f"{V}.mlp", f"{B}.mlp", w, "vit.ffn"),
        ),
        after=qwen_merger("visual.merger", BOTH),
    )
    return vision, qwen2_text("model", "lm_head.weight", variant)


FAMILY = Family(
    name="Qwen2-VL",
    converter="Qwen2VLConverter",
    model_types=frozenset({"qwen2_vl"}),
    dims=dims,
    modules=modules,
    text_config=text_or_whole,
    spellings=SPELLINGS,
    dropped=BUFFERS,
)
