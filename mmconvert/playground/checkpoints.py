r"""Tiny deterministic Hugging Face checkpoints with the names and layer counts of real ones.

The bits of a tensor follow from its name and element count alone::

    raw  = SHAKE-256("mm-golden-v1\0" + seed + name), count * itemsize bytes, little endian
    bf16 : sign and mantissa kept, the exponent field becomes 111 + (its low 4 bits)
    f32  : likewise

so that every element is finite, normal, non-zero and of a magnitude in [2**-16, 1), and no
two tensors are alike. The golden records were made from the same values.

A table below has one line per module: its name, what it holds (``w`` weight, ``wb`` weight
and bias, ``wb?flag`` a bias only if the flag is set, ``-`` the name is the tensor's own), the
dimensions of the weight, and maybe ``?flag``: only if the flag is set.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Json = dict[str, Any]
Rename = Sequence[tuple[str, str]]

NEW_NAMES: Rename = (("visual.", "model.visual."), ("model.", "model.language_model."))
"""Prefixes of the hub and those of transformers >= 4.52 (Qwen2-VL, Qwen2.5-VL)."""

ITEM_BYTES = {"BF16": 2, "F32": 4}


class Tensor(NamedTuple):
    """A tensor to be written; its values are those of the name `seeded_by`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    seeded_by: str

    @property
    def nbytes(self) -> int:
        """The size of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Section(NamedTuple):
    """A table under a prefix, once or (`#` in the prefix) once per layer."""

    prefix: str
    table: str
    layers: str = ""
    when: str = ""
    sizes: Mapping[str, int | str] = {}
    dtype: str = "BF16"


# -------------------------------------------------------------------------------- tables
DECODER = """
    input_layernorm           w             hidden
    self_attn.q_proj          wb?qkv_bias   q hidden
    self_attn.k_proj          wb?qkv_bias   k hidden
    self_attn.v_proj          wb?qkv_bias   k hidden
    self_attn.o_proj          w             hidden q
    post_attention_layernorm  w             hidden
    mlp.gate_proj             w             inter hidden
    mlp.up_proj               w             inter hidden
    mlp.down_proj             w             hidden inter
"""
EMBEDDING = "embed_tokens  w  vocab_size hidden"
NORM = "norm  w  hidden"
LM_HEAD = "lm_head  w  vocab_size hidden  ?untied"
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
INTERNLM2_LAYER = """
    attention.wo     w  hidden hidden
    attention.wqkv   w  q+2k hidden
    attention_norm   w  hidden
    feed_forward.w1  w  inter hidden
    feed_forward.w2  w  hidden inter
    feed_forward.w3  w  inter hidden
    ffn_norm         w  hidden
"""
INTERN_PROJECTOR = """
    0  wb  4*vit_dim
    1  wb  hidden 4*vit_dim
    3  wb  hidden hidden
"""
INTERN_EMBEDDINGS = """
    class_embedding     -   1 1 vit_dim
    patch_embedding     wb  vit_dim 3 14 14
    position_embedding  -   1 1025 vit_dim
"""
INTERN_VIT = """
    ls1          -             vit_dim
    ls2          -             vit_dim
    attn.k_norm  w             vit_dim            ?vit_6b
    attn.proj    wb            vit_dim vit_dim
    attn.q_norm  w             vit_dim            ?vit_6b
    attn.qkv     wb?vit_300m   3*vit_dim vit_dim
    mlp.fc1      wb            4*vit_dim vit_dim
    mlp.fc2      wb            vit_dim 4*vit_dim
    norm1        wb?vit_300m   vit_dim
    norm2        wb?vit_300m   vit_dim
"""


def _language_model(prefix: str, when: str = "") -> tuple[Section, ...]:
    return (
        Section(f"{prefix}model.", EMBEDDING, when=when),
        Section(f"{prefix}model.layers.#.", DECODER, "layers", when),
        Section(f"{prefix}model.", NORM, when=when),
        Section(prefix, LM_HEAD, when=when),
    )


def _qwen_vit(prefix: str, block: str) -> tuple[Section, ...]:
    return (
        Section(prefix, PATCH_EMBED),
        Section(f"{prefix}blocks.#.", block, "vit_layers"),
        Section(f"{prefix}merger.", QWEN_MERGER),
    )


QWEN2VL_TENSORS = _qwen_vit("visual.", QWEN2_VIT) + _language_model("")
QWEN25VL_TENSORS = _qwen_vit("visual.", QWEN25_VIT) + _language_model("")
OMNI_TENSORS = (
    Section("thinker.audio_tower.", AUDIO_HEAD),
    Section("thinker.audio_tower.layers.#.", AUDIO_LAYER, "audio_layers"),
    Section("thinker.audio_tower.", AUDIO_TAIL),
    Section("thinker.", LM_HEAD),
    *_language_model("thinker.")[:-1],
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
QWEN3_LAYER = """
    input_layernorm           w   hidden
    self_attn.q_proj          w   q hidden
    self_attn.k_proj          w   k hidden
    self_attn.v_proj          w   k hidden
    self_attn.o_proj          w   hidden q
    self_attn.q_norm          w   head_dim
    self_attn.k_norm          w   head_dim
    post_attention_layernorm  w   hidden
    mlp.gate_proj             w   inter hidden       ?dense
    mlp.up_proj               w   inter hidden       ?dense
    mlp.down_proj             w   hidden inter       ?dense
    mlp.gate                  w   experts hidden     ?moe
    mlp.experts.gate_up_proj  -   experts hidden 2*moe_inter  ?stacked
    mlp.experts.down_proj     -   experts moe_inter hidden    ?stacked
