"""Qwen3-VL: a vision transformer with deepstack mergers, Qwen3 text decoder, dense or with experts.

Each deepstack merger belongs to one vision layer and stands with it in MM format. Names and
divisions: MindSpeed-MM's Qwen3VLMegatronConverter and its model classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.converters.blocks import (
    T,
    V,
    attention_output,
    embedding,
    gated_rows,
    norms,
    qkv_rows,
    text_dims,
    text_tail,
    two_linears,
    vision_dims,
    vision_qkv,
)
from mmconvert.converters.configs import (
    Dims,
    LayerLists,
    layer_list,
    read_dims,
    section,
    section_or_defaults,
)
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module, Row, row
from mmconvert.converters.stacks import EXPERT_COUNT, OUTPUTS_FIRST, orientation, sparse_layers
from mmconvert.sharding.spans import GATED, ROW, head_columns

B, L = "model.visual.blocks.{}", "model.language_model.layers.{}"
BOTH = ("weight", "bias")
DEEPSTACK, DENSE, EXPERTS = "vit.deepstack", "llm.dense_layers", "llm.expert_layers"

# Traits: the text decoder has experts; they are stored with their output dimension first, as
# transformers 5 saves them under the names that the hub has for the transposed ones.
MOE, OUTPUT_FIRST = "moe", "experts_output_first"

# Class defaults of transformers' Qwen3VL(Moe)VisionConfig and Qwen3VL(Moe)TextConfig.
VISION_DEFAULTS = {
    "vit.layers": 27,
    "vit.heads": 16,
    "vit.width": 1152,
    "vit.merge": 2,
    "vit.ffn": 4304,
}
TEXT_DEFAULTS = {
    "llm.layers": 32,
    "llm.heads": 32,
    "llm.query_groups": 32,
    "llm.hidden": 4096,
    "llm.head_dim": 128,
}
MOE_DEFAULTS = {"llm.layers": 24, "llm.heads": 16, "llm.query_groups": 16, "llm.hidden": 2048}
MOE_KEYS = {
    "llm.experts": EXPERT_COUNT,
    "llm.expert_ffn": ("moe_intermediate_size",),
    "llm.active_experts": ("num_experts_per_tok",),
}


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The text part."""
    return section(config, "text_config")


def traits(config: Mapping[str, object]) -> frozenset[str]:
    """Dense or with experts."""
    return frozenset({MOE}) if config.get("model_type") == "qwen3_vl_moe" else frozenset()


def dims(config: Mapping[str, object]) -> Dims:
    """Sizes from config.json."""
    names = {
        "vit.layers": ("depth",),
        "vit.heads": ("num_heads",),
        "vit.width": ("hidden_size",),
        "vit.merge": ("spatial_merge_size",),
        "vit.ffn": ("intermediate_size",),
        "vit.positions": ("num_position_embeddings",),
    }
    vision = section_or_defaults(config, "vision_config")
    found = vision_dims(vision, "vision_config", names, VISION_DEFAULTS)
    text = text_config(config)
    moe = MOE in traits(config)
    found |= text_dims(text, "text_config", MOE_DEFAULTS if moe else TEXT_DEFAULTS)
    if moe:
        defaults = {"llm.experts": 60, "llm.expert_ffn": 1408, "llm.active_experts": 4}
        found |= read_dims(text, "text_config", MOE_KEYS, defaults)
        found["llm.expert_fc1"] = 2 * found["llm.expert_ffn"]
    return found


def lists(config: Mapping[str, object]) -> LayerLists:
    """The vision layers with a deepstack merger; the text layers with and without experts.

    Raises:
        CheckpointError: lists or numbers that make no sense.
    """
    size = dims(config)
    vision = section_or_defaults(config, "vision_config")
    where = "vision_config.deepstack_visual_indexes"
    found = {
        DEEPSTACK: layer_list(
            vision.get("deepstack_visual_indexes", [8, 16, 24]), where, size["vit.layers"]
        )
    }
    if MOE not in traits(config):
        return found
    text, count = text_config(config), size["llm.layers"]
    experts = sparse_layers(text, "text_config", count)
    dense = tuple(i for i in range(count) if i not in experts)
    return {**found, EXPERTS: experts, DENSE: dense}


