"""Rows that families share: text decoders, vision blocks, the Qwen patch merger.

Names and divisions: names.md and mm-checkpoints.md section 2 (derived from golden records).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmconvert.converters.configs import Dims, need, read_dims
from mmconvert.converters.family import Variant
from mmconvert.converters.rows import CONCAT, OUTPUT_LAYER, Module, Row, row
from mmconvert.sharding.spans import (
    COLUMN,
    GATED,
    ROW,
    Interleave,
    Split,
    head_columns,
    heads,
)

T = "text_decoder.decoder.layers.{}"
V = "image_encoder.encoder.blocks.layers.{}"
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"

_TEXT_KEYS: Mapping[str, tuple[str, ...]] = {
    "llm.layers": ("num_hidden_layers",),
    "llm.heads": ("num_attention_heads",),
    "llm.hidden": ("hidden_size",),
}


def text_dims(
    config: Mapping[str, object], where: str, defaults: Mapping[str, int] | None = None
) -> Dims:
    """Sizes of a Llama-like text decoder: ``llm.*``.

    ``llm.q`` and ``llm.kv`` are the rows of the q and of the k or v projection.
    """
    dims = read_dims(
        config,
        where,
        {
            **_TEXT_KEYS,
            "llm.query_groups": ("num_key_value_heads",),
            "llm.head_dim": ("head_dim",),
            "llm.ffn": ("intermediate_size",),
            "llm.vocab": ("vocab_size",),
        },
        defaults,
    )
    need(dims, where, _TEXT_KEYS)
    if config.get("num_key_value_heads", 0) is None:  # said to be none: one for each head
        dims["llm.query_groups"] = dims["llm.heads"]
    dims.setdefault("llm.query_groups", dims["llm.heads"])
    dims.setdefault("llm.head_dim", dims["llm.hidden"] // dims["llm.heads"])
    dims["llm.q"] = dims["llm.heads"] * dims["llm.head_dim"]
    dims["llm.kv"] = dims["llm.query_groups"] * dims["llm.head_dim"]
    return dims


def qkv_rows(mm: str, hf: str, variant: Variant, bias: bool) -> tuple[Row, ...]:
    """Packed or separate q, k, v projections of a text layer."""
    out: list[Row] = []
    names = [f"{hf}.{x}_proj" for x in "qkv"]
    sizes = ["llm.q", "llm.kv", "llm.kv"]
    units = ["llm.heads", "llm.query_groups", "llm.query_groups"]
    for kind, cols in (("weight", "llm.hidden"), ("bias", "")):
        if kind == "bias" and not bias:
            continue
        if variant.canonical:
            for x, name, size, unit in zip("qkv", names, sizes, units, strict=True):
                mm_name = f"{mm}.{x}_proj.{kind}"
                out.append(row(mm_name, f"{name}.{kind}", rows=size, cols=cols, shard=heads(unit)))
        else:
            out.append(
                row(
                    f"{mm}.linear_qkv.{kind}",
                    *(f"{name}.{kind}" for name in names),
                    rows=" ".join(sizes),
                    cols=cols,
                    fuse=Interleave("llm.query_groups"),
                    shard=heads("llm.query_groups"),
                )
            )
    return tuple(out)


def gated_rows(
    mm: str, hf: str, width: str, ffn: str, variant: Variant, bias: bool, only: str = ""
) -> tuple[Row, ...]:
    """A gated MLP: gate and up (packed or separate), and down; in the layers of ``only``."""
    out: list[Row] = []
    for kind, cols in (("weight", width), ("bias", "")):
        if kind == "bias" and not bias:
            continue
        pair = [f"{hf}.{x}_proj.{kind}" for x in ("gate", "up")]
        if variant.canonical:
            for x, name in zip(("gate", "up"), pair, strict=True):
                out.append(row(f"{mm}.{x}_proj.{kind}", name, rows=ffn, cols=cols, shard=COLUMN))
        else:
            mm_name = f"{mm}.linear_fc1.{kind}"
            out.append(row(mm_name, *pair, rows=f"{ffn} {ffn}", cols=cols, shard=GATED))
    out.append(
        row(f"{mm}.linear_fc2.weight", f"{hf}.down_proj.weight", rows=width, cols=ffn, shard=ROW)
    )
    if bias:
        out.append(row(f"{mm}.linear_fc2.bias", f"{hf}.down_proj.bias", rows=width))
    return tuple(replace(r, only=only) for r in out)


def qwen2_text_layer(hf: str, variant: Variant, bias: bool = True) -> tuple[Row, ...]:
    """A decoder layer of Qwen2 (``bias``: q, k, v have one) or Llama."""
    w = "llm.hidden"
    return (
        row(f"{T}.input_layernorm.weight", f"{hf}.input_layernorm.weight", rows=w),
        *qkv_rows(f"{T}.self_attention", f"{hf}.self_attn", variant, bias),
        row(
            f"{T}.self_attention.linear_proj.weight",
            f"{hf}.self_attn.o_proj.weight",
            rows=w,
            cols="llm.q",
            shard=head_columns("llm.query_groups"),
        ),
        row(f"{T}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", rows=w),
        *gated_rows(f"{T}.mlp", f"{hf}.mlp", w, "llm.ffn", variant, bias=False),
    )


def embedding(hf: str, shard: Split = COLUMN) -> Row:
    """The word embedding."""
    return row(EMBEDDING, hf, rows="llm.vocab", cols="llm.hidden", shard=shard)


def text_tail(norm: str, head: str, variant: Variant, shard: Split = COLUMN) -> tuple[Row, ...]:
    """Final norm and output layer; tied, the output layer repeats the word embedding."""
    return (
        row("text_decoder.decoder.final_layernorm.weight", norm, rows="llm.hidden"),
        row(
            OUTPUT_LAYER,
            head,
            rows="llm.vocab",
            cols="llm.hidden",
            shard=shard,
            tied_to=EMBEDDING if variant.tied else "",
        ),
    )


def vision_qkv(hf: str, variant: Variant) -> tuple[Row, ...]:
    """The packed q, k, v of a vision block.

    Megatron's SelfAttention reads it per head; the canonical attention reads each rank's rows
    as q, k, v; the reference 2.2.0 to 2.3.0 wrote it unchanged and cut it by plain rows.
    """
    fuse, shard = Interleave("vit.heads", packed_qkv=True), heads("vit.heads")
    if variant.encoder_qkv == "concatenated":
        fuse = CONCAT
    elif variant.canonical:
        fuse, shard = CONCAT, Split(parts=3, unit="vit.heads")
    mm = f"{V}.self_attention.linear_qkv"
    return (
        row(
            f"{mm}.weight",
            f"{hf}.qkv.weight",
            rows="vit.qkv",
            cols="vit.width",
            fuse=fuse,
            shard=shard,
        ),
        row(f"{mm}.bias", f"{hf}.qkv.bias", rows="vit.qkv", fuse=fuse, shard=shard),
    )


def attention_output(mm: str, hf: str, width: str, unit: str) -> tuple[Row, ...]:
    """An encoder's output projection, with bias."""
    return (
        row(f"{mm}.weight", f"{hf}.weight", rows=width, cols=width, shard=head_columns(unit)),
        row(f"{mm}.bias", f"{hf}.bias", rows=width),
    )


