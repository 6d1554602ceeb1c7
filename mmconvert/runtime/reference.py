"""The other side of the comparison: transformers' own model with the weights of the HF folder."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mmconvert.causes.quantised import quantised
from mmconvert.errors import TensorError
from mmconvert.formats.hf.folder import open_hf
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.peft.folder import LoraPair, open_peft
from mmconvert.formats.peft.names import Names
from mmconvert.formats.recognise import family_of
from mmconvert.names import NO_EXPERT
from mmconvert.runtime.batch import Batch, appended
from mmconvert.runtime.families import ORIGINAL, Architecture
from mmconvert.runtime.hfweights import (
    EXPERTS,
    Computed,
    Weights,
    mapped,
    other_way_round,
    qwen_name,
)


def load_reference(
    arch: Architecture,
    hf_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Path | None = None,
) -> tuple[Any, Weights]:
    """Transformers' model and its weights, of which the inner layers' stay in their files.

    Args:
        adapter: PEFT's folder of an adapter that the weights get.

    Raises:
        CheckpointError: weights are missing, damaged, or of another model.
    """
    stored = open_hf(hf_dir)  # clear errors for missing and truncated files
    tensors = stored.tensors()
    weights = [t for name, t in tensors.items() if name.endswith(".weight")]
    if (fault := quantised(tensors.values(), weights, stored.config)) is not None:
        raise fault
    text = arch.text_config
    heads, groups = text.num_attention_heads, text.num_key_value_heads

    def intern(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return native_names(name, tensor, heads, groups)

    model = arch.skeleton(dtype)
    transposed = other_way_round(model, tensors)

    def qwen(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        turn = transposed and EXPERTS in name
        return [(qwen_name(name), tensor.transpose(1, 2) if turn else tensor)]

    def own(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return [(own_name(name), tensor)]

    naming = intern if arch.kind == ORIGINAL else own if arch.intern else qwen
    changes = {} if adapter is None else _changes(adapter, hf_dir, list(tensors), transposed)
    return model, Weights(arch, model, tensors, naming, dtype, device, changes)


def _changes(
    adapter: Path, hf_dir: Path, names: Sequence[str], transposed: bool
) -> dict[str, Computed]:
    """What an adapter adds to each weight of a folder: scale * B @ A in float32, as PEFT merges.

    Args:
        transposed: the folder's stacks of experts have their inputs first.

    Raises:
        TensorError: it changes a weight that the folder has not.
    """
    model = config_model(family_of(hf_dir), hf_dir)
    family = model.family
    found = open_peft(adapter, Names(family, family.table(model.variant)), model.dims)
    hubs = {family.hub_name(name): name for name in names}
    parts: dict[str, list[LoraPair]] = {}
    for (hub, _), part in found.parts.items():
        parts.setdefault(hub, []).append(part)
    stacks = {hub for hub, expert in found.parts if expert != NO_EXPERT}

    def product(part: LoraPair) -> Tensor:
        scale = part.scale
        if scale is None:
            scale = found.settings.scale(part.path, part.rank)  # an error that says what is missing
        return (mapped(part.b).float() @ mapped(part.a).float()) * scale

    def change(hub: str) -> Tensor:
        if hub not in stacks:
            return product(parts[hub][0])
        stack = torch.stack(list(map(product, parts[hub])))
        return stack.transpose(1, 2) if transposed else stack

    if lost := sorted(parts.keys() - hubs.keys()):
        raise TensorError(f"{adapter}: {lost[0]} is adapted", "weights of the model")
    return {hubs[hub]: partial(change, hub) for hub in parts}


def forward(arch: Architecture, model: Any, batch: Batch) -> Tensor:  # noqa: ANN401 - as above
    """Logits (batch, time, vocabulary) by transformers' own forward pass.

    Positions are not given: transformers finds them itself, a check of ours.
    """
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids)}
    inputs |= modal_inputs(arch, model, batch)
    return model(**inputs, use_cache=False).logits


def continued(arch: Architecture, model: Any, batch: Batch, said: Sequence[int]) -> Tensor:  # noqa: ANN401 - as above
    """Logits (tokens, vocabulary) of the greedy tokens behind a prompt, as far as ``said`` agrees.

    In one pass behind what was said; but a placeholder that the model says itself is a word, and
    only transformers' ``generate`` takes it for one.
    """
    with torch.no_grad():
        if not arch.places & set(said):
            longer, position = batch, batch.positions.amax()
            for token in said[:-1]:
                position = position + 1
                longer = appended(longer, token, position)
            return forward(arch, model, longer)[0, -len(said) :].float()
        config = transformers.GenerationConfig(
            max_new_tokens=len(said), do_sample=False, pad_token_id=0, eos_token_id=None
        )
        model.generation_config = config  # the folder's own may sample, or penalise repetition
        inputs = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids)}
        out = model.generate(
            **inputs, **modal_inputs(arch, model, batch), generation_config=config,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.cat(out.logits).float()


def modal_inputs(arch: Architecture, model: Any, batch: Batch) -> dict[str, Any]:  # noqa: ANN401 - HF's model
    """Images, videos and sounds of a batch as transformers' models take them."""
    if arch.intern:
        return {"pixel_values": batch.pixels} if batch.patches else {}
    inputs: dict[str, Any] = {}
    images, videos = split_visual(arch, batch)
    if len(images[1]):
        inputs |= {"pixel_values": images[0], "image_grid_thw": images[1]}
    if len(videos[1]):
        inputs |= {"pixel_values_videos": videos[0], "video_grid_thw": videos[1]}
    if arch.kind == "qwen2_5_omni":
        if len(videos[1]):
            inputs["video_second_per_grid"] = seconds_of(batch, len(videos[1]))
        if batch.lengths.numel():
            inputs |= _sound_inputs(batch) | {"use_audio_in_video": batch.woven}
        return inputs
    positions = arch.parts(model).positions
    if takes(positions, "mm_token_type_ids"):
        inputs["mm_token_type_ids"] = token_types(arch, batch.ids)
    if len(videos[1]) and takes(positions, "second_per_grid_ts"):
        inputs["second_per_grid_ts"] = seconds_of(batch, len(videos[1]))
    return inputs


