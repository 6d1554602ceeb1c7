"""Tables of tensors: how they are read, and those that several models share.

A table has one line per module: its name, what it holds (``w`` weight, ``wb`` weight and bias,
``wb?flag`` a bias only if the flag is set, ``-`` the name is the tensor's own), the dimensions of
the weight, and maybe ``?flag``: only if the flag is set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mmconvert.playground.weights import Json


class Section(NamedTuple):
    """A table under a prefix, once or (`#` in the prefix) once per layer."""

    prefix: str
    table: str
    layers: str = ""
    when: str = ""
    sizes: Mapping[str, int | str] = {}
    dtype: str = "BF16"


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


def language_model_sections(prefix: str, when: str = "") -> tuple[Section, ...]:
    """The tables of a plain language model."""
    return (
        Section(f"{prefix}model.", EMBEDDING, when=when),
        Section(f"{prefix}model.layers.#.", DECODER, "layers", when),
        Section(f"{prefix}model.", NORM, when=when),
        Section(prefix, LM_HEAD, when=when),
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
DENSE_MLP = """
    gate_proj  w  inter hidden
    up_proj    w  inter hidden
    down_proj  w  hidden inter
"""


def single_experts(prefix: str, first: int, layers: int, experts: int) -> tuple[Section, ...]:
    """Each expert's own tensors, in layers from `first` on."""
    places = ((layer, e) for layer in range(first, layers) for e in range(experts))
    one = {"inter": "moe_inter"}
    return tuple(
        Section(f"{prefix}.{layer}.mlp.experts.{e}.", DENSE_MLP, sizes=one) for layer, e in places
    )


def flags_of(sizes: Json) -> Json:
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


def listed_tensors(
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
