"""InternVL2, 2.5, 3 and 3.5: InternViT (300M, 6B) with an InternLM2, Llama, Qwen2 or Qwen3 decoder.

The hub has two forms of one model: ``internvl_chat`` with code of its own, and in repositories that
end in -HF ``internvl``, the names of transformers' class. In MM format both are the same.
"""

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
from mmconvert.converters.configs import Dims, flag, section
from mmconvert.converters.family import Dropped, Family, Variant
from mmconvert.converters.internvlnames import (
    CHAT_NAMES,
    NATIVE_NAMES,
    SPELLINGS,
    VisionNames,
)
from mmconvert.converters.qwen3vl import text_layer as qwen3_text_layer
from mmconvert.converters.rows import Module, Row, row
from mmconvert.errors import CheckpointError
from mmconvert.names import NameTemplate
from mmconvert.narrow import is_array
from mmconvert.sharding.spans import GATED, ROW, Split, head_columns, heads

V = "image_encoder.encoder.encoder.layers.{}"
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
    "Qwen3ForCausalLM": "qwen3",
}
NATIVE = "native"  # the names of transformers' own class
NATIVE_TYPE = "internvl"
NATIVE_TEXTS = ("llama", "qwen2", "qwen3")  # model_type of its text_config
# Class defaults of transformers' InternVLVisionConfig.
NATIVE_DEFAULTS = {"vit.layers": 24, "vit.heads": 16, "vit.width": 1024, "vit.ffn": 4096}
QK_NORM, QKV_BIAS, NORM_BIAS = "qk_norm", "qkv_bias", "norm_bias"


def is_native(config: Mapping[str, object]) -> bool:
    """Whether config.json is that of transformers' own class."""
    return config.get("model_type") == NATIVE_TYPE


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The text decoder's own config."""
    return section(config, "text_config" if is_native(config) else "llm_config")


def text_kind(config: Mapping[str, object]) -> str:
    """The text decoder, from config.json.

    Raises:
        CheckpointError: one that has no rows here.
    """
    if is_native(config):
        where, named, known = (
            "text_config.model_type",
            text_config(config).get("model_type"),
            NATIVE_TEXTS,
        )
        kind = named if isinstance(named, str) and named in known else ""
    else:
        where, known = "llm_config.architectures", tuple(TEXTS)
        named = text_config(config).get("architectures")
        first = named[0] if is_array(named) and named else None
        kind = TEXTS.get(first, "") if isinstance(first, str) else ""
    if kind:
        return kind
    moe = "moe" in str(named).lower()
    raise CheckpointError(
        f"config.json: {where} is {named!r}",
        f"one of {', '.join(known)}",
        "with experts it has no MM form; mm-convert moe_expert --style merge makes what "
        "MindSpeed-MM trains"
        if moe
        else "",
    )


def traits(config: Mapping[str, object]) -> frozenset[str]:
    """Form, text decoder and vision details, from config.json.

    Raises:
        CheckpointError: a text decoder that has no rows here.
    """
    vision, native = (section(config, "vision_config"),), is_native(config)
    found = {text_kind(config)}
    if flag(vision, "use_qk_norm" if native else "qk_normalization"):
        found.add(QK_NORM)
    if native:
        found |= {NATIVE, QKV_BIAS} if flag(vision, "attention_bias") else {NATIVE}
    elif flag(vision, "qkv_bias") is not False:
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
    native = is_native(config)
    defaults = NATIVE_DEFAULTS if native else None
    vision = vision_dims(section(config, "vision_config"), "vision_config", names, defaults)
    head = {"llm.head_dim": 128} if text_kind(config) == "qwen3" else None  # the class's default
    text = text_dims(text_config(config), "text_config" if native else "llm_config", head)
    text["llm.wqkv"] = text["llm.q"] + 2 * text["llm.kv"]
    return vision | text


