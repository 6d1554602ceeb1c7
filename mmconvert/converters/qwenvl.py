"""Qwen-VL in MindFormers' form: the ViT and its resampler, Qwen text decoder.

Names and transforms: MindFormers 1.3.1, ``research/qwenvl/convert_weight.py``, whose files these
rows reproduce byte for byte. The order of the rows is the order of the tensors in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from mmconvert.converters.configs import Dims, need, read_dims, section
from mmconvert.converters.family import Dropped, Variant
from mmconvert.converters.mindspore import MSFamily
from mmconvert.converters.rows import Module, Row
from mmconvert.converters.rows import row as any_row
from mmconvert.names import NameTemplate
from mmconvert.sharding.spans import COLUMN, ROW, Part

row = partial(any_row, own="mindformers")

H, T = "transformer.h.{}", "llm_model.transformer.layers.{}"
HV, V = "transformer.visual", "vision_encoder"
HB, B = f"{HV}.transformer.resblocks.{{}}", f"{V}.transformer.resblocks.{{}}"
EMBEDDING = "llm_model.transformer.wte.embedding_weight"
HEAD = "llm_model.lm_head.weight"

_TEXT: Mapping[str, tuple[str, ...]] = {
    "llm.layers": ("num_hidden_layers",),
    "llm.heads": ("num_attention_heads",),
    "llm.hidden": ("hidden_size",),
}
_VISION: Mapping[str, tuple[str, ...]] = {
    "vit.layers": ("layers",),
    "vit.heads": ("heads",),
    "vit.width": ("width",),
}


def dims(config: Mapping[str, object]) -> Dims:
    """Sizes from config.json."""
    more = {"llm.head_dim": ("kv_channels",), "llm.vocab": ("vocab_size",)}
    found = read_dims(config, "text model", {**_TEXT, **more, "llm.ffn2": ("intermediate_size",)})
    need(found, "text model", _TEXT)
    found.setdefault("llm.head_dim", found["llm.hidden"] // found["llm.heads"])
    found["llm.q"] = found["llm.heads"] * found["llm.head_dim"]
    found["llm.qkv"] = 3 * found["llm.q"]
    if "llm.ffn2" in found:  # config.json counts w1 and w2 together
        found["llm.ffn"] = found.pop("llm.ffn2") // 2
    vision = section(config, "visual")
    found |= read_dims(vision, "visual", {**_VISION, "vit.out": ("output_dim",)})
    need(found, "visual", _VISION)
    found["vit.qkv"] = 3 * found["vit.width"]
    if "vit.out" in found:
        found["vit.pool_qkv"] = 3 * found["vit.out"]
    ratio = vision.get("mlp_ratio")
    if isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 < ratio < 1024:
        found["vit.ffn"] = int(found["vit.width"] * ratio)
    found["head.layers"] = 0
    return found


def _packed(mm: str, names: str, hf: str, kind: str, size: str, cols: str, heads: str) -> list[Row]:
    """The three linears that one packed HF tensor holds.

    Args:
        names: the last words of the three MM names.
        size: dimension of the packed rows.
        heads: dimension by which its rows are grouped; "" where q, k and v are contiguous.
    """
    cols = cols if kind == "weight" else ""
    return [
        row(f"{mm}.{name}.{kind}", hf, rows=size, cols=cols, fuse=Part(i, 3, heads), shard=COLUMN)
        for i, name in enumerate(names.split())
    ]


def _norm(mm: str, hf: str, size: str) -> tuple[Row, ...]:
    return (
        row(f"{mm}.gamma", f"{hf}.weight", rows=size),
        row(f"{mm}.beta", f"{hf}.bias", rows=size),
    )


def _projection(mm: str, hf: str, size: str) -> tuple[Row, ...]:
    """An attention's output, which MindFormers stores as [in, out]."""
    weight = f"{hf}.out_proj.weight"
    return (
        row(f"{mm}.projection.weight", weight, rows=size, cols=size, shard=COLUMN, transposed=True),
        row(f"{mm}.projection.bias", f"{hf}.out_proj.bias", rows=size),
    )


def _text() -> Module:
    w, ffn = "llm.hidden", "llm.ffn"
    attention, packed = f"{T}.attention", f"{H}.attn.c_attn"
    return Module(
        key="llm",
        label="llm_model.transformer",
        role="decoder",
        word="text",
        before=(row(EMBEDDING, "transformer.wte.weight", rows="llm.vocab", cols=w, shard=COLUMN),),
        layer=(
            row(f"{T}.attention_norm.weight", f"{H}.ln_1.weight", rows=w),
            *_packed(attention, "wq wk wv", f"{packed}.weight", "weight", "llm.qkv", w, ""),
            *_packed(attention, "wq wk wv", f"{packed}.bias", "bias", "llm.qkv", "", ""),
            row(
                f"{attention}.wo.weight", f"{H}.attn.c_proj.weight", rows=w, cols="llm.q", shard=ROW
            ),
            row(f"{T}.ffn_norm.weight", f"{H}.ln_2.weight", rows=w),
            # HF's w2 is the gate, w1 the other half; MindFormers' gate is w3, and w2 goes down.
            row(
                f"{T}.feed_forward.w1.weight", f"{H}.mlp.w1.weight", rows=ffn, cols=w, shard=COLUMN
            ),
            row(
                f"{T}.feed_forward.w3.weight", f"{H}.mlp.w2.weight", rows=ffn, cols=w, shard=COLUMN
            ),
            row(
                f"{T}.feed_forward.w2.weight", f"{H}.mlp.c_proj.weight", rows=w, cols=ffn, shard=ROW
            ),
        ),
        after=(row("llm_model.transformer.ln_f.weight", "transformer.ln_f.weight", rows=w),),
    )


