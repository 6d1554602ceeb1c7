"""The models of the playground, by name, with their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mmconvert.playground.moreconfigs import (
    deepseek_config,
    glm45v_config,
    glm_config,
    internvl_config,
)
from mmconvert.playground.moretables import (
    GLM_TENSORS,
    INTERNVL_TENSORS,
    deepseek_tensors,
    glm45v_tensors,
)
from mmconvert.playground.qwenconfigs import (
    omni3_config,
    omni_config,
    qwen2_config,
    qwen2vl_config,
    qwen3vl_config,
    qwen25vl_config,
)
from mmconvert.playground.qwentables import (
    OMNI_TENSORS,
    QWEN2VL_TENSORS,
    QWEN3VL_TENSORS,
    QWEN25VL_TENSORS,
    omni3_tensors,
)
from mmconvert.playground.sections import Section, language_model_sections, single_experts
from mmconvert.playground.weights import Json


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
        INTERNVL_TENSORS, internvl_config, {**vit, **llm, "arch": arch, "tie": tie}, shards
    )


QWEN3_8B = {**_llm(36, 32, 8, 6, 192, 304), "hidden": 64, "experts": 0, "moe_inter": 0}


def _qwen3vl_model(
    depth: int, ffn: int, deepstack: list[int], *, tie: bool, shards: int, llm: Json = QWEN3_8B
) -> CatalogueModel:
    vit = {"vit_layers": depth, "vit_dim": 32, "vit_heads": 16, "vit_inter": ffn}
    more = {"deepstack": deepstack, "tie": tie}
    return CatalogueModel(QWEN3VL_TENSORS, qwen3vl_config, {**vit, **llm, **more}, shards)


MODELS: Mapping[str, CatalogueModel] = {
    "qwen2vl-2b": CatalogueModel(
        QWEN2VL_TENSORS,
        qwen2vl_config,
        {**QWEN_VIT_SIZES, **_llm(28, 12, 2, 6, 144, 304), "tie": True},
        2,
    ),
    "qwen2vl-7b": CatalogueModel(
        QWEN2VL_TENSORS, qwen2vl_config, {**QWEN_VIT_SIZES, **QWEN_7B, "tie": False}, 5
    ),
    "qwen2.5vl-3b": CatalogueModel(
        QWEN25VL_TENSORS,
        qwen25vl_config,
        {**QWEN25_VIT_SIZES, **_llm(36, 16, 2, 6, 176, 304), "tie": True},
        2,
    ),
    "qwen2.5vl-7b": CatalogueModel(
        QWEN25VL_TENSORS, qwen25vl_config, {**QWEN25_VIT_SIZES, **QWEN_7B, "tie": False}, 5
    ),
    "qwen2.5-7b": CatalogueModel(
        language_model_sections(""), qwen2_config, {**QWEN_7B, "tie": False}, 4
    ),
    "qwen2.5omni-7b": CatalogueModel(
        OMNI_TENSORS, omni_config, {**QWEN25_VIT_SIZES, **QWEN_7B, **OMNI_SIZES}, 5
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
        glm_config,
        {"vit_layers": 24, "vit_dim": 48, "vit_heads": 12, "nested_config": False}
        | _llm(40, 32, 2, 2, 104, 304),
        4,
    ),
    "deepseekvl2": CatalogueModel(
        deepseek_tensors(30, 16),
        deepseek_config,
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
        (*INTERNVL_TENSORS, *single_experts("language_model.model.layers", 0, 4, 8)),
        internvl_config,
        {**VIT_300M, **_llm(4, 8, 2, 8, 96, 362), "hidden": 48, "arch": "Qwen3MoeForCausalLM"}
        | {"tie": False, "experts": 8, "moe_inter": 24},
        3,
    ),
    "glm4.5v": CatalogueModel(
        glm45v_tensors(4, 8),
        glm45v_config,
        {**_llm(4, 4, 2, 12, 96, 304), "experts": 8, "moe_inter": 16},
        2,
    ),
    "qwen3omni-30b-a3b": CatalogueModel(
        omni3_tensors(4, 8),
        omni3_config,
        {**_llm(4, 8, 4, 6, 96, 304), "experts": 8, "moe_inter": 16},
        2,
    ),
}
