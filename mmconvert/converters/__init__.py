"""The registry of families: converter name -> family, each loaded only when asked for."""

from __future__ import annotations

from importlib import import_module

from mmconvert.converters.family import Family
from mmconvert.converters.plugins import load_plugin, third_party
from mmconvert.errors import RequestError

BROKEN: dict[str, str] = {}  # converter name -> why a family of another package was left out

BUILT_IN = {
    "Qwen2VLConverter": "mmconvert.converters.qwen2vl",
    "Qwen2_5_VLConverter": "mmconvert.converters.qwen2_5vl",
    "Qwen2_5_OmniConverter": "mmconvert.converters.qwen2_5omni",
    "InternVLConverter": "mmconvert.converters.internvl",
    "Qwen3VLMegatronConverter": "mmconvert.converters.qwen3vl",
    "GlmConverter": "mmconvert.converters.glm",
    "DeepSeekVLConverter": "mmconvert.converters.deepseekvl2",
}

# Families whose other side is MindSpore (MindFormers) instead of MM format; verbs of their own.
MINDSPORE = {"QwenVLConverter": "mmconvert.converters.qwenvl"}

# MindSpeed-MM's converters that are refused here: what is known of each, and the way out.
REFUSED = {
    "VideoAlignConverter": (
        "VideoAlignConverter is not served: MindSpeed-MM's own loses q, k, v, gate and up of every "
        "layer by default, and with a resized vocabulary draws rows at random; no record tells "
        "what its checkpoint should be",
        "a model whose conversion can be proven",
        "the base model alone: Qwen2VLConverter with --cfg.common_model_config."
        "enable_canonical_hf_struct True. LoRA pairs are to be merged before, and the reward "
        "head (rm_head) has no place in it",
    )
}


def converter_names() -> list[str]:
    """Names of all converters, built in and third-party; imports none of them."""
    return sorted([*BUILT_IN, *(name for name in third_party() if name not in BUILT_IN)])


def load(converter: str) -> Family:
    """The family of a converter name.

    Raises:
        RequestError: no such converter, or one of another package that cannot be loaded.
    """
    if own := BUILT_IN.get(converter) or MINDSPORE.get(converter):
        return import_module(own).FAMILY
    entry = third_party().get(converter)
    if entry is None and converter in REFUSED:
        raise RequestError(*REFUSED[converter])
    if entry is None:
        raise RequestError(
            f"there is no converter {converter}", "one of " + ", ".join(converter_names())
        )
    return load_plugin(converter, entry)


def ms_registry() -> dict[str, Family]:
    """All families whose other side is MindSpore, by converter name."""
    everything = {name: load(name) for name in MINDSPORE} | _plugins()
    return {name: f for name, f in everything.items() if f.naming == "mindformers"}


def registry() -> dict[str, Family]:
    """All families whose other side is MM format, by converter name.

    One of another package that cannot be loaded is left out, and noted in :data:`BROKEN`.
    """
    everything = {name: load(name) for name in BUILT_IN} | _plugins()
    return {name: f for name, f in sorted(everything.items()) if f.naming == "mm"}


def _plugins() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for name in third_party():
        if name in BUILT_IN or name in MINDSPORE:
            continue
        try:
            found[name] = load(name)
        except RequestError as error:
            BROKEN[name] = error.what
    return found
