"""Qwen2.5-Omni: vision, audio and text under ``thinker.``; the speech parts are carried."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.converters.blocks import (
    V,
    attention_output,
    gated_rows,
    norms,
    plain_mlp,
    qwen2_text,
    qwen_merger,
    qwen_patch_embed,
    text_dims,
    vision_dims,
)
from mmconvert.converters.configs import Dims, need, read_dims, section_or_defaults
from mmconvert.converters.family import Carried, Dropped, Family, Variant
from mmconvert.converters.rows import ZEROS, Module, Row, row
from mmconvert.names import NameTemplate
from mmconvert.sharding.spans import Interleave, heads

B = "thinker.visual.blocks.{}"
A = "audio_encoder.encoder.blocks.layers.{}"
L = "thinker.audio_tower.layers.{}"
BOTH = ("weight", "bias")

# Class defaults of transformers' Qwen2_5OmniVisionEncoderConfig and Qwen2_5OmniAudioEncoderConfig.
VISION_DEFAULTS = {"vit.layers": 32, "vit.heads": 16, "vit.width": 3584, "vit.ffn": 3420}
AUDIO_KEYS = {
    "audio.layers": ("encoder_layers", "num_hidden_layers"),
    "audio.heads": ("encoder_attention_heads",),
    "audio.width": ("d_model",),
    "audio.ffn": ("encoder_ffn_dim",),
}
AUDIO_DEFAULTS = {
    "audio.layers": 32,
    "audio.heads": 20,
    "audio.width": 1280,
    "audio.ffn": 5120,
}


# Class defaults of Qwen2_5OmniTextConfig.
TEXT_DEFAULTS = {
    "llm.layers": 28,
    "llm.heads": 28,
    "llm.query_groups": 4,
    "llm.hidden": 3584,
    "llm.ffn": 18944,
    "llm.vocab": 152064,
}
THINKER = "qwen2_5_omni_thinker"  # model_type of the thinker saved alone


def thinker_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The thinker's part; of a thinker that was saved alone, all."""
    if config.get("model_type") == THINKER:
        return config
    return section_or_defaults(config, "thinker_config")


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The thinker's text part."""
    return section_or_defaults(thinker_config(config), "text_config")


def dims(config: Mapping[str, object]) -> Dims:
    """Sizes from config.json: vision, audio and text of the thinker."""
    thinker = thinker_config(config)
    vision_keys = {
        "vit.layers": ("depth",),
        "vit.heads": ("num_heads",),
        "vit.width": ("hidden_size",),
        "vit.ffn": ("intermediate_size",),
        "vit.merge": ("spatial_merge_size",),
    }
    vision = section_or_defaults(thinker, "vision_config")
    found = vision_dims(vision, "thinker_config.vision_config", vision_keys, VISION_DEFAULTS)
    where = "thinker_config.audio_config"
    heard = section_or_defaults(thinker, "audio_config")
    audio = read_dims(heard, where, AUDIO_KEYS, AUDIO_DEFAULTS)
    need(audio, where, AUDIO_KEYS)
    text = text_dims(text_config(config), "thinker_config.text_config", TEXT_DEFAULTS)
    return found | audio | text


def separate_qkv(mm: str, hf: str, width: str, unit: str, bias: tuple[str, ...]) -> tuple[Row, ...]:
    """q, k, v stored apart in HF, packed per head in MM.

    Args:
        mm: MM prefix of the attention.
        hf: HF template with ``*`` for q, k or v.
        width: dimension of the model's width.
        unit: dimension that counts the heads.
        bias: the HF names of the three biases; ZEROS for one that HF does not have.
    """
    fuse, rows = Interleave(unit), f"{width} {width} {width}"
    weights = [hf.replace("*", x) + ".weight" for x in "qkv"]
    return (
        row(f"{mm}.weight", *weights, rows=rows, cols=width, fuse=fuse, shard=heads(unit)),
        row(f"{mm}.bias", *bias, rows=rows, fuse=fuse, shard=heads(unit)),
    )