def attention(variant: Variant, names: VisionNames) -> tuple[Row, ...]:
    """The attention of a vision layer."""
    mm, hf, w = f"{V}.self_attention", f"{names.layer}.{names.attention}", "vit.width"
    qkv = tuple(f"{hf}.{name}" for name in names.qkv)
    rows = "vit.qkv" if len(qkv) == 1 else " ".join([w] * len(qkv))
    weight, bias = ([f"{name}.{kind}" for name in qkv] for kind in BOTH)
    qk_norms = ((f"{mm}.{x}_layernorm", f"{hf}.{x}_norm") for x in "qk")
    return (
        row(f"{mm}.linear_qkv.weight", *weight, rows=rows, cols=w, shard=QKV),
        *(
            (row(f"{mm}.linear_qkv.bias", *bias, rows=rows, shard=QKV),)
            if QKV_BIAS in variant.traits
            else ()
        ),
        *(norms(("weight",), w, *qk_norms) if QK_NORM in variant.traits else ()),
        row(f"{mm}.linear_proj.weight", f"{hf}.{names.output}.weight", rows=w, cols=w, shard=PROJ),
        row(f"{mm}.linear_proj.bias", f"{hf}.{names.output}.bias", rows=w),
    )


def vision(variant: Variant) -> Module:
    """InternViT and the projector."""
    w, e, p = "vit.width", "image_encoder.encoder.embeddings", "image_encoder.projector"
    kinds = BOTH if NORM_BIAS in variant.traits else ("weight",)
    names = NATIVE_NAMES if NATIVE in variant.traits else CHAT_NAMES
    layer, below, (norm, one, two) = names.layer, names.embeddings, names.projector
    return Module(
        key="vit",
        label="image_encoder",
        word="vision",
        before=(
            row(f"{e}.class_embedding", f"{below}.{names.token}"),
            *norms(BOTH, w, (f"{e}.patch_embedding", f"{below}.{names.patches}")),
            row(f"{e}.position_embedding", f"{below}.{names.positions}"),
        ),
        layer=(
            *norms(kinds, w, (f"{V}.input_layernorm", f"{layer}.{names.norms[0]}")),
            *attention(variant, names),
            *norms(kinds, w, (f"{V}.pre_mlp_layernorm", f"{layer}.{names.norms[1]}")),
            *plain_mlp(f"{V}.mlp", f"{layer}.mlp", w, "vit.ffn"),
            row(f"{V}.ls1", f"{layer}.{names.scales[0]}", rows=w),
            row(f"{V}.ls2", f"{layer}.{names.scales[1]}", rows=w),
        ),
        after=(
            *norms(BOTH, "vit.merged", (f"{p}.norm", norm)),
            row(f"{p}.linear_fc1.weight", f"{one}.weight", rows="llm.hidden", cols="vit.merged"),
            row(f"{p}.linear_fc1.bias", f"{one}.bias", rows="llm.hidden"),
            row(f"{p}.linear_fc2.weight", f"{two}.weight", rows="llm.hidden", cols="llm.hidden"),
            row(f"{p}.linear_fc2.bias", f"{two}.bias", rows="llm.hidden"),
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


def text_layer(variant: Variant) -> tuple[Row, ...]:
    """A layer of the text decoder."""
    if "internlm2" in variant.traits:
        return internlm2_layer()
    if "qwen3" in variant.traits:
        return qwen3_text_layer(L, variant)
    return qwen2_text_layer(L, variant, bias="qwen2" in variant.traits)


def text(variant: Variant) -> Module:
    """The text decoder under ``language_model.``."""
    internlm2 = "internlm2" in variant.traits
    embed, head = ("tok_embeddings", "output") if internlm2 else ("embed_tokens", "lm_head")
    return Module(
        key="llm",
        label="text_decoder",
        role="decoder",
        before=(embedding(f"language_model.model.{embed}.weight", VOCAB),),
        layer=text_layer(variant),
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
    model_types=frozenset({"internvl_chat", NATIVE_TYPE}),
    dims=dims,
    modules=modules,
    text_config=text_config,
    spellings=SPELLINGS,
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
        for text in ("qwen2", "llama", "qwen3")
        for vit in ((QKV_BIAS, NORM_BIAS), (QK_NORM,), (QK_NORM, QKV_BIAS, NORM_BIAS), ())
    ),
    canonical=False,
    plain_text=False,
)
