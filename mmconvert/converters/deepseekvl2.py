"""DeepSeek-VL2: SigLIP encoder copied to every rank, DeepSeek text decoder with MLA and experts.

Names and divisions: MindSpeed-MM's DeepSeekVLConverter and its model classes. The first text layers
are dense; the others have a router, shared experts and routed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmconvert.converters.blocks import (
    T,
    embedding,
    norms,
    qkv_rows,
    text_dims,
    text_tail,
    vision_dims,
)
from mmconvert.converters.configs import (
    Dims,
    LayerLists,
    need,
    read_dims,
    section,
    section_or_defaults,
)
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module, Row, row
from mmconvert.errors import CheckpointError
from mmconvert.sharding.spans import GATED, ROW, head_columns, heads

L, V = "language.model.layers.{}", "image_encoder.encoder.blocks.{}"
BOTH = ("weight", "bias")
DENSE, EXPERTS = "llm.dense_layers", "llm.expert_layers"

# Traits: q goes through a low-rank matrix too; no latent attention, but q, k and v (VL2-Tiny); the
# router has a correction bias; how tiles are told apart.
Q_LORA, PLAIN, BIAS, ONE_D = "q_lora", "plain_attention", "correction_bias", "tile_tag_1D"
CORRECTION_BIAS = ".mlp.gate.e_score_correction_bias"
MLA = {
    "llm.kv_lora": ("kv_lora_rank",),
    "llm.nope": ("qk_nope_head_dim",),
    "llm.rope": ("qk_rope_head_dim",),
    "llm.v_dim": ("v_head_dim",),
}
MOE = {"llm.experts": ("n_routed_experts",), "llm.expert_ffn": ("moe_intermediate_size",)}

ACTIVE = {"llm.active_experts": ("num_experts_per_tok",)}


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The text part."""
    return section(config, "language_config")


def traits(config: Mapping[str, object]) -> frozenset[str]:
    """What the text decoder has, from config.json.

    Raises:
        CheckpointError: an unknown tile_tag.
    """
    text = text_config(config)
    plain = text.get("kv_lora_rank") is None or text.get("use_mla") is False
    tag = config.get("tile_tag", "2D")
    if tag not in ("1D", "2D"):
        raise CheckpointError(f"config.json: tile_tag is {tag!r}", "1D or 2D")
    found = {
        PLAIN: plain,
        Q_LORA: not plain and text.get("q_lora_rank") is not None,
        BIAS: text.get("topk_method") == "noaux_tc",
        ONE_D: tag == "1D",
    }
    return frozenset(name for name, there in found.items() if there)