def plain_mlp(mm: str, hf: str, width: str, ffn: str) -> tuple[Row, ...]:
    """fc1 and fc2, with biases."""
    one, two = f"{mm}.linear_fc1", f"{mm}.linear_fc2"
    return (
        row(f"{one}.weight", f"{hf}.fc1.weight", rows=ffn, cols=width, shard=COLUMN),
        row(f"{one}.bias", f"{hf}.fc1.bias", rows=ffn, shard=COLUMN),
        row(f"{two}.weight", f"{hf}.fc2.weight", rows=width, cols=ffn, shard=ROW),
        row(f"{two}.bias", f"{hf}.fc2.bias", rows=width),
    )


def qwen2_text(model: str, head: str, variant: Variant) -> Module:
    """The Qwen2 text decoder under the HF prefix ``model``."""
    return Module(
        key="llm",
        label="text_decoder",
        role="decoder",
        before=(embedding(f"{model}.embed_tokens.weight"),),
        layer=qwen2_text_layer(f"{model}.layers.{{}}", variant),
        after=text_tail(f"{model}.norm.weight", head, variant),
    )


def two_linears(
    mm: str, hf: str, width: str, ffn: str, out: str, only: str = ""
) -> tuple[Row, ...]:
    """``linear_fc1`` and ``linear_fc2``, named so in HF too, with biases."""
    one, two = "linear_fc1", "linear_fc2"
    return (
        row(
            f"{mm}.{one}.weight",
            f"{hf}.{one}.weight",
            rows=ffn,
            cols=width,
            shard=COLUMN,
            only=only,
        ),
        row(f"{mm}.{one}.bias", f"{hf}.{one}.bias", rows=ffn, shard=COLUMN, only=only),
        row(f"{mm}.{two}.weight", f"{hf}.{two}.weight", rows=out, cols=ffn, shard=ROW, only=only),
        row(f"{mm}.{two}.bias", f"{hf}.{two}.bias", rows=out, only=only),
    )


