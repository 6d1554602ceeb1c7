"""The other side of the comparison: transformers' own model with the weights of the HF folder."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor

from mmconvert.causes.quantised import quantised
from mmconvert.errors import CheckpointError, FormatError, MMConvertError, TensorError
from mmconvert.formats.hf.folder import open_hf
from mmconvert.runtime.batch import Batch
from mmconvert.runtime.families import Architecture


def load_reference(
    arch: Architecture, hf_dir: Path, dtype: torch.dtype, device: torch.device
) -> Any:  # noqa: ANN401 - transformers' model
    """The whole model, as transformers loads it.

    Raises:
        CheckpointError: weights are missing, damaged, or of another model.
    """
    stored = open_hf(hf_dir)  # clear errors for missing and truncated files
    weights = [t for name, t in stored.tensors().items() if name.endswith(".weight")]
    if (fault := quantised(stored.tensors().values(), weights, stored.config)) is not None:
        raise fault
    try:
        model = (
            _native_intern(arch, hf_dir, dtype) if arch.intern else _pretrained(arch, hf_dir, dtype)
        )
    except MMConvertError:
        raise
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(
            f"{hf_dir}: transformers cannot load it: {reason}", "a whole model"
        ) from None
    return model.to(device).eval()


def _pretrained(arch: Architecture, hf_dir: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 - as above
    model, found = arch.model_class().from_pretrained(
        hf_dir, config=arch.config, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    missing = sorted(found["missing_keys"])
    if arch.tied:
        missing = [name for name in missing if not name.endswith("lm_head.weight")]
    wrong = sorted(found["mismatched_keys"])
    if missing or wrong:
        raise TensorError(
            f"{hf_dir}: transformers finds no weights for "
            f"{', '.join(map(str, [*missing, *wrong][:3]))}",
            "all weights of the model",
        )
    return model


def forward(arch: Architecture, model: Any, batch: Batch) -> Tensor:  # noqa: ANN401 - as above
    """Logits (batch, time, vocabulary) by transformers' own forward pass.

    Positions are not given: transformers finds them itself, a check of ours.
    """
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids)}
    inputs |= modal_inputs(arch, model, batch)
    return model(**inputs, use_cache=False).logits


def generate(arch: Architecture, model: Any, batch: Batch, most: int, stop: set[int]) -> list[int]:  # noqa: ANN401 - as above
    """Greedy tokens by transformers' own ``generate``."""
    config = transformers.GenerationConfig(
        max_new_tokens=most, do_sample=False, pad_token_id=0, eos_token_id=sorted(stop) or None
    )
    model.generation_config = config  # the folder's own may sample, or penalise repetition
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids)}
    with torch.no_grad():
        out = model.generate(**inputs, **modal_inputs(arch, model, batch), generation_config=config)
    return out[0, batch.ids.shape[1] :].tolist()


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
            inputs["video_second_per_grid"] = torch.ones(len(videos[1]))
        if batch.lengths.numel():
            inputs |= _sound_inputs(batch)
    elif takes_token_types(arch.parts(model).positions):
        inputs["mm_token_type_ids"] = token_types(arch, batch.ids)
    return inputs


def takes_token_types(positions: Any) -> bool:  # noqa: ANN401 - HF's module
    """Whether this transformers finds positions by the types of tokens (5.10 and later do).

    Args:
        positions: the module that has ``get_rope_index``.
    """
    return "mm_token_type_ids" in inspect.signature(positions.get_rope_index).parameters


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


# ---------------------------------------------------------------- InternVL's original weights
def _native_intern(arch: Architecture, hf_dir: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 - as above
    """Original InternVL weights in transformers' native model, without remote code."""
    model = arch.skeleton(dtype)
    text = arch.text_config
    state: dict[str, Tensor] = {}
    for name, tensor in _stored(hf_dir):
        for new, value in native_names(
            name, tensor, text.num_attention_heads, text.num_key_value_heads
        ):
            if new in state:
                raise TensorError(f"{hf_dir}: {new} is there twice", "each weight once")
            state[new] = value.to(dtype)
    if arch.tied:
        state.setdefault(
            "lm_head.weight", state.get("model.language_model.embed_tokens.weight", torch.empty(0))
        )
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    wrong = [n for n in expected if n not in state or tuple(state[n].shape) != expected[n]]
    wrong += [n for n in state if n not in expected]
    if wrong:
        raise TensorError(
            f"{hf_dir}: {wrong[0]} does not fit config.json", "the model's own weights"
        )
    model.load_state_dict(state, strict=True, assign=True)
    if arch.tied:
        model.lm_head.weight = arch.parts(model).text.embed_tokens.weight
    return model


def _stored(hf_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the weight files that count."""
    by_file: dict[Path, list[str]] = {}
    for tensor in open_hf(hf_dir).tensors().values():
        by_file.setdefault(tensor.path, []).append(tensor.name)
    for path, names in by_file.items():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path.name} is no safetensors file", "safetensors weights")
        with safetensors.safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)


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