"""
INTERNVL_TENSORS = (
    Section("language_model.model.", "tok_embeddings  w  vocab_size hidden", when="internlm2"),
    Section("language_model.model.layers.#.", INTERNLM2_LAYER, "layers", "internlm2"),
    Section("language_model.model.", NORM, when="internlm2"),
    Section("language_model.", "output  w  vocab_size hidden", when="internlm2"),
    Section("language_model.model.", EMBEDDING, when="not_internlm2"),
    Section("language_model.model.layers.#.", DECODER, "layers", "llama_or_qwen2"),
    Section("language_model.model.layers.#.", QWEN3_LAYER, "layers", "qwen3"),
    Section("language_model.model.", NORM, when="not_internlm2"),
    Section("language_model.", LM_HEAD, when="not_internlm2"),
    Section("mlp1.", INTERN_PROJECTOR),
    Section("vision_model.embeddings.", INTERN_EMBEDDINGS),
    Section("vision_model.encoder.layers.#.", INTERN_VIT, "vit_layers"),
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
GLM_LAYER = """
    input_layernorm           w   hidden
    mlp.down_proj             w   hidden inter
    mlp.gate_up_proj          w   2*inter hidden
    post_attention_layernorm  w   hidden
    post_mlp_layernorm        w   hidden
    post_self_attn_layernorm  w   hidden
    self_attn.k_proj          wb  k hidden
    self_attn.o_proj          w   hidden q
    self_attn.q_proj          wb  q hidden
    self_attn.v_proj          wb  k hidden
"""
GLM_BLOCK = """
    attn.proj      w  vit_dim vit_dim
    attn.qkv       w  3*vit_dim vit_dim
    mlp.down_proj  w  vit_dim hidden
    mlp.gate_proj  w  hidden vit_dim
    mlp.up_proj    w  hidden vit_dim
    norm1          w  vit_dim
    norm2          w  vit_dim
"""
GLM_VISION = """
    downsample                     wb  hidden vit_dim 2 2
    embeddings.position_embedding  w   576 vit_dim
    merger.down_proj               w   hidden inter
    merger.gate_proj               w   inter hidden
    merger.post_projection_norm    wb  hidden
    merger.proj                    w   hidden hidden
    merger.up_proj                 w   inter hidden
    patch_embed.proj               wb  vit_dim 3 2 14 14
    post_conv_layernorm            w   vit_dim
    post_layernorm                 w   vit_dim
"""
GLM_TENSORS = (
    Section("", LM_HEAD),
    Section("model.language_model.", EMBEDDING),
    Section("model.language_model.layers.#.", GLM_LAYER, "layers"),
    Section("model.language_model.", NORM),
    Section("model.visual.blocks.#.", GLM_BLOCK, "vit_layers"),
    Section("model.visual.", GLM_VISION),
)


MLA_LAYER = """
    input_layernorm               w  hidden
    self_attn.kv_a_layernorm      w  kv_lora
    self_attn.kv_a_proj_with_mqa  w  kv_a hidden
    self_attn.kv_b_proj           w  kv_b kv_lora
    self_attn.o_proj              w  hidden heads*v_dim
    self_attn.q_proj              w  mla_q hidden
    post_attention_layernorm      w  hidden
"""
DENSE_MLP = """
    gate_proj  w  inter hidden
    up_proj    w  inter hidden
    down_proj  w  hidden inter
"""
SIGLIP_BLOCK = """
    attn.proj  wb  vit_dim vit_dim
    attn.qkv   wb  3*vit_dim vit_dim
    mlp.fc1    wb  vit_inter vit_dim
    mlp.fc2    wb  vit_dim vit_inter
    norm1      wb  vit_dim
    norm2      wb  vit_dim
"""
SIGLIP_POOL = """
    latent   -   1 1 vit_dim
    q        wb  vit_dim vit_dim
    kv       wb  2*vit_dim vit_dim
    proj     wb  vit_dim vit_dim
    mlp.fc1  wb  vit_inter vit_dim
    mlp.fc2  wb  vit_dim vit_inter
    norm     wb  vit_dim