def norms(
    kinds: tuple[str, ...], width: str, *pairs: tuple[str, str], only: str = ""
) -> tuple[Row, ...]:
    """Norms, replicated on every rank: (MM name, HF name) without ``.weight`` / ``.bias``."""
    return tuple(
        row(f"{mm}.{kind}", f"{hf}.{kind}", rows=width, only=only)
        for mm, hf in pairs
        for kind in kinds
    )


def qwen_patch_embed(hf: str) -> Row:
    """The patch embedding, a convolution (width, channels, time, height, width)."""
    mm = "image_encoder.encoder.patch_embed.proj.weight"
    return row(mm, f"{hf}.patch_embed.proj.weight", rows="vit.width")


def qwen_merger(hf: str, norm_kinds: tuple[str, ...]) -> tuple[Row, ...]:
    """The patch merger: the projector from vision to text."""
    p, m = "image_encoder.projector", "vit.merged"
    return (
        *norms(norm_kinds, "vit.width", (f"{p}.layernorm", f"{hf}.ln_q")),
        row(f"{p}.encoder.linear_fc1.weight", f"{hf}.mlp.0.weight", rows=m, cols=m, shard=COLUMN),
        row(f"{p}.encoder.linear_fc1.bias", f"{hf}.mlp.0.bias", rows=m, shard=COLUMN),
        row(
            f"{p}.encoder.linear_fc2.weight",
            f"{hf}.mlp.2.weight",
            rows="llm.hidden",
            cols=m,
            shard=ROW,
        ),
        row(f"{p}.encoder.linear_fc2.bias", f"{hf}.mlp.2.bias", rows="llm.hidden"),
    )


def vision_dims(
    config: Mapping[str, object],
    where: str,
    names: Mapping[str, tuple[str, ...]],
    defaults: Mapping[str, int] | None = None,
) -> Dims:
    """Sizes of a vision encoder: ``vit.*``; needs its layers, heads and width."""
    dims = read_dims(config, where, names, defaults)
    need(dims, where, {k: names[k] for k in ("vit.layers", "vit.heads", "vit.width")})
    dims["vit.qkv"] = 3 * dims["vit.width"]
    merge = dims.pop("vit.merge", 2)
    dims["vit.merged"] = dims["vit.width"] * merge * merge
    return dims