def shape_traits(
    config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    """How the experts are stored, by every stack whose shape tells.

    Raises:
        CheckpointError: two ways in one checkpoint.
    """
    if MOE not in traits(config):
        return frozenset()
    size = dims(config)
    form = orientation(shapes, size["llm.hidden"], size["llm.expert_ffn"])
    return frozenset({OUTPUT_FIRST}) if form == OUTPUTS_FIRST else frozenset()


def vision(variant: Variant) -> Module:
    """The vision transformer, its deepstack mergers and the projector."""
    w, m, h = "vit.width", "vit.merged", "llm.hidden"
    e, p = "image_encoder.encoder", "image_encoder.projector"
    deep, merger = f"{V}.deepstack_layer", "model.visual.deepstack_merger_list.{index}"
    return Module(
        key="vit",
        label="image_encoder",
        word="vision",
        before=(
            *norms(BOTH, w, (f"{e}.patch_embed.proj", "model.visual.patch_embed.proj")),
            row(
                f"{e}.pos_embed.weight",
                "model.visual.pos_embed.weight",
                rows="vit.positions",
                cols=w,
            ),
        ),
        layer=(
            *norms(BOTH, w, (f"{V}.input_layernorm", f"{B}.norm1")),
            *vision_qkv(f"{B}.attn", variant),
            *attention_output(f"{V}.self_attention.linear_proj", f"{B}.attn.proj", w, "vit.heads"),
            *norms(BOTH, w, (f"{V}.pre_mlp_layernorm", f"{B}.norm2")),
            *two_linears(f"{V}.mlp", f"{B}.mlp", w, "vit.ffn", w),
            *norms(BOTH, m, (f"{deep}.layernorm", f"{merger}.norm"), only=DEEPSTACK),
            *two_linears(f"{deep}.encoder", merger, m, m, h, only=DEEPSTACK),
        ),
        after=(
            *norms(BOTH, w, (f"{p}.layernorm", "model.visual.merger.norm")),
            *two_linears(f"{p}.encoder", "model.visual.merger", m, m, h),
        ),
    )


def expert_rows(transposed: bool) -> tuple[Row, ...]:
    """The router, and the experts of a layer, stacked in HF."""
    mm, hf = f"{T}.mlp.experts.local_experts.{{expert}}", f"{L}.mlp.experts"
    w = "llm.hidden"
    return (
        row(
            f"{T}.mlp.router.weight",
            f"{L}.mlp.gate.weight",
            rows="llm.experts",
            cols=w,
            only=EXPERTS,
        ),
        row(
            f"{mm}.linear_fc1.weight",
            f"{hf}.gate_up_proj",
            rows="llm.expert_fc1",
            cols=w,
            shard=GATED,
            transposed=transposed,
            only=EXPERTS,
        ),
        row(
            f"{mm}.linear_fc2.weight",
            f"{hf}.down_proj",
            rows=w,
            cols="llm.expert_ffn",
            shard=ROW,
            transposed=transposed,
            only=EXPERTS,
        ),
    )


def text_layer(hf: str, variant: Variant, *experts: Row) -> tuple[Row, ...]:
    """A decoder layer of Qwen3: norms of q and k, no biases. ``experts``: beside the dense MLP of
    the layers that have no experts.
    """
    w = "llm.hidden"
    qk = ((f"{T}.self_attention.{x}_layernorm", f"{hf}.self_attn.{x}_norm") for x in "qk")
    return (
        *norms(("weight",), w, (f"{T}.input_layernorm", f"{hf}.input_layernorm")),
        *qkv_rows(f"{T}.self_attention", f"{hf}.self_attn", variant, bias=False),
        *norms(("weight",), "llm.head_dim", *qk),
        row(
            f"{T}.self_attention.linear_proj.weight",
            f"{hf}.self_attn.o_proj.weight",
            rows=w,
            cols="llm.q",
            shard=head_columns("llm.query_groups"),
        ),
        *norms(("weight",), w, (f"{T}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm")),
        *gated_rows(
            f"{T}.mlp",
            f"{hf}.mlp",
            w,
            "llm.ffn",
            variant,
            bias=False,
            only=DENSE if experts else "",
        ),
        *experts,
    )


def text(variant: Variant) -> Module:
    """The text decoder."""
    moe = MOE in variant.traits
    return Module(
        key="llm",
        label="text_decoder",
        role="decoder",
        before=(embedding("model.language_model.embed_tokens.weight"),),
        layer=text_layer(
            L, variant, *(expert_rows(OUTPUT_FIRST not in variant.traits) if moe else ())
        ),
        after=text_tail("model.language_model.norm.weight", "lm_head.weight", variant),
    )


def modules(variant: Variant) -> tuple[Module, ...]:
    """The table."""
    return vision(variant), text(variant)


FAMILY = Family(
    name="Qwen3-VL",
    converter="Qwen3VLMegatronConverter",
    model_types=frozenset({"qwen3_vl", "qwen3_vl_moe"}),
    dims=dims,
    modules=modules,
    text_config=text_config,
    traits=traits,
    shape_traits=shape_traits,
    lists=lists,
    variants=(Variant(), Variant(traits=frozenset({MOE}))),
    canonical=False,
    plain_text=False,
    ordered=False,
)
