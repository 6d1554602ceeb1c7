"""Names of Megatron-Core's ``torch_dist`` folders, as Megatron-Bridge and ms-swift write them.

Tensors are whole, and those of equal layers are one tensor with the layers in front. Source: the
keys of Megatron-Core's ``sharded_state_dict``; mappings of Megatron-Bridge and of mcore-bridge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module, Row
from mmconvert.formats.mm.instances import Instance
from mmconvert.names import LAYER, fill

TEXT = "language_model."
HF_VISION = ("visual.visual.", "visual.")  # of ms-swift, of Megatron-Bridge; the longest first
# Families whose Megatron models have these modules.
FAMILIES = ("Qwen2_5_VLConverter", "Qwen3VLMegatronConverter")
# MM prefix -> theirs, of the vision encoder that is Megatron's own (Qwen3-VL of Megatron-Bridge).
_VISION = (
    ("image_encoder.encoder.patch_embed.", "vision_model.patch_embed."),
    ("image_encoder.encoder.pos_embed.", "vision_model.pos_embed."),
    (
        "image_encoder.encoder.blocks.layers.{layer}.deepstack_layer.layernorm.",
        "vision_model.decoder.deepstack_merger_list.{index}.patch_norm.",
    ),
    (
        "image_encoder.encoder.blocks.layers.{layer}.deepstack_layer.encoder.",
        "vision_model.decoder.deepstack_merger_list.{index}.",
    ),
    ("image_encoder.encoder.blocks.layers.{layer}.", "vision_model.decoder.layers.{layer}."),
    ("image_encoder.projector.layernorm.", "vision_model.merger.patch_norm."),
    ("image_encoder.projector.encoder.", "vision_model.merger."),
)
# Norms that Transformer Engine fuses into the linear behind them; Megatron-Core names them so
# without it too, but where experts are behind them.
_NORMS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
_EXPERTS = ".mlp.experts.local_experts.{expert}."
EXPERTS = ".mlp.experts.experts."


class KeyPlace(NamedTuple):
    """Where a whole lies.

    Attributes:
        key: template of the tensor's key; numbers of layers, where it has them, stand in it only
            if the layers are not one tensor.
        by_layer: the layers are the first dimension of one tensor.
        by_expert: the experts are the next one.
    """

    key: str
    by_layer: bool = False
    by_expert: bool = False


def place_of(row: Row, module: Module, *, experts: bool) -> KeyPlace:
    """Where a row's wholes lie.

    Args:
        experts: the module's layers have experts.
    """
    mm = row.mm
    if module.role == "decoder":
        key = TEXT + mm.removeprefix("text_decoder.")
    else:
        old, new = next(pair for pair in _VISION if mm.startswith(pair[0]))
        key = new + mm[len(old) :]
    for name, fused in _NORMS if LAYER in key else ():
        if not (experts and "mlp" in fused):
            key = key.replace(name, fused)
    by_expert = _EXPERTS in key
    key = key.replace(_EXPERTS, EXPERTS)
    return KeyPlace(key, LAYER in key, by_expert)


def without_te(place: KeyPlace) -> KeyPlace:
    """Where a whole lies in what Megatron-Core saves without Transformer Engine: there the norms
    before experts too have the names of fused ones.
    """
    key = place.key
    for name, fused in _NORMS if LAYER in key else ():
        key = key.replace(name, fused)
    return place._replace(key=key)


def joined(key: str) -> str:
    """The key of the tensor that holds all layers."""
    return key.replace(f"{LAYER}.", "")


def key_of(place: KeyPlace, item: Instance) -> str:
    """The key with the numbers that stand in it."""
    layers = item.row.layers or ()
    index = layers.index(item.layer) if item.layer in layers else item.layer
    return fill(place.key, item.layer, item.expert, index)


def hf_vision(names: Mapping[str, object]) -> str:
    """What stands before ``visual.`` of the hub's names where the vision encoder has these; "-"
    where it has Megatron's own.
    """
    found = next((p for p in HF_VISION if any(name.startswith(p) for name in names)), "")
    return found.removesuffix("visual.") if found else "-"


def serves(family: Family) -> bool:
    """Whether a family's models are written in this form somewhere."""
    return family.converter in FAMILIES