"""


def _deepseek_tensors(layers: int, experts: int) -> tuple[Section, ...]:
    """The first text layer is dense, the others have experts."""
    found = [Section("", "image_newline  -  hidden"), Section("", "view_seperator  -  hidden")]
    found.append(Section("language.model.", EMBEDDING))
    for layer in range(layers):
        prefix = f"language.model.layers.{layer}."
        found.append(Section(prefix, MLA_LAYER))
        if not layer:
            found.append(Section(f"{prefix}mlp.", DENSE_MLP))
            continue
        one = {"inter": "moe_inter"}
        found += [
            Section(f"{prefix}mlp.experts.{e}.", DENSE_MLP, sizes=one) for e in range(experts)
        ]
        found.append(Section(f"{prefix}mlp.", "gate  w  experts hidden"))
        found.append(Section(f"{prefix}mlp.", "gate.e_score_correction_bias  -  experts"))
        shared = {"inter": "shared_inter"}
        found.append(Section(f"{prefix}mlp.shared_experts.", DENSE_MLP, sizes=shared))
    return (
        *found,
        Section("language.model.", NORM),
        Section("language.", LM_HEAD),
        Section("projector.layers.", "0  wb  hidden 4*vit_dim\n2  wb  hidden hidden"),
        Section("vision.attn_pool.", SIGLIP_POOL),
        Section("vision.blocks.#.", SIGLIP_BLOCK, "vit_layers"),
        Section("vision.", "norm  wb  vit_dim\npatch_embed.proj  wb  vit_dim 3 14 14"),
        Section("vision.", "pos_embed  -  1 729 vit_dim"),
    )


def _single_experts(prefix: str, first: int, layers: int, experts: int) -> tuple[Section, ...]:
    """Each expert's own tensors, in layers from `first` on."""
    places = ((layer, e) for layer in range(first, layers) for e in range(experts))
    one = {"inter": "moe_inter"}
    return tuple(
        Section(f"{prefix}.{layer}.mlp.experts.{e}.", DENSE_MLP, sizes=one) for layer, e in places
    )


def _glm45v_tensors(layers: int, experts: int) -> tuple[Section, ...]:
    """The text decoder without its attention; the first layer is dense."""
    text = "model.language_model.layers"
    norms = "input_layernorm  w  hidden\npost_attention_layernorm  w  hidden"
    found = [Section(f"{text}.{layer}.", norms) for layer in range(layers)]
    for layer in range(1, layers):
        found.append(Section(f"{text}.{layer}.mlp.", "gate  w  experts hidden"))
        bias = "gate.e_score_correction_bias  -  experts"
        found.append(Section(f"{text}.{layer}.mlp.", bias, dtype="F32"))
    return (
        Section("model.language_model.", EMBEDDING),
        Section(f"{text}.0.mlp.", DENSE_MLP),
        *found,
        *_single_experts(text, 1, layers, experts),
        Section("model.language_model.", NORM),
        Section("", LM_HEAD),
        Section("model.visual.", "patch_embed.proj  w  16 3 2 14 14"),
    )


def _omni3_tensors(layers: int, experts: int) -> tuple[Section, ...]:
    """The thinker's text decoder, and a tensor of each of the other parts."""
    text = "thinker.model.layers"
    return (
        Section("thinker.model.", EMBEDDING),
        Section(f"{text}.#.", QWEN3_LAYER, "layers"),
        *_single_experts(text, 0, layers, experts),
        Section("thinker.model.", NORM),
        Section("thinker.", LM_HEAD),
        Section("thinker.visual.", "patch_embed.proj  w  16 3 2 16 16"),
        Section("talker.", "codec_head  w  32 24"),
        Section("code2wav.pre_transformer.", "norm  w  16"),
    )


def _flags(sizes: Json) -> Json:
    """The sizes together with what follows from them: flags and projection widths."""
    arch = sizes.get("arch")
    internlm2 = arch == "InternLM2ForCausalLM"
    qwen3 = arch in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
    six_b = sizes.get("vit_6b", False)
    omni = "audio_layers" in sizes
    return {
        **sizes,
        "q": sizes["heads"] * sizes["head_dim"],
        "k": sizes["kv"] * sizes["head_dim"],
        "q+2k": (sizes["heads"] + 2 * sizes["kv"]) * sizes["head_dim"],
        "untied": not sizes.get("tie", False),
        "qkv_bias": sizes.get("arch", "Qwen2ForCausalLM") == "Qwen2ForCausalLM",
        "merger_bias": "vit_inter" not in sizes,
        "fused_qkv": not omni,
        "split_qkv": omni,
        "internlm2": internlm2,
        "not_internlm2": not internlm2,
        "qwen3": qwen3,
        "llama_or_qwen2": not internlm2 and not qwen3,
        "vit_6b": six_b,
        "vit_300m": not six_b,
        "dense": not sizes.get("experts"),
        "moe": bool(sizes.get("experts")),
        "stacked": bool(sizes.get("experts")) and "deepstack" in sizes,
        "mergers": len(sizes.get("deepstack", ())),
    }


