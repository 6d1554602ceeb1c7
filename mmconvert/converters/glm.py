"""GLM-4.1V: a vision transformer that copies its attention to every rank, GLM text decoder.

Names: MindSpeed-MM's GlmConverter. Divisions: its model classes, as that converter has no rules
for tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.converters.blocks import (
    T,
    V,
    embedding,
    gated_rows,
    norms,
    qkv_rows,
    text_dims,
    text_tail,
    vision_dims,
)
from mmconvert.converters.configs import Dims, section_or_defaults, text_or_whole
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module, row
from mmconvert.sharding.spans import GATED, ROW, head_columns

E, B, L = "model.visual", "model.visual.blocks.{}", "model.language_model.layers.{}"
BOTH = ("weight", "bias")

# Class defaults of transformers' Glm4vVisionConfig and Glm4vTextConfig.
VISION_DEFAULTS = {"vit.layers": 24, "vit.heads": 12, "vit.width": 1536, "vit.merge": 2}
TEXT_DEFAULTS = {"llm.layers": 40, "llm.heads": 32, "llm.query_groups": 2, "llm.hidden": 4096}


def dims(config: Mapping[str, object]) -> Dims:
    """Sizes from config.json. The vision MLP is as wide as the projector's output."""
    names = {
        "vit.layers": ("depth",),
        "vit.heads": ("num_heads",),
        "vit.width": ("hidden_size",),
        "vit.merge": ("spatial_merge_size",),
        "vit.out": ("out_hidden_size",),
        "vit.projector": ("intermediate_size",),
    }
    vision = section_or_defaults(config, "vision_config")
    found = vision_dims(vision, "vision_config", names, VISION_DEFAULTS)
    found |= text_dims(text_or_whole(config), "text model", TEXT_DEFAULTS)
    if "llm.ffn" in found:
        found["llm.fc1"] = 2 * found["llm.ffn"]
    return found


def vision(variant: Variant) -> Module:
    """The vision transformer and the projector."""
    w, out, c = "vit.width", "vit.out", "vit.projector"
    e, p = "image_encoder.encoder", "image_encoder.projector"
    return Module(
        key="vit",
        label="image_encoder",
        word="vision",
        before=(
            *norms(BOTH, w, (f"{e}.patch_embed.proj", f"{E}.patch_embed.proj")),
            *norms(("weight",), w, (f"{e}.post_conv_layernorm", f"{E}.post_conv_layernorm")),
            row(
                f"{e}.embeddings.position_embedding.weight",
                f"{E}.embeddings.position_embedding.weight",
                cols=w,
            ),
        ),
        layer=(
            *norms(("weight",), w, (f"{V}.input_layernorm", f"{B}.norm1")),
            row(f"{V}.self_attention.qkv.weight", f"{B}.attn.qkv.weight", rows="vit.qkv", cols=w),
            row(f"{V}.self_attention.proj.weight", f"{B}.attn.proj.weight", rows=w, cols=w),
            *norms(("weight",), w, (f"{V}.pre_mlp_layernorm", f"{B}.norm2")),
            *gated_rows(f"{V}.mlp", f"{B}.mlp", w, out, variant, bias=False),
        ),
        after=(
            *norms(("weight",), w, (f"{e}.blocks.final_layernorm", f"{E}.post_layernorm")),
            *norms(BOTH, out, (f"{e}.downsample", f"{E}.downsample")),
            row(f"{p}.proj.weight", f"{E}.merger.proj.weight", rows=out, cols=out),
            *norms(BOTH, out, (f"{p}.post_projection_norm", f"{E}.merger.post_projection_norm")),
            row(f"{p}.gate_proj.weight", f"{E}.merger.gate_proj.weight", rows=c, cols=out),
            row(f"{p}.up_proj.weight", f"{E}.merger.up_proj.weight", rows=c, cols=out),
            row(f"{p}.down_proj.weight", f"{E}.merger.down_proj.weight", rows=out, cols=c),
        ),
    )


def text(variant: Variant) -> Module:
    """The text decoder, whose gate and up are one tensor in HF too."""
    w, ffn = "llm.hidden", "llm.ffn"
    kinds = ("input_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
    return Module(
        key="llm",
        label="text_decoder",
        role="decoder",
        before=(embedding("model.language_model.embed_tokens.weight"),),
        layer=(
            *norms(("weight",), w, *((f"{T}.{kind}", f"{L}.{kind}") for kind in kinds)),
            *norms(("weight",), w, (f"{T}.pre_mlp_layernorm", f"{L}.post_attention_layernorm")),
            *qkv_rows(f"{T}.self_attention", f"{L}.self_attn", variant, bias=True),
            row(
                f"{T}.self_attention.linear_proj.weight",
                f"{L}.self_attn.o_proj.weight",
                rows=w,
                cols="llm.q",
                shard=head_columns("llm.query_groups"),
            ),
            row(
                f"{T}.mlp.linear_fc1.weight",
                f"{L}.mlp.gate_up_proj.weight",
                rows="llm.fc1",
                cols=w,
                shard=GATED,
            ),
            row(
                f"{T}.mlp.linear_fc2.weight",
                f"{L}.mlp.down_proj.weight",
                rows=w,
                cols=ffn,
                shard=ROW,
            ),
        ),
        after=text_tail("model.language_model.norm.weight", "lm_head.weight", variant),
    )


def modules(variant: Variant) -> tuple[Module, ...]:
    """The table."""
    return vision(variant), text(variant)


FAMILY = Family(
    name="GLM-4.1V",
    converter="GlmConverter",
    model_types=frozenset({"glm4v"}),
    dims=dims,
    modules=modules,
    text_config=text_or_whole,
    variants=(Variant(),),
    canonical=False,
    plain_text=False,
)
