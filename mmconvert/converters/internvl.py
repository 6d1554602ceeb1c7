"""InternVL2, 2.5 and 3: InternViT (300M, 6B) with an InternLM2, Llama or Qwen2 text decoder."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.converters.blocks import (
    T,
    embedding,
    norms,
    plain_mlp,
    qwen2_text_layer,
    text_dims,
    text_tail,
    vision_dims,
)
from mmconvert.converters.family import (
    Dims,
    Dropped,
    Family,
    Module,
    Row,
    Variant,
    flag,
    row,
    section,
)
from mmconvert.errors import CheckpointError
from mmconvert.names import NameTemplate
from mmconvert.narrow import is_array
from mmconvert.sharding.spans import GATED, ROW, Split, head_columns, heads

V = "image_encoder.encoder.encoder.layers.{}"
E = "vision_model.encoder.layers.{}"
L = "language_model.model.layers.{}"
BOTH = ("weight", "bias")

# Each rank holds q, k and v of its heads below each other; 25 heads (6B) go unevenly.
QKV = Split(parts=3, unit="vit.heads", uneven=True)
PROJ = Split(axis=1, unit="vit.heads", uneven=True)
VOCAB = Split(uneven=True)

# Traits: the text decoder, and what InternViT-6B does otherwise than 300M.
TEXTS = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}
QK_NORM, QKV_BIAS, NORM_BIAS = "qk_norm", "qkv_bias", "norm_bias"


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The text decoder's own config."""
    return section(config, "llm_config")


def traits(config: Mapping[str, object]) -> frozenset[str]:
    """Text decoder and vision details, from config.json.

    Raises:
        CheckpointError: a text decoder that is none of the three.
    """
    named = text_config(config).get("architectures")
    kind = named[0] if is_array(named) and named else None
    if not isinstance(kind, str) or kind not in TEXTS:
        raise CheckpointError(
            f"config.json: llm_config.architectures is {named!r}", f"one of {', '.join(TEXTS)}"
        )
    vision = (section(config, "vision_config"),)
    found = {TEXTS[kind]}
    if flag(vision, "qk_normalization"):
        found.add(QK_NORM)
    if flag(vision, "qkv_bias") is not False:
        found.add(QKV_BIAS)
    if vision[0].get("norm_type") != "rms_norm":
        found.add(NORM_BIAS)
    return frozenset(found)


def dims(config: Mapping[str, object]) -> Dims:
    """Sizes from config.json."""
    names = {
        "vit.layers": ("num_hidden_layers",),
        "vit.heads": ("num_attention_heads",),
        "vit.width": ("hidden_size",),
        "vit.ffn": ("intermediate_size",),
    }
    vision = vision_dims(section(config, "vision_config"), "vision_config", names)
    text = text_dims(text_config(config), "llm_config")
    text["llm.wqkv"] = text["llm.q"] + 2 * text["llm.kv"]
    return vision | text


def vision(variant: Variant) -> Module:
    """InternViT and the projector ``mlp1``."""
    w, e, p = "vit.width", "image_encoder.encoder.embeddings", "image_encoder.projector"
    kinds = BOTH if NORM_BIAS in variant.traits else ("weight",)
    attn = f"{V}.self_attention"
    qk_norms = (
        (f"{attn}.q_layernorm", f"{E}.attn.q_norm"),
        (f"{attn}.k_layernorm", f"{E}.attn.k_norm"),
    )
    bias: tuple[Row, ...] = (
        row(f"{attn}.linear_qkv.bias", f"{E}.attn.qkv.bias", rows="vit.qkv", shard=QKV),
    )
    return Module(
        key="vit",
        label="image_encoder",
        before=(
            row(f"{e}.class_embedding", "vision_model.embeddings.class_embedding"),
            *norms(BOTH, w, (f"{e}.patch_embedding", "vision_model.embeddings.patch_embedding")),
            row(f"{e}.position_embedding", "vision_model.embeddings.position_embedding"),
        ),
        layer=(
            *norms(kinds, w, (f"{V}.input_layernorm", f"{E}.norm1")),
            row(
                f"{attn}.linear_qkv.weight",
                f"{E}.attn.qkv.weight",
                rows="vit.qkv",
                cols=w,
                shard=QKV,
            ),
            *(bias if QKV_BIAS in variant.traits else ()),
            *(norms(("weight",), w, *qk_norms) if QK_NORM in variant.traits else ()),
            row(
                f"{attn}.linear_proj.weight",
                f"{E}.attn.proj.weight",
                rows=w,
                cols=w,
                shard=PROJ,
            ),
            row(f"{attn}.linear_proj.bias", f"{E}.attn.proj.bias", rows=w),
            *norms(kinds, w, (f"{V}.pre_mlp_layernorm", f"{E}.norm2")),
            *plain_mlp(f"{V}.mlp", f"{E}.mlp", w, "vit.ffn"),
            row(f"{V}.ls1", f"{E}.ls1", rows=w),
            row(f"{V}.ls2", f"{E}.ls2", rows=w),
        ),
        after=(
            *norms(BOTH, "vit.merged", (f"{p}.norm", "mlp1.0")),
            row(f"{p}.linear_fc1.weight", "mlp1.1.weight", rows="llm.hidden", cols="vit.merged"),
            row(f"{p}.linear_fc1.bias", "mlp1.1.bias", rows="llm.hidden"),
            row(f"{p}.linear_fc2.weight", "mlp1.3.weight", rows="llm.hidden", cols="llm.hidden"),
            row(f"{p}.linear_fc2.bias", "mlp1.3.bias", rows="llm.hidden"),
        ),
    )