def _tensors(
    sections: Iterable[Section], sizes: Json
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor, in model order."""
    for section in sections:
        if section.when and not sizes[section.when]:
            continue
        other = {k: sizes[v] if isinstance(v, str) else v for k, v in section.sizes.items()}
        known = {**sizes, **other}
        for layer in range(known[section.layers] if section.layers else 1):
            for line in section.table.strip().splitlines():
                name, kind, *dims = line.split()
                if dims[-1].startswith("?") and not known[dims.pop()[1:]]:
                    continue
                name = section.prefix.replace("#", str(layer)) + name
                shape = tuple(
                    math.prod(known[x] if x in known else int(x) for x in dim.split("*"))
                    for dim in dims
                )
                kind, _, flag = kind.partition("?")
                yield name + (".weight" if "w" in kind else ""), shape, section.dtype
                if "b" in kind and (not flag or known[flag]):
                    yield f"{name}.bias", shape[:1], section.dtype


# -------------------------------------------------------------------------------- configs
MROPE = {"type": "mrope", "mrope_section": [1, 1, 1]}
ROPE_DEFAULT = {"type": "default", "rope_type": "default"}
TOKENS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654}


def _text(s: Json) -> Json:
    """What the text configs of all families share."""
    return {
        "hidden_act": "silu",
        "hidden_size": s["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": s["inter"],
        "max_position_embeddings": 32768,
        "num_attention_heads": s["heads"],
        "num_hidden_layers": s["layers"],
        "num_key_value_heads": s["kv"],
        "tie_word_embeddings": s.get("tie", False),
        "use_cache": True,
        "vocab_size": s["vocab_size"],
    }


def _qwen_text(s: Json) -> Json:
    return {
        **_text(s),
        "attention_dropout": 0.0,
        "max_window_layers": s["layers"],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
    }


def _flat_qwen(s: Json, architecture: str, model_type: str, version: str) -> Json:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **_qwen_text(s),
        **TOKENS,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "torch_dtype": "bfloat16",
        "transformers_version": version,
    }


def _qwen_patches(s: Json) -> Json:
    return {
        "depth": s["vit_layers"],
        "num_heads": s["vit_heads"],
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }


def _qwen25_vision(s: Json) -> Json:
    return {
        **_qwen_patches(s),
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": s["vit_dim"],
        "intermediate_size": s["vit_inter"],
        "out_hidden_size": s["hidden"],
        "window_size": 112,
    }


def _qwen2(s: Json) -> Json:
    return _flat_qwen(s, "Qwen2ForCausalLM", "qwen2", "4.43.1")


def _qwen2vl(s: Json) -> Json:
    vision = {"embed_dim": s["vit_dim"], "hidden_size": s["hidden"], "mlp_ratio": 4}
    return {
        **_flat_qwen(s, "Qwen2VLForConditionalGeneration", "qwen2_vl", "4.41.2"),
        "rope_scaling": MROPE,
        "vision_config": {**_qwen_patches(s), **vision},
    }


def _qwen25vl(s: Json) -> Json:
    return {
        **_flat_qwen(s, "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "4.41.2"),
        "rope_scaling": MROPE,
        "vision_config": {**_qwen25_vision(s), "tokens_per_second": 2},
    }


def _omni(s: Json) -> Json:
    init = {"init_std": 0.02, "initializer_range": 0.02}
    kind = "qwen2_5_omni"
    audio = {
        **init,
        "model_type": f"{kind}_audio_encoder",
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "attention_dropout": 0.0,
        "d_model": s["audio_dim"],
        "dropout": 0.0,
        "encoder_attention_heads": s["audio_heads"],
        "encoder_ffn_dim": 4 * s["audio_dim"],
        "encoder_layerdrop": 0.0,
        "encoder_layers": s["audio_layers"],
        "max_source_positions": 1500,
        "n_window": 100,
        "num_hidden_layers": s["audio_layers"],
        "num_mel_bins": s["mel"],
        "output_dim": s["hidden"],
        "scale_embedding": False,
    }
    text = {
        **init,
        **_qwen_text(s),
        "model_type": f"{kind}_text",
        "rope_scaling": {**ROPE_DEFAULT, "mrope_section": [1, 1, 1]},
    }
    vision = {
        **init,
        **_qwen25_vision(s),
        "model_type": f"{kind}_vision_encoder",
        "embed_dim": s["vit_dim"],
        "in_channels": 3,
        "tokens_per_second": 25,
    }
    thinker = {
        **init,
        **TOKENS,
        "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        "model_type": f"{kind}_thinker",
        "audio_config": audio,
        "text_config": text,
        "vision_config": vision,
        "audio_token_index": 151646,
        "audio_start_token_id": 151647,
        "audio_end_token_id": 151648,
        "image_token_index": 151655,
        "video_token_index": 151656,
        "bos_token_id": 151644,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
        "user_token_id": 872,
        "ignore_index": -100,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "torch_dtype": "bfloat16",
    }
    talker = {
        "architectures": ["Qwen2OmniTalkerForConditionalGeneration"],
        "model_type": f"{kind}_talker",
        "embedding_size": s["hidden"],
        "head_dim": 4,
        "hidden_size": s["talker_hidden"],
        "intermediate_size": 48,
        "num_attention_heads": 12,
        "num_hidden_layers": s["talker_layers"],
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {**ROPE_DEFAULT, "mrope_section": [1, 1, 0]},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 96,
    }
    bigvgan = {"mel_dim": 8, "model_type": f"{kind}_bigvgan", "upsample_initial_channel": 24}
    dit = {"depth": 1, "dim": 16, "heads": 2, "head_dim": 8}
    dit |= {"model_type": f"{kind}_dit", "torch_dtype": "float32"}
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": kind,
        "enable_audio_output": True,
        "enable_talker": True,
        "thinker_config": thinker,
        "talker_config": talker,
        "token2wav_config": {
            "model_type": f"{kind}_token2wav",
            "bigvgan_config": bigvgan,
            "dit_config": dit,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
    }


INTERNVL_LLMS: Mapping[str, Json] = {
    "InternLM2ForCausalLM": {
        "model_type": "internlm2",
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "rope_theta": 1000000,
    },
    "Qwen2ForCausalLM": {
        "model_type": "qwen2",
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
    },
    "Qwen3ForCausalLM": {"model_type": "qwen3", "attention_bias": False},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "attention_bias": False},
    "LlamaForCausalLM": {
        "model_type": "llama",
        "attention_bias": False,
        "pretraining_tp": 1,
        "rope_theta": 500000.0,
    },
}


def _internvl(s: Json) -> Json:
    six_b = s["vit_6b"]
    llm = {
        "architectures": [s["arch"]],
        **_text(s),
        **INTERNVL_LLMS[s["arch"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    if s["arch"].startswith("Qwen3"):
        llm["head_dim"] = s["head_dim"]
    if "experts" in s:
        llm |= {"num_experts": s["experts"], "moe_intermediate_size": s["moe_inter"]}
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.4 if six_b else 0.1,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": s["vit_dim"],
        "image_size": 448,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10 if six_b else 0.02,
        "intermediate_size": 4 * s["vit_dim"],
        "layer_norm_eps": 1e-06,
        "norm_type": "rms_norm" if six_b else "layer_norm",
        "num_attention_heads": s["vit_heads"],
        "num_channels": 3,
        "num_hidden_layers": s["vit_layers"],
        "output_attentions": False,
        "output_hidden_states": False,
        "patch_size": 14,
        "qk_normalization": six_b,
        "qkv_bias": not six_b,
        "return_dict": True,
        "torch_dtype": "bfloat16",
        "use_bfloat16": True,
        "use_flash_attn": True,
    }
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "llm_config": llm,
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
    }


def _qwen3vl(s: Json) -> Json:
    kind = "qwen3_vl_moe" if s["experts"] else "qwen3_vl"
    text = {**_text(s), "model_type": f"{kind}_text", "head_dim": s["head_dim"]}
    text |= {"attention_bias": False, "dtype": "bfloat16", "rms_norm_eps": 1e-06}
    if s["experts"]:
        del text["tie_word_embeddings"]
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        text |= {"moe_intermediate_size": s["moe_inter"], "num_experts": s["experts"]}
        text |= {"num_experts_per_tok": 2}
    moe = "Moe" if s["experts"] else ""
    return {
        "architectures": [f"Qwen3VL{moe}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": 151655,
        "text_config": text,
        "tie_word_embeddings": s["tie"],
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "deepstack_visual_indexes": s["deepstack"],
            "depth": s["vit_layers"],
            "hidden_size": s["vit_dim"],
            "in_channels": 3,
            "intermediate_size": s["vit_inter"],
            "model_type": kind,
            "num_heads": s["vit_heads"],
            "num_position_embeddings": 64,
            "out_hidden_size": s["hidden"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def _deepseek(s: Json) -> Json:
    language = {**_text(s), "model_type": "deepseek_v2", "first_k_dense_replace": 1}
    language |= {"kv_lora_rank": s["kv_lora"], "q_lora_rank": None, "n_shared_experts": 2}
    language |= {"moe_intermediate_size": s["moe_inter"], "n_routed_experts": s["experts"]}
    language |= {"num_key_value_heads": s["heads"], "qk_nope_head_dim": s["nope"]}
    language |= {"qk_rope_head_dim": s["rope"], "v_head_dim": s["v_dim"]}
    language |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    vision = {"layers": s["vit_layers"], "width": s["vit_dim"], "heads": s["vit_heads"]}
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "model_type": "deepseek_vl_v2",
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "language_config": language,
        "projector_config": {"model_type": "mlp_projector", "n_embed": s["hidden"]},
        "vision_config": {**vision, "mlp_ratio": 3.7362, "patch_size": 14},
    }


def _glm(s: Json) -> Json:
    text = {**_text(s), "attention_bias": True, "torch_dtype": "bfloat16"}
    config = {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "vision_config": {
            "depth": s["vit_layers"],
            "hidden_size": s["vit_dim"],
            "image_size": 336,
            "intermediate_size": s["inter"],
            "num_heads": s["vit_heads"],
            "out_hidden_size": s["hidden"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    if s["nested_config"]:
        return {**config, "text_config": {"model_type": "glm4v_text", **text}}
    return {**text, **config}


def _glm45v(s: Json) -> Json:
    text = {**_text(s), "model_type": "glm4v_moe_text", "first_k_dense_replace": 1}
    text |= {"moe_intermediate_size": s["moe_inter"], "n_routed_experts": s["experts"]}
    return {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "model_type": "glm4v_moe",
        "text_config": text,
        "vision_config": {"model_type": "glm4v_moe", "depth": 1},
        "transformers_version": "4.57.1",
    }


def _omni3(s: Json) -> Json:
    text = {**_text(s), "model_type": "qwen3_omni_moe_text", "head_dim": s["head_dim"]}
    text |= {"moe_intermediate_size": s["moe_inter"], "num_experts": s["experts"]}
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": text},
        "transformers_version": "4.57.0.dev0",
    }


# -------------------------------------------------------------------------------- models
class CatalogueModel(NamedTuple):
    """A catalogue entry; `shards` is the number of weight files."""

    sections: Sequence[Section]
    config: Callable[[Json], Json]
    sizes: Json
    shards: int


QWEN_VIT_SIZES = {"vit_layers": 32, "vit_dim": 64, "vit_heads": 16}
QWEN25_VIT_SIZES = {**QWEN_VIT_SIZES, "vit_inter": 60}
VIT_300M = {"vit_layers": 24, "vit_dim": 32, "vit_heads": 16, "vit_6b": False}
VIT_6B = {"vit_layers": 45, "vit_dim": 50, "vit_heads": 25, "vit_6b": True}
OMNI_SIZES = {
    "audio_layers": 32,
    "audio_dim": 40,
    "audio_heads": 20,
    "mel": 16,
    "talker_layers": 2,
    "talker_hidden": 48,
}


def _llm(layers: int, heads: int, kv: int, head_dim: int, inter: int, vocab_size: int) -> Json:
    """The sizes of a text model; the hidden size is that of all heads together."""
    return {
        "layers": layers,
        "heads": heads,
        "kv": kv,
        "head_dim": head_dim,
        "hidden": heads * head_dim,
        "inter": inter,
        "vocab_size": vocab_size,
    }


QWEN_7B = _llm(28, 28, 4, 6, 152, 336)


def _internvl_model(
    arch: str, llm: Json, vit: Json, shards: int, tie: bool = False
) -> CatalogueModel:
    return CatalogueModel(
        INTERNVL_TENSORS, _internvl, {**vit, **llm, "arch": arch, "tie": tie}, shards
    )


QWEN3_8B = {**_llm(36, 32, 8, 6, 192, 304), "hidden": 64, "experts": 0, "moe_inter": 0}


def _qwen3vl_model(
    depth: int, ffn: int, deepstack: list[int], *, tie: bool, shards: int, llm: Json = QWEN3_8B
) -> CatalogueModel:
    vit = {"vit_layers": depth, "vit_dim": 32, "vit_heads": 16, "vit_inter": ffn}
    more = {"deepstack": deepstack, "tie": tie}
    return CatalogueModel(QWEN3VL_TENSORS, _qwen3vl, {**vit, **llm, **more}, shards)


MODELS: Mapping[str, CatalogueModel] = {
    "qwen2vl-2b": CatalogueModel(
        QWEN2VL_TENSORS,
        _qwen2vl,
        {**QWEN_VIT_SIZES, **_llm(28, 12, 2, 6, 144, 304), "tie": True},
        2,
    ),
    "qwen2vl-7b": CatalogueModel(
        QWEN2VL_TENSORS, _qwen2vl, {**QWEN_VIT_SIZES, **QWEN_7B, "tie": False}, 5
    ),
    "qwen2.5vl-3b": CatalogueModel(
        QWEN25VL_TENSORS,
        _qwen25vl,
        {**QWEN25_VIT_SIZES, **_llm(36, 16, 2, 6, 176, 304), "tie": True},
        2,
    ),
    "qwen2.5vl-7b": CatalogueModel(
        QWEN25VL_TENSORS, _qwen25vl, {**QWEN25_VIT_SIZES, **QWEN_7B, "tie": False}, 5
    ),
    "qwen2.5-7b": CatalogueModel(_language_model(""), _qwen2, {**QWEN_7B, "tie": False}, 4),
    "qwen2.5omni-7b": CatalogueModel(
        OMNI_TENSORS, _omni, {**QWEN25_VIT_SIZES, **QWEN_7B, **OMNI_SIZES}, 5
    ),
    "internvl2-1b": _internvl_model(
        "Qwen2ForCausalLM", _llm(24, 14, 2, 4, 152, 361), VIT_300M, shards=2
    ),
    "internvl2-2b": _internvl_model(
        "InternLM2ForCausalLM", _llm(24, 16, 8, 4, 256, 361), VIT_300M, shards=2
    ),
    "internvl2-8b": _internvl_model(
        "InternLM2ForCausalLM", _llm(32, 32, 8, 2, 224, 361), VIT_300M, shards=4
    ),
    "internvl2-76b": _internvl_model(
        "LlamaForCausalLM", _llm(80, 64, 8, 2, 96, 265), VIT_6B, shards=5
    ),
    "internvl2.5-4b": _internvl_model(
        "Qwen2ForCausalLM", _llm(36, 16, 2, 4, 172, 362), VIT_300M, shards=2, tie=True
    ),
    "glm4.1v-9b": CatalogueModel(
        GLM_TENSORS,
        _glm,
        {"vit_layers": 24, "vit_dim": 48, "vit_heads": 12, "nested_config": False}
        | _llm(40, 32, 2, 2, 104, 304),
        4,
    ),
    "deepseekvl2": CatalogueModel(
        _deepseek_tensors(30, 16),
        _deepseek,
        {"vit_layers": 27, "vit_dim": 32, "vit_heads": 16, "vit_inter": 120}
        | {**_llm(30, 4, 4, 10, 96, 304), "experts": 16, "moe_inter": 12, "shared_inter": 24}
        | {"kv_lora": 16, "nope": 8, "rope": 4, "v_dim": 8}
        | {"kv_a": 16 + 4, "kv_b": 4 * (8 + 8), "mla_q": 4 * (8 + 4)},
        4,
    ),
    "qwen3vl-4b": _qwen3vl_model(24, 128, [5, 11, 17], tie=True, shards=2),
    "qwen3vl-8b": _qwen3vl_model(27, 120, [8, 16, 24], tie=False, shards=4),
    "qwen3vl-30b-a3b": _qwen3vl_model(
        27,
        120,
        [8, 16, 24],
        tie=False,
        shards=4,
        llm={**_llm(12, 8, 4, 6, 96, 304), "experts": 16, "moe_inter": 16},
    ),
    "internvl3-8b": _internvl_model(
        "Qwen2ForCausalLM", _llm(28, 28, 4, 2, 148, 362), VIT_300M, shards=4
    ),
    "internvl3.5-1b": _internvl_model(
        "Qwen3ForCausalLM",
        {**_llm(28, 16, 8, 8, 96, 362), "hidden": 48},
        VIT_300M,
        shards=1,
        tie=True,
    ),
    "internvl3.5-8b": _internvl_model(
        "Qwen3ForCausalLM", {**_llm(36, 16, 4, 8, 96, 362), "hidden": 64}, VIT_300M, shards=4
    ),
    "internvl3.5-30b-a3b": CatalogueModel(
        (*INTERNVL_TENSORS, *_single_experts("language_model.model.layers", 0, 4, 8)),
        _internvl,
        {**VIT_300M, **_llm(4, 8, 2, 8, 96, 362), "hidden": 48, "arch": "Qwen3MoeForCausalLM"}
        | {"tie": False, "experts": 8, "moe_inter": 24},
        3,
    ),
    "glm4.5v": CatalogueModel(
        _glm45v_tensors(4, 8),
        _glm45v,
        {**_llm(4, 4, 2, 12, 96, 304), "experts": 8, "moe_inter": 16},
        2,
    ),
    "qwen3omni-30b-a3b": CatalogueModel(
        _omni3_tensors(4, 8),
        _omni3,
        {**_llm(4, 8, 4, 6, 96, 304), "experts": 8, "moe_inter": 16},
        2,
    ),
}


# -------------------------------------------------------------------------------- writing
def renamed(name: str, rename: Rename = NEW_NAMES) -> str:
    """`name` with the first prefix that fits replaced; by default the new-style name."""
    for old, new in rename:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def tensor_bytes(name: str, shape: Sequence[int], dtype: str = "BF16", seed: str = "") -> bytes:
    """The little-endian bytes of a tensor, as the head of this file defines them."""
    size = math.prod(shape) * ITEM_BYTES[dtype]
    raw = hashlib.shake_256(b"mm-golden-v1\0" + (seed + name).encode()).digest(size)
    word, mantissa_bits = ("<u2", 7) if dtype == "BF16" else ("<u4", 23)
    bits = np.frombuffer(raw, word).astype(np.uint64)
    exponent = 111 + ((bits >> np.uint64(mantissa_bits)) & np.uint64(15))
    keep = np.uint64(~(255 << mantissa_bits) & (256 ** ITEM_BYTES[dtype] - 1))
    return ((bits & keep) | (exponent << np.uint64(mantissa_bits))).astype(word).tobytes()


def nested_config(config: Json) -> Json:
    """A flat Qwen2-VL or Qwen2.5-VL config in the form that transformers 5.x writes."""
    stays = {*TOKENS, "image_token_id", "video_token_id", "architectures", "model_type"}
    outer = {k: v for k, v in config.items() if k in stays}
    text = {k: v for k, v in config.items() if k not in stays}
    for key in ("torch_dtype", "transformers_version", "vision_config"):
        del text[key]
    rope = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    text |= {
        "model_type": f"{config['model_type']}_text",
        "dtype": config["torch_dtype"],
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
        "pad_token_id": None,
        "rope_parameters": {**text.pop("rope_scaling"), **rope},
        "sliding_window": config["sliding_window"] if config["use_sliding_window"] else None,
    }
    vision = {
        **config["vision_config"],
        "model_type": f"{config['model_type']}_vision",
        "in_channels": 3,
        "initializer_range": 0.02,
    }
    return {
        **outer,
        "dtype": config["torch_dtype"],
        "text_config": text,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "transformers_version": "5.23.0",
        "vision_config": vision,
    }


def write_json(path: Path, value: object) -> None:
    """Writes JSON as the hub's files have it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_side_files(out: Path, model: str) -> None:
    write_json(
        out / "generation_config.json",
        {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643]},
    )
    write_json(
        out / "tokenizer_config.json",
        {"model_max_length": 32768, "tokenizer_class": "Qwen2Tokenizer"},
    )
    write_json(out / "preprocessor_config.json", {"patch_size": 14, "temporal_patch_size": 2})
    write_json(out / "vocab.json", {"!": 0, "\u00e9": 1})
    (out / "merges.txt").write_text("#version: 0.2\n")
    (out / "README.md").write_text(f"# tiny {model}\n\nMade by a test; not trained.\n")
    (out / "examples").mkdir(exist_ok=True)
    (out / "examples" / "image1.txt").write_text("a file in a sub-folder\n")
    if model.startswith("internvl"):
        (out / "configuration_internvl_chat.py").write_text(
            'raise RuntimeError("the code of a checkpoint must not be run")\n'
        )