def _block() -> tuple[Row, ...]:
    """A layer of the vision transformer. Both linears of its MLP are divided by columns."""
    w, ffn = "vit.width", "vit.ffn"
    attn, packed = f"{B}.attn", f"{HB}.attn.in_proj"
    dense = "dense1 dense2 dense3"
    return (
        *_norm(f"{B}.ln_1", f"{HB}.ln_1", w),
        *_norm(f"{B}.ln_2", f"{HB}.ln_2", w),
        *_packed(attn, dense, f"{packed}.weight", "weight", "vit.qkv", w, "vit.heads"),
        *_packed(attn, dense, f"{packed}.bias", "bias", "vit.qkv", "", "vit.heads"),
        *_projection(attn, f"{HB}.attn", w),
        row(f"{B}.mlp.c_fc.weight", f"{HB}.mlp.c_fc.weight", rows=ffn, cols=w, shard=COLUMN),
        row(f"{B}.mlp.c_fc.bias", f"{HB}.mlp.c_fc.bias", rows=ffn, shard=COLUMN),
        row(f"{B}.mlp.c_proj.weight", f"{HB}.mlp.c_proj.weight", rows=w, cols=ffn, shard=COLUMN),
        row(f"{B}.mlp.c_proj.bias", f"{HB}.mlp.c_proj.bias", rows=w, shard=COLUMN),
    )


def _resampler() -> tuple[Row, ...]:
    w = "vit.out"
    pool, packed = f"{V}.attn_pool", f"{HV}.attn_pool.attn.in_proj"
    dense = "dense1 dense2 dense3"
    return (
        row(f"{pool}.pos_embed", f"{HV}.attn_pool.pos_embed", cols=w),
        row(f"{pool}.query", f"{HV}.attn_pool.query", cols=w),
        row(
            f"{pool}.kv_proj.weight",
            f"{HV}.attn_pool.kv_proj.weight",
            rows=w,
            cols="vit.width",
            shard=COLUMN,
        ),
        *_packed(f"{pool}.attn", dense, f"{packed}_weight", "weight", "vit.pool_qkv", w, ""),
        *_packed(f"{pool}.attn", dense, f"{packed}_bias", "bias", "vit.pool_qkv", "", ""),
        *_projection(f"{pool}.attn", f"{HV}.attn_pool.attn", w),
        *_norm(f"{pool}.ln_q", f"{HV}.attn_pool.ln_q", w),
        *_norm(f"{pool}.ln_kv", f"{HV}.attn_pool.ln_kv", w),
    )


def _vision() -> Module:
    return Module(
        key="vit",
        label=V,
        word="vision",
        before=(
            row(f"{V}.positional_embedding", f"{HV}.positional_embedding", cols="vit.width"),
            row(f"{V}.proj", f"{HV}.proj", rows="vit.out", cols="vit.out", shard=COLUMN),
            row(f"{V}.conv1.weight", f"{HV}.conv1.weight", rows="vit.width"),
            *_norm(f"{V}.ln_pre", f"{HV}.ln_pre", "vit.width"),
        ),
        layer=_block(),
        after=(*_resampler(), *_norm(f"{V}.ln_post", f"{HV}.ln_post", "vit.out")),
    )


def modules(variant: Variant) -> tuple[Module, ...]:
    """The table; there is one."""
    del variant
    head = row(HEAD, "lm_head.weight", rows="llm.vocab", cols="llm.hidden", shard=COLUMN)
    # HF's module order, which is the order of the file: the output layer stands behind the ViT.
    return _text(), _vision(), Module("head", "llm_model.lm_head", (), (), (head,), role="head")


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    return config


BUFFER = "a buffer that the model computes"
FAMILY = MSFamily(
    name="Qwen-VL",
    converter="QwenVLConverter",
    model_types=frozenset({"qwen"}),
    dims=dims,
    modules=modules,
    text_config=_text_config,
    dropped=(
        Dropped(NameTemplate("transformer.rotary_emb.inv_freq"), BUFFER),
        Dropped(NameTemplate("transformer.h.{}.attn.rotary_emb.inv_freq"), BUFFER),
        Dropped(NameTemplate("transformer.h.{}.attn.masked_bias"), BUFFER),
    ),
    variants=(Variant(),),
    canonical=False,
    plain_text=False,
    preprocessor=False,  # the code beside the weights prepares images
    embedding=EMBEDDING,
    head=HEAD,
    tables=frozenset(
        {f"{V}.positional_embedding", f"{V}.attn_pool.pos_embed", f"{V}.attn_pool.query"}
    ),
    units=(("llm.heads", "attention heads"), ("vit.heads", "vision heads")),
)