def internlm2_layer() -> tuple[Row, ...]:
    """An InternLM2 layer; its wqkv is interleaved per query group already."""
    w, g, mm = "llm.hidden", "llm.query_groups", f"{T}.self_attention"
    ffn, mlp = "llm.ffn", f"{L}.feed_forward"
    return (
        row(f"{T}.input_layernorm.weight", f"{L}.attention_norm.weight", rows=w),
        row(
            f"{mm}.linear_qkv.weight",
            f"{L}.attention.wqkv.weight",
            rows="llm.wqkv",
            cols=w,
            shard=heads(g),
        ),
        row(
            f"{mm}.linear_proj.weight",
            f"{L}.attention.wo.weight",
            rows=w,
            cols="llm.q",
            shard=head_columns(g),
        ),
        row(f"{T}.pre_mlp_layernorm.weight", f"{L}.ffn_norm.weight", rows=w),
        row(
            f"{T}.mlp.linear_fc1.weight",
            f"{mlp}.w1.weight",
            f"{mlp}.w3.weight",
            rows=f"{ffn} {ffn}",
            cols=w,
            shard=GATED,
        ),
        row(f"{T}.mlp.linear_fc2.weight", f"{mlp}.w2.weight", rows=w, cols=ffn, shard=ROW),
    )


def text(variant: Variant) -> Module:
    """The text decoder under ``language_model.``."""
    internlm2 = "internlm2" in variant.traits
    embed, head = ("tok_embeddings", "output") if internlm2 else ("embed_tokens", "lm_head")
    return Module(
        key="llm",
        label="text_decoder",
        before=(embedding(f"language_model.model.{embed}.weight", VOCAB),),
        layer=internlm2_layer()
        if internlm2
        else qwen2_text_layer(L, variant, bias="qwen2" in variant.traits),
        after=text_tail(
            "language_model.model.norm.weight", f"language_model.{head}.weight", variant, VOCAB
        ),
    )


def modules(variant: Variant) -> tuple[Module, ...]:
    """The table."""
    return vision(variant), text(variant)


FAMILY = Family(
    name="InternVL",
    converter="InternVLConverter",
    model_types=frozenset({"internvl_chat"}),
    dims=dims,
    modules=modules,
    text_config=text_config,
    dropped=(
        Dropped(
            NameTemplate("language_model.model.layers.{}.self_attn.rotary_emb.inv_freq"),
            "a buffer that the model computes",
        ),
        Dropped(
            NameTemplate("language_model.model.layers.{}.attention.rotary_emb.inv_freq"),
            "a buffer that the model computes",
        ),
    ),
    traits=traits,
    variants=tuple(
        Variant(traits=frozenset({text, *vit}))
        for text in ("qwen2", "llama")
        for vit in ((QKV_BIAS, NORM_BIAS), (QK_NORM,), (QK_NORM, QKV_BIAS, NORM_BIAS), ())
    ),
    canonical=False,
    plain_text=False,
)