def takes(positions: Any, name: str) -> bool:  # noqa: ANN401 - HF's module
    """Whether this transformers finds positions by something: by the types of tokens from 5.10 on,
    by the seconds of videos in some families.

    Args:
        positions: the module that has ``get_rope_index``.
    """
    return name in inspect.signature(positions.get_rope_index).parameters


def seconds_of(batch: Batch, videos: int) -> Tensor:
    """(videos,) the seconds from one row of a video's grid to the next."""
    return torch.ones(videos) if batch.seconds is None else batch.seconds


def token_types(arch: Architecture, ids: Tensor) -> Tensor:
    """0 for text, 1 for image, 2 for video tokens."""
    types = (ids == arch.image_token()).int()
    video = arch.token("video_token_id")
    return types if video is None else types + 2 * (ids == video).int()


def split_visual(
    arch: Architecture, batch: Batch
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(pixels, grid) of the images, and of the videos."""
    unit = arch.config.vision_config.spatial_merge_size**2
    sizes = batch.grid.prod(-1)
    rows = sizes.cumsum(0) // unit
    count = int((rows <= batch.image_rows).sum()) if len(batch.grid) else 0
    patches = int(sizes[:count].sum())
    images = (batch.pixels[:patches], batch.grid[:count])
    return images, (batch.pixels[patches:], batch.grid[count:])


def _sound_inputs(batch: Batch) -> dict[str, Any]:
    """Padded features (sounds, mel bins, frames) and their mask, as the thinker takes them."""
    parts = batch.features.split(batch.lengths.tolist(), dim=1)
    most = int(batch.lengths.max())
    mask = torch.arange(most, device=batch.lengths.device) < batch.lengths[:, None]
    padded = batch.features.new_zeros(len(parts), batch.features.shape[0], most)
    for i, part in enumerate(parts):
        padded[i, :, : part.shape[1]] = part
    return {"input_features": padded, "feature_attention_mask": mask.long()}


def own_name(name: str) -> str:
    """A name of transformers' own InternVL: of the hub's ``-HF`` models, or since 4.52."""
    short = name.removeprefix("model.").replace("language_model.model.", "language_model.", 1)
    short = short.removeprefix("language_model.") if "lm_head." in short else short
    return short if short.startswith("lm_head.") else f"model.{short}"


# ---------------------------------------------------------------- InternVL's original weights
# Original name -> native name, by prefix and by word (transformers' InternVL module tree).
INTERN_WORDS = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}
PROJECTOR = {"mlp1.0.": "layer_norm.", "mlp1.1.": "linear_1.", "mlp1.3.": "linear_2."}
INTERNLM2_WORDS = {
    "model.tok_embeddings.": "model.embed_tokens.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}


def native_names(name: str, tensor: Tensor, heads: int, groups: int) -> list[tuple[str, Tensor]]:
    """An original InternVL tensor under its native names.

    Args:
        heads, groups: attention heads and K/V heads of the text model, for InternLM2's wqkv,
            which holds for each K/V head its queries, then k, then v.
    """
    if name.endswith("inv_freq"):
        return []
    if name.startswith("vision_model."):
        new = name.replace("vision_model.", "model.vision_tower.")
        if ".attn.qkv." in new:
            stem = new.replace("encoder.layers.", "encoder.layer.").replace(
                ".attn.qkv.", ".attention.{}_proj."
            )
            return [(stem.format(x), t) for x, t in zip("qkv", tensor.chunk(3), strict=True)]
        for old, word in INTERN_WORDS.items():
            new = new.replace(old, word)
        return [(new, tensor)]
    for old, word in PROJECTOR.items():
        if name.startswith(old):
            return [(name.replace(old, f"model.multi_modal_projector.{word}"), tensor)]
    new = name.removeprefix("language_model.")
    if ".attention.wqkv." in new:
        stem = new.replace(".attention.wqkv.", ".self_attn.{}_proj.").replace(
            "model.", "model.language_model.", 1
        )
        size, many = tensor.shape[0] // (heads + 2 * groups), heads // groups
        packed = tensor.view(groups, many + 2, size, *tensor.shape[1:])
        cut = {"q": packed[:, :many], "k": packed[:, many : many + 1], "v": packed[:, many + 1 :]}
        return [(stem.format(x), t.flatten(0, 2)) for x, t in cut.items()]
    for old, word in INTERNLM2_WORDS.items():
        new = new.replace(old, word)
    if new == "output.weight":
        return [("lm_head.weight", tensor)]
    return [(new.replace("model.", "model.language_model.", 1), tensor)]