def write_safetensors(path: Path, tensors: Iterable[Tensor], seed: str) -> None:
    """Larger items first, then by name, as the safetensors library orders them."""
    ordered = sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.name))
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in ordered:
        start, end = end, end + t.nbytes
        offsets = [start, end]
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in ordered:
            file.write(tensor_bytes(t.seeded_by, t.shape, t.dtype, seed))


def _deal(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Cut the list into `count` runs of about equal bytes, none of them empty."""
    total, done = sum(t.nbytes for t in tensors), 0
    runs: list[list[Tensor]] = [[]]
    for left, t in zip(range(len(tensors) - 1, -1, -1), tensors, strict=True):
        runs[-1].append(t)
        done += t.nbytes
        missing = count - len(runs)
        if missing and (done * count >= total * len(runs) or left == missing):
            runs.append([])
    return runs


def make_hf(
    model: str,
    out: Path,
    shards: int | None = None,
    extra: Iterable[tuple[str, Sequence[int]]] = (),
    rename: Rename = (),
    seed: str = "",
    *,
    same_values: bool = False,
    edit_config: Callable[[Json], Json] | None = None,
    **overrides: int | bool | str | list[int],
) -> Path:
    """Write a checkpoint of the catalogue's `model` to `out` and return `out`.

    Args:
        model: a key of `MODELS`.
        out: the folder; made if it is not there.
        shards: number of weight files; 1 writes a lone `model.safetensors` without an index.
        extra: (name, shape) of further bf16 tensors.
        rename: (prefix, new prefix) pairs; the first that fits a name is applied.
        seed: other values under the same names.
        same_values: a renamed tensor keeps the values of its old name.
        edit_config: applied to the config before it is written, such as `nested_config`.
        overrides: sizes of the catalogue entry to replace, such as `vocab_size=301`.
    """
    sections, config, sizes, default_shards = MODELS[model]
    if unknown := set(overrides) - set(sizes):
        raise TypeError(f"{model} has no size {sorted(unknown)}; it has {sorted(sizes)}")
    sizes = {**sizes, **overrides}
    listed = [*_tensors(sections, _flags(sizes)), *((n, tuple(s), "BF16") for n, s in extra)]
    tensors: list[Tensor] = []
    for name, shape, dtype in listed:
        new = renamed(name, rename)
        tensors.append(Tensor(new, shape, dtype, name if same_values else new))
    if len({t.name for t in tensors}) != len(tensors):
        raise ValueError("a tensor name occurs twice")

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", (edit_config or dict)(config(sizes)))
    _write_side_files(out, model)
    write_weights(out, tensors, shards or default_shards, seed)
    return out


def write_weights(out: Path, tensors: Sequence[Tensor], count: int, seed: str = "") -> None:
    """Writes the weight files of a checkpoint, and their index if there is more than one."""
    runs = _deal(tensors, count)
    if len(runs) == 1:
        write_safetensors(out / "model.safetensors", tensors, seed)
        return
    weight_map: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        file = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        write_safetensors(out / file, run, seed)
        weight_map |= {t.name: file for t in run}
    write_json(
        out / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(t.nbytes for t in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )
