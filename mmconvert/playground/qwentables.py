"""The tensors of the Qwen models, from Qwen2-VL to Qwen3-Omni."""

from __future__ import annotations

from mmconvert.playground.sections import (
    DECODER,
    EMBEDDING,
    LM_HEAD,
    NORM,
    QWEN3_LAYER,
    Section,
    language_model_sections,
    single_experts,
)

PATCH_EMBED = "patch_embed.proj  w  vit_dim 3 2 14 14"

QWEN2_VIT = """
    norm1      wb  vit_dim
    norm2      wb  vit_dim
    attn.qkv   wb  3*vit_dim vit_dim
    attn.proj  wb  vit_dim vit_dim
    mlp.fc1    wb  4*vit_dim vit_dim
    mlp.fc2    wb  vit_dim 4*vit_dim
"""
QWEN25_VIT = """
    norm1          w   vit_dim
    norm2          w   vit_dim
    attn.qkv       wb  3*vit_dim vit_dim   ?fused_qkv
    attn.q         wb  vit_dim vit_dim     ?split_qkv
    attn.k         wb  vit_dim vit_dim     ?split_qkv
    attn.v         wb  vit_dim vit_dim     ?split_qkv
    attn.proj      wb  vit_dim vit_dim
    mlp.gate_proj  wb  vit_inter vit_dim
    mlp.up_proj    wb  vit_inter vit_dim
    mlp.down_proj  wb  vit_dim vit_inter
"""
QWEN_MERGER = """
    ln_q   wb?merger_bias  vit_dim
    mlp.0  wb              4*vit_dim 4*vit_dim
    mlp.2  wb              hidden 4*vit_dim
"""
AUDIO_HEAD = """
    audio_bos_eos_token  w   2 hidden
    conv1                wb  audio_dim mel 3
    conv2                wb  audio_dim audio_dim 3
"""
AUDIO_LAYER = """
    fc1                   wb  4*audio_dim audio_dim
    fc2                   wb  audio_dim 4*audio_dim
    final_layer_norm      wb  audio_dim
    self_attn.k_proj      w   audio_dim audio_dim
    self_attn.out_proj    wb  audio_dim audio_dim
    self_attn.q_proj      wb  audio_dim audio_dim
    self_attn.v_proj      wb  audio_dim audio_dim
    self_attn_layer_norm  wb  audio_dim
"""
AUDIO_TAIL = """
    ln_post  wb  audio_dim
    proj     wb  hidden audio_dim
"""
TOKEN2WAV = """
    code2wav_bigvgan_model.conv_pre                    wb  24 8 7
    code2wav_bigvgan_model.ups.0.0.weight              -   24 12 11
    code2wav_bigvgan_model.ups.0.0.bias                -   12
    code2wav_bigvgan_model.conv_post                   w   1 12 7
    code2wav_dit_model.input_embed.proj                wb  16 40
    code2wav_dit_model.transformer_blocks.0.attn.to_q  wb  16 16
    code2wav_dit_model.norm_out.linear                 w   32 16
    code2wav_dit_model.proj_out                        w   8 16
"""


def _qwen_vit(prefix: str, block: str) -> tuple[Section, ...]:
    return (
        Section(prefix, PATCH_EMBED),
        Section(f"{prefix}blocks.#.", block, "vit_layers"),
        Section(f"{prefix}merger.", QWEN_MERGER),
    )


QWEN2VL_TENSORS = _qwen_vit("visual.", QWEN2_VIT) + language_model_sections("")
QWEN25VL_TENSORS = _qwen_vit("visual.", QWEN25_VIT) + language_model_sections("")
OMNI_TENSORS = (
    Section("thinker.audio_tower.", AUDIO_HEAD),
    Section("thinker.audio_tower.layers.#.", AUDIO_LAYER, "audio_layers"),
    Section("thinker.audio_tower.", AUDIO_TAIL),
    Section("thinker.", LM_HEAD),
    *language_model_sections("thinker.")[:-1],
    *_qwen_vit("thinker.visual.", QWEN25_VIT),
    Section("talker.", "thinker_to_talker_proj  wb  talker_hidden hidden"),
    Section("talker.model.", "embed_tokens  w  96 hidden"),
    Section(
        "talker.model.layers.#.",
        DECODER,
        "talker_layers",
        sizes={"hidden": "talker_hidden", "q": 48, "k": 16, "inter": 48},
    ),
    Section("talker.model.", NORM, sizes={"hidden": "talker_hidden"}),
    Section("talker.", "codec_head  w  96 talker_hidden"),
    Section("token2wav.", TOKEN2WAV, dtype="F32"),
)


QWEN3_BLOCK = """
    attn.proj       wb  vit_dim vit_dim
    attn.qkv        wb  3*vit_dim vit_dim
    mlp.linear_fc1  wb  vit_inter vit_dim
    mlp.linear_fc2  wb  vit_dim vit_inter
    norm1           wb  vit_dim
    norm2           wb  vit_dim
"""
QWEN3_MERGER = """
    linear_fc1  wb  4*vit_dim 4*vit_dim
    linear_fc2  wb  hidden 4*vit_dim
"""
QWEN3_PATCHES = """
    patch_embed.proj  wb  vit_dim 3 2 16 16
    pos_embed         w   64 vit_dim
"""
QWEN3VL_TENSORS = (
    Section("model.language_model.", EMBEDDING),
    Section("model.language_model.layers.#.", QWEN3_LAYER, "layers"),
    Section("model.language_model.", NORM),
    Section("model.visual.blocks.#.", QWEN3_BLOCK, "vit_layers"),
    Section("model.visual.deepstack_merger_list.#.", QWEN3_MERGER, "mergers"),
    Section("model.visual.deepstack_merger_list.#.", "norm  wb  4*vit_dim", "mergers"),
    Section("model.visual.merger.", QWEN3_MERGER + "    norm  wb  vit_dim"),
    Section("model.visual.", QWEN3_PATCHES),
    Section("", LM_HEAD),
)


def omni3_tensors(layers: int, experts: int) -> tuple[Section, ...]:
    """The thinker's text decoder, and a tensor of each of the other parts."""
    text = "thinker.model.layers"
    return (
        Section("thinker.model.", EMBEDDING),
        Section(f"{text}.#.", QWEN3_LAYER, "layers"),
        *single_experts(text, 0, layers, experts),
        Section("thinker.model.", NORM),
        Section("thinker.", LM_HEAD),
        Section("thinker.visual.", "patch_embed.proj  w  16 3 2 16 16"),
        Section("talker.", "codec_head  w  32 24"),
        Section("code2wav.pre_transformer.", "norm  w  16"),
    )
