"""The tensors of the InternVL, GLM and DeepSeek models."""

from __future__ import annotations

from mmconvert.playground.sections import (
    DECODER,
    DENSE_MLP,
    EMBEDDING,
    LM_HEAD,
    NORM,
    QWEN3_LAYER,
    Section,
    single_experts,
)

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


def deepseek_tensors(layers: int, experts: int) -> tuple[Section, ...]:
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


def glm45v_tensors(layers: int, experts: int) -> tuple[Section, ...]:
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
        *single_experts(text, 1, layers, experts),
        Section("model.language_model.", NORM),
        Section("", LM_HEAD),
        Section("model.visual.", "patch_embed.proj  w  16 3 2 14 14"),
    )