def vision(variant: Variant) -> Module:
    """The vision encoder: as Qwen2.5-VL's, with q, k, v apart."""
    w = "vit.width"
    qkv = f"{B}.attn.*"
    return Module(
        key="vit",
        label="image_encoder",
        word="vision",
        before=(qwen_patch_embed("thinker.visual"),),
        layer=(
            *norms(("weight",), w, (f"{V}.input_layernorm", f"{B}.norm1")),
            *separate_qkv(
                f"{V}.self_attention.linear_qkv",
                qkv,
                w,
                "vit.heads",
                tuple(qkv.replace("*", x) + ".bias" for x in "qkv"),
            ),
            *attention_output(f"{V}.self_attention.linear_proj", f"{B}.attn.proj", w, "vit.heads"),
            *norms(("weight",), w, (f"{V}.pre_mlp_layernorm", f"{B}.norm2")),
            *gated_rows(f"{V}.mlp", f"{B}.mlp", w, "vit.ffn", variant, bias=True),
        ),
        after=qwen_merger("thinker.visual.merger", ("weight",)),
    )


def audio() -> Module:
    """The audio encoder (Whisper's): its k projection has no bias, MM packs zeros for it."""
    w, mm, hf = "audio.width", "audio_encoder.encoder", "thinker.audio_tower"
    attn = f"{L}.self_attn"
    biases = (f"{attn}.q_proj.bias", ZEROS, f"{attn}.v_proj.bias")
    return Module(
        key="audio",
        label="audio_encoder",
        medium="sounds",
        beside_text=True,
        before=(
            *norms(BOTH, w, (f"{mm}.conv1", f"{hf}.conv1"), (f"{mm}.conv2", f"{hf}.conv2")),
            row(f"{mm}.audio_bos_eos_token.weight", f"{hf}.audio_bos_eos_token.weight"),
        ),
        layer=(
            *norms(BOTH, w, (f"{A}.input_layernorm", f"{L}.self_attn_layer_norm")),
            *separate_qkv(
                f"{A}.self_attention.linear_qkv", f"{attn}.*_proj", w, "audio.heads", biases
            ),
            *attention_output(
                f"{A}.self_attention.linear_proj", f"{attn}.out_proj", w, "audio.heads"
            ),
            *norms(BOTH, w, (f"{A}.pre_mlp_layernorm", f"{L}.final_layer_norm")),
            *plain_mlp(f"{A}.mlp", L, w, "audio.ffn"),
        ),
        after=(
            *norms(BOTH, w, (f"{mm}.ln_post", f"{hf}.ln_post")),
            row(f"{mm}.proj.weight", f"{hf}.proj.weight", rows="llm.hidden", cols=w),
            row(f"{mm}.proj.bias", f"{hf}.proj.bias", rows="llm.hidden"),
        ),
    )


def modules(variant: Variant) -> tuple[Module, ...]:
    """The table."""
    return vision(variant), audio(), qwen2_text("thinker.model", "thinker.lm_head.weight", variant)


FAMILY = Family(
    name="Qwen2.5-Omni",
    converter="Qwen2_5_OmniConverter",
    model_types=frozenset({"qwen2_5_omni", THINKER}),
    dims=dims,
    modules=modules,
    text_config=text_config,
    # As transformers 5 names the thinker's parts; the hub has the second of each pair. A thinker
    # that was saved alone has no prefix.
    spellings=(
        ("thinker.model.visual.", "thinker.visual."),
        ("thinker.model.audio_tower.", "thinker.audio_tower."),
        ("thinker.model.language_model.", "thinker.model."),
        ("model.visual.", "thinker.visual."),
        ("model.audio_tower.", "thinker.audio_tower."),
        ("model.language_model.", "thinker.model."),
        *((name, f"thinker.{name}") for name in ("visual.", "audio_tower.", "model.", "lm_head.")),
    ),
    dropped=(
        Dropped(
            NameTemplate("thinker.audio_tower.positional_embedding.positional_embedding"),
            "a buffer that the model computes",
        ),
        Dropped(
            NameTemplate("thinker.visual.rotary_pos_emb.inv_freq"),
            "a buffer that the model computes",
        ),
        Dropped(
            NameTemplate("thinker.model.rotary_emb.inv_freq"), "a buffer that the model computes"
        ),
    ),
    carried=(
        Carried("talker.", "the talker is not trained in MM"),
        Carried("token2wav.", "the token2wav part is not trained in MM"),
    ),
    variants=(Variant(),),
    canonical=False,
    plain_text=False,
)