def shape_traits(
    config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    """The correction bias, where config.json does not tell of it."""
    del config
    there = any(name.endswith(CORRECTION_BIAS) for name in shapes)
    return frozenset({BIAS}) if there else frozenset()


def dims(config: Mapping[str, object]) -> Dims:
    """Sizes from config.json. It does not tell the width of the vision MLP for certain."""
    names = {
        "vit.layers": ("layers",),
        "vit.heads": ("heads",),
        "vit.width": ("width",),
    }
    defaults = {"vit.layers": 27, "vit.heads": 16, "vit.width": 1152}
    found = vision_dims(
        section_or_defaults(config, "vision_config"), "vision_config", names, defaults
    )
    text = text_config(config)
    where = "language_config"
    found |= text_dims(text, where)
    found |= read_dims(text, where, {**MOE, **ACTIVE, "llm.shared": ("n_shared_experts",)})
    need(found, where, MOE)
    found["llm.shared_ffn"] = found.get("llm.shared", 1) * found["llm.expert_ffn"]
    if PLAIN not in traits(config):
        found |= read_dims(text, where, {**MLA, "llm.q_lora": ("q_lora_rank",)})
        need(found, where, MLA)
        count, nope, v = found["llm.heads"], found["llm.nope"], found["llm.v_dim"]
        found["llm.kv_a"] = found["llm.kv_lora"] + found["llm.rope"]
        found["llm.mla_q"] = count * (nope + found["llm.rope"])
        found["llm.kv_b"] = count * (nope + v)
        found["llm.attention"] = count * v
    return found


def lists(config: Mapping[str, object]) -> LayerLists:
    """The text layers with and without experts."""
    text = text_config(config)
    count = dims(config)["llm.layers"]
    first = text.get("first_k_dense_replace", 0)
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= count:
        raise CheckpointError(
            f"config.json: language_config first_k_dense_replace is {first!r}",
            f"a number of layers up to {count}",
        )
    return {DENSE: tuple(range(first)), EXPERTS: tuple(range(first, count))}


def same(mm: str, hf: str, *names: str) -> tuple[Row, ...]:
    """Weights and biases that are called alike on both sides, copied to every rank."""
    return tuple(row(f"{mm}.{n}.{kind}", f"{hf}.{n}.{kind}") for n in names for kind in BOTH)


def vision(variant: Variant) -> Module:
    """The encoder, its pooling and the projector."""
    w, h = "vit.width", "llm.hidden"
    e, p = "image_encoder.encoder", "image_encoder.projector.layers"
    marks = ("tile_indicators",) if ONE_D in variant.traits else ("image_newline", "view_seperator")
    return Module(
        key="vit",
        label="image_encoder",
        word="vision",
        before=(
            *norms(BOTH, w, (f"{e}.patch_embed.proj", "vision.patch_embed.proj")),
            row(f"{e}.pos_embed", "vision.pos_embed"),
        ),
        layer=same(
            V, "vision.blocks.{}", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
        ),
        after=(
            *norms(BOTH, w, (f"{e}.norm", "vision.norm")),
            row(f"{e}.attn_pool.latent", "vision.attn_pool.latent"),
            *same(
                f"{e}.attn_pool",
                "vision.attn_pool",
                *("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"),
            ),
            *norms(BOTH, h, (f"{p}.0", "projector.layers.0"), (f"{p}.2", "projector.layers.2")),
        ),
        everywhere=tuple(row(name, name) for name in marks),
    )


def attention(variant: Variant) -> tuple[Row, ...]:
    """Multi-head latent attention; its first linear is whole on every rank. VL2-Tiny has the
    attention of a Llama, which Megatron's SelfAttention reads.
    """
    mm, hf, w = f"{T}.self_attention", f"{L}.self_attn", "llm.hidden"
    if PLAIN in variant.traits:
        output = row(
            f"{mm}.linear_proj.weight",
            f"{hf}.o_proj.weight",
            rows=w,
            cols="llm.q",
            shard=head_columns("llm.query_groups"),
        )
        return (*qkv_rows(mm, hf, variant, bias=False), output)
    low = Q_LORA in variant.traits
    q, size = ("q_a_proj", "llm.q_lora") if low else ("q_proj", "llm.mla_q")
    by_rank = (
        row(
            f"{mm}.linear_qb.weight",
            f"{hf}.q_b_proj.weight",
            rows="llm.mla_q",
            cols="llm.q_lora",
            shard=heads("llm.heads"),
        ),
        row(f"{mm}.q_layernorm.weight", f"{hf}.q_a_layernorm.weight", rows="llm.q_lora"),
    )
    return (
        row(
            f"{mm}.linear_qkv.weight",
            f"{hf}.{q}.weight",
            f"{hf}.kv_a_proj_with_mqa.weight",
            rows=f"{size} llm.kv_a",
            cols=w,
        ),
        *(by_rank if low else ()),
        row(f"{mm}.k_layernorm.weight", f"{hf}.kv_a_layernorm.weight", rows="llm.kv_lora"),
        row(
            f"{mm}.linear_kvb.weight",
            f"{hf}.kv_b_proj.weight",
            rows="llm.kv_b",
            cols="llm.kv_lora",
            shard=heads("llm.heads"),
        ),
        row(
            f"{mm}.linear_proj.weight",
            f"{hf}.o_proj.weight",
            rows=w,
            cols="llm.attention",
            shard=head_columns("llm.heads"),
        ),
    )


def gated(mm: str, hf: str, ffn: str, only: str) -> tuple[Row, ...]:
    """Gate above up, and down, of a dense MLP or of an expert."""
    w, pair = "llm.hidden", (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    one, two = f"{mm}.linear_fc1.weight", f"{mm}.linear_fc2.weight"
    return (
        row(one, *pair, rows=f"{ffn} {ffn}", cols=w, shard=GATED, only=only),
        row(two, f"{hf}.down_proj.weight", rows=w, cols=ffn, shard=ROW, only=only),
    )


def text(variant: Variant) -> Module:
    """The text decoder."""
    w, mm, hf = "llm.hidden", f"{T}.mlp", f"{L}.mlp"
    router, gate = f"{mm}.router", f"{hf}.gate"
    bias = row(
        f"{router}.expert_bias", f"{gate}.e_score_correction_bias", rows="llm.experts", only=EXPERTS
    )
    local = f"{mm}.experts.local_experts.{{expert}}"
    return Module(
        key="llm",
        label="text_decoder",
        role="decoder",
        before=(embedding("language.model.embed_tokens.weight"),),
        layer=(
            *norms(("weight",), w, (f"{T}.input_layernorm", f"{L}.input_layernorm")),
            *attention(variant),
            *norms(("weight",), w, (f"{T}.pre_mlp_layernorm", f"{L}.post_attention_layernorm")),
            *gated(mm, hf, "llm.ffn", DENSE),
            row(f"{router}.weight", f"{gate}.weight", rows="llm.experts", cols=w, only=EXPERTS),
            # A buffer in fp32: in fewer bits it would choose other experts.
            *((replace(bias, keeps_dtype=True),) if BIAS in variant.traits else ()),
            *gated(f"{mm}.shared_experts", f"{hf}.shared_experts", "llm.shared_ffn", EXPERTS),
            *gated(local, f"{hf}.experts.{{expert}}", "llm.expert_ffn", EXPERTS),
        ),
        after=text_tail("language.model.norm.weight", "language.lm_head.weight", variant),
    )


def modules(variant: Variant) -> tuple[Module, ...]:
    """The table."""
    return vision(variant), text(variant)


FAMILY = Family(
    name="DeepSeek-VL2",
    converter="DeepSeekVLConverter",
    model_types=frozenset({"deepseek_vl_v2"}),
    dims=dims,
    modules=modules,
    text_config=text_config,
    traits=traits,
    shape_traits=shape_traits,
    lists=lists,
    variants=tuple(
        Variant(traits=frozenset({*bias, *lora, *tag}))
        for bias in ((BIAS,), ())
        for lora in ((), (Q_LORA,), (PLAIN,))
        for tag in ((), (ONE_D,))
    ),
    canonical=False,
    plain_text=False,
)
