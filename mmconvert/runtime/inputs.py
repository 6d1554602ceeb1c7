"""Inputs made of a config alone: ids and pixels from a seed, for models without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmconvert.runtime.batch import IGNORED, Batch, pad_text, padded_before
from mmconvert.runtime.families import Architecture
from mmconvert.runtime.reference import seconds_of, split_visual, takes, token_types
from mmconvert.runtime.samples import AUDIO, KINDS

SIDE = 8  # patches along each side of the picture
SOUND = 50  # frames of sound
WORDS = (5, 9)  # words before and after


def synthetic(arch: Architecture, seed: int = 0) -> Batch:
    """A sentence with a picture, and for Omni a sound: one sample."""
    made = torch.Generator().manual_seed(seed)
    ids: list[Tensor] = []
    vocab = arch.text_config.vocab_size
    placeholders = {arch.image_token(), *(arch.token(n) for n in TOKENS)}
    plain = torch.tensor([i for i in range(min(vocab, 4096)) if i not in placeholders])

    def words(count: int) -> Tensor:
        return plain[torch.randint(len(plain), (count,), generator=made)]

    ids.append(words(WORDS[0]))
    pixels, grid, image = picture(arch, made)
    ids += wrapped(arch, "image", image)
    features, lengths = torch.zeros(1, 0), torch.zeros(0, dtype=torch.int64)
    if arch.kind == "qwen2_5_omni":
        audio = arch.config.audio_config
        features = torch.randn(audio.num_mel_bins, SOUND, generator=made)
        lengths = torch.tensor([SOUND])
        sound = torch.full((audio_tokens(SOUND),), arch.token("audio_token_id") or 0)
        ids += [words(1), *wrapped(arch, AUDIO, sound)]
    ids.append(words(WORDS[1]))
    line = torch.cat(ids)[None]
    return assemble(arch, line, line.clone(), pixels, grid, len(image), features, lengths)


TOKENS = ("video_token_id", "audio_token_id", "eos_token_id", "bos_token_id",
          *(f"{kind}_{end}_token_id" for kind in ("vision", *KINDS)
            for end in ("start", "end")))  # fmt: skip


def wrapped(arch: Architecture, kind: str, tokens: Tensor) -> list[Tensor]:
    """Placeholders between their start and end tokens, as far as the config has such."""
    before, after = (torch.tensor(ids, dtype=torch.int64) for ids in arch.around(kind))
    return [before, tokens, after]


def audio_tokens(frames: int) -> int:
    """Audio tokens of a sound: halved by a convolution, then by pooling."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def picture(arch: Architecture, made: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random pixels, their grid, and their placeholders."""
    vision = arch.config.vision_config
    if arch.intern:
        height, width = vision.image_size
        pixels = torch.randn(1, vision.num_channels, height, width, generator=made)
        patches = (height // vision.patch_size[0]) * (width // vision.patch_size[1])
        count = round(patches * arch.config.downsample_ratio**2)
        return pixels, torch.ones(1, 3, dtype=torch.int64), torch.full((count,), arch.image_token())
    channels = getattr(vision, "in_channels", None) or vision.in_chans
    size = channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(SIDE * SIDE, size, generator=made)
    tokens = SIDE * SIDE // vision.spatial_merge_size**2
    return pixels, torch.tensor([[1, SIDE, SIDE]]), torch.full((tokens,), arch.image_token())


def assemble(
    arch: Architecture,
    ids: Tensor,
    labels: Tensor,
    pixels: Tensor,
    grid: Tensor,
    image_rows: int,
    features: Tensor,
    lengths: Tensor,
    seconds: Tensor | None = None,
    woven: bool = False,
) -> Batch:
    """A batch with its positions.

    Args:
        ids, labels: (batch, time). Placeholders are never learnt.
        others: as in :class:`Batch`.
    """
    for token in arch.places:
        labels = labels.masked_fill(ids == token, IGNORED)
    batch = Batch(
        ids, labels, torch.zeros(0), pixels, grid, image_rows, features, lengths,
        seconds=seconds, woven=woven,
    )  # fmt: skip
    return replace(batch, positions=positions(arch, batch))


def positions(arch: Architecture, batch: Batch) -> Tensor:
    """Positions of tokens: (3, batch, time) by transformers' own rule, (batch, time) if plain."""
    time = torch.arange(batch.ids.shape[1]).expand(batch.ids.shape)
    if arch.intern:
        return time
    model = rope_model(arch)
    images, videos = split_visual(arch, batch)
    given: dict[str, object] = {
        "image_grid_thw": images[1] if len(images[1]) else None,
        "video_grid_thw": videos[1] if len(videos[1]) else None,
        "attention_mask": torch.ones_like(batch.ids),
    }
    if takes(model, "mm_token_type_ids"):
        given["mm_token_type_ids"] = token_types(arch, batch.ids)
    if arch.kind == "qwen2_5_omni":
        given["audio_seqlens"] = batch.lengths if batch.lengths.numel() else None
        given["second_per_grids"] = seconds_of(batch, len(videos[1])) if len(videos[1]) else None
        given["use_audio_in_video"] = batch.woven
    elif len(videos[1]) and takes(model, "second_per_grid_ts"):
        given["second_per_grid_ts"] = seconds_of(batch, len(videos[1]))
    found, _ = model.get_rope_index(batch.ids, **given)
    return found


_ROPE: dict[int, Any] = {}


def rope_model(arch: Architecture) -> Any:  # noqa: ANN401 - transformers' model
    """A model without data that knows the family's rule of positions; made once."""
    if id(arch) not in _ROPE:
        _ROPE.clear()
        _ROPE[id(arch)] = arch.parts(arch.skeleton(torch.float32)).positions
    return _ROPE[id(arch)]


def joined(arch: Architecture, batches: Sequence[Batch]) -> Batch:
    """Several batches as one: text padded at the end, images before videos."""
    if len(batches) == 1:
        return batches[0]
    time = max(b.ids.shape[1] for b in batches)
    padded = [pad_text(b, time) for b in batches]
    if arch.intern:
        pixels, grid = [b.pixels for b in batches], [b.grid for b in batches]
    else:
        both = [split_visual(arch, b) for b in batches]
        ordered = [one for one, _ in both] + [two for _, two in both]
        pixels, grid = [p for p, _ in ordered], [g for _, g in ordered]
    seconds = [b.seconds for b in batches if b.seconds is not None]
    return Batch(
        torch.cat([b.ids for b in padded]),
        torch.cat([b.labels for b in padded]),
        torch.cat([b.positions for b in padded], dim=0 if arch.intern else 1),
        torch.cat(pixels),
        torch.cat(grid),
        sum(b.image_rows for b in batches),
        torch.cat([b.features for b in batches], dim=1),
        torch.cat([b.lengths for b in batches]),
        seconds=torch.cat(seconds) if seconds else None,
        woven=any(b.woven for b in batches),
    )


def side_by_side(arch: Architecture, batches: Sequence[Batch]) -> Batch:
    """Prompts of one sample each as one batch: padding stands before the shorter ones."""
    time = max(b.ids.shape[1] for b in batches)
    if all(b.ids.shape[1] == time for b in batches):
        return joined(arch, batches)
    padded = [padded_before(b, time) for b in batches]
    masks = [b.mask for b in padded if b.mask is not None]
    return replace(joined(arch, padded), mask=torch.cat(masks))
