"""Pictures, videos and sounds as the encoders take them, by transformers' own processors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor

from mmconvert.errors import RequestError
from mmconvert.runtime import films
from mmconvert.runtime.checking import look_at_pictures
from mmconvert.runtime.families import Architecture, read_config
from mmconvert.runtime.pictures import frames_of, scaled
from mmconvert.runtime.prepare import Prepare, Tiling
from mmconvert.runtime.samples import Clip, Sample
from mmconvert.runtime.sounds import RATE, read_sound
from mmconvert.runtime.tiles import IMAGENET, tiles

Pixels = tuple[int, int] | None


class Frames(NamedTuple):
    """Frames of a video.

    Attributes:
        pictures: those that are taken.
        times: the second of each.
        each: the seconds that one stands for, on the average.
    """

    pictures: list[Image.Image]
    times: list[float]
    each: float


class Media:
    """Turns files into tensors.

    Args:
        hf_dir: has preprocessor_config.json, if the model is no InternVL.
        prepare: limits and tiles.
    """

    def __init__(self, arch: Architecture, hf_dir: Path, prepare: Prepare) -> None:
        self._arch, self._hf_dir, self._prepare = arch, hf_dir, prepare
        self._tiling = (prepare.tiling or _tiling(hf_dir)) if arch.intern else Tiling()
        self._images: Any = None
        self._sounds: Any = None

    def look(self, sample: Sample) -> None:
        """Decodes the files of a sample, as its turn will.

        Raises:
            RequestError: one cannot be decoded.
        """
        look_at_pictures(sample)
        for video in sample.videos:
            self.frames(video)
        for sound in sample.audios:
            if isinstance(sound, Path):
                read_sound(sound)

    def images(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor, list[int]]:
        """(pixels, grid, tokens of each picture); shapes as in :class:`Batch`."""
        if self._arch.intern:
            return self._tiles(pictures, self._tiling)
        return self._processed(pictures, self._prepare.image_pixels)

    def _processed(
        self, pictures: Sequence[Image.Image], limits: Pixels
    ) -> tuple[Tensor, Tensor, list[int]]:
        if self._images is None:
            self._images = _load(transformers.AutoImageProcessor, self._hf_dir, "pictures")
        pixels, grids = list[Tensor](), list[Tensor]()
        for picture in pictures:
            small = scaled(picture, *limits) if limits else picture
            try:
                made = self._images(images=[small.convert("RGB")], return_tensors="pt")
            except ValueError as error:  # such as sides of 400 to 1
                width, height = picture.size
                raise RequestError(
                    f"a picture of {width} x {height} pixels: {error}",
                    "a picture that the model's processor takes",
                ) from None
            pixels.append(made["pixel_values"])
            grids.append(made["image_grid_thw"])
        grid = torch.cat(grids)
        unit = self._arch.config.vision_config.spatial_merge_size**2
        return torch.cat(pixels), grid, (grid.prod(-1) // unit).tolist()

    def _tiles(
        self, pictures: Sequence[Image.Image], how: Tiling
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Pictures cut into tiles; several pictures share the most tiles of one sample."""
        vision = self._arch.config.vision_config
        size = vision.image_size[0]
        mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
        patches = (size // vision.patch_size[0]) ** 2
        each = round(patches * self._arch.config.downsample_ratio**2)
        made: list[Tensor] = []
        tokens: list[int] = []
        for picture in pictures:
            cut = tiles(picture.convert("RGB"), size, how, max(1, how.most // len(pictures)))
            for tile in cut:
                raw = torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8)
                made.append((raw.view(size, size, 3).permute(2, 0, 1).float() / 255 - mean) / std)
            tokens.append(each * len(cut))
        return torch.stack(made), torch.ones(len(made), 3, dtype=torch.int64), tokens

    def frames(self, video: Path | Clip) -> Frames:
        """The frames of a video that are taken.

        Of pictures that stand for a video the rate is taken to be that of ``prepare``.

        Raises:
            RequestError: it is none that can be read.
        """
        path, most = (video.path if isinstance(video, Clip) else video), self._prepare.video_frames
        rate = self._prepare.video_rate
        times: list[float] = []
        each = 1 / rate

        def choose(count: int, seconds: float) -> list[int]:
            nonlocal each
            first, last = 0, count
            if isinstance(video, Clip) and seconds:
                first = min(count - 1, int(video.start / seconds * count))
                last = max(first + 1, min(count, round(video.end / seconds * count)))
            if self._arch.intern:
                found = films.middles(last - first, min(most, last - first), first)
            else:
                found = [first + i for i in films.sampled(last - first, seconds, rate, most)]
            times.extend(i * seconds / count for i in found)
            each = (last - first) * seconds / count / len(found)
            return found

        held = frames_of(path)
        if held is None:
            pictures = films.frames(path, choose)
            return Frames(pictures, times, each)
        if len(held) > most:
            held = [held[i * len(held) // most] for i in range(most)]
        return Frames(held, [i / rate for i in range(len(held))], each)

    def video(self, frames: Sequence[Image.Image]) -> tuple[Tensor, Tensor, int]:
        """(pixels, grid of one row, tokens): frames in pairs, as a temporal patch takes two."""
        chosen = list(frames)
        chosen += chosen[-1:] * (len(chosen) % 2)
        size = chosen[0].size
        limits = self._prepare.video_pixels
        even = [f.convert("RGB").resize(size) for f in chosen]
        pixels, grid, tokens = self._processed(even, limits)
        patches = int(grid[0].prod())
        vision = self._arch.config.vision_config
        shape = (len(chosen), patches, -1, 2, vision.patch_size**2)
        each = pixels.view(*shape)
        pairs = torch.stack([each[0::2, :, :, 0], each[1::2, :, :, 1]], dim=3)
        times = len(chosen) // 2
        where = torch.tensor([[times, int(grid[0, 1]), int(grid[0, 2])]])
        return pairs.reshape(times * patches, -1), where, times * tokens[0]

    def stills(self, frames: Sequence[Image.Image]) -> tuple[Tensor, Tensor, list[int]]:
        """InternVL's frames of a video: one tile each; values as of :meth:`images`."""
        return self._tiles(frames, Tiling())

    def sound(self, sound: Path | Clip | Tensor) -> Tensor:
        """(mel bins, frames) of a sound file or a video's sound, or of samples at 16 kHz."""
        if self._sounds is None:
            self._sounds = _load(transformers.WhisperFeatureExtractor, self._hf_dir, "sounds")
        if isinstance(sound, Clip):
            start, end = (int(second * RATE) for second in (sound.start, sound.end))
            sound = read_sound(sound.path)[start:end]
        samples = read_sound(sound) if isinstance(sound, Path) else sound
        made = self._sounds(
            samples.numpy(), sampling_rate=RATE, return_attention_mask=True, return_tensors="pt",
            padding="max_length",
        )  # fmt: skip
        return made["input_features"][0][:, : int(made["attention_mask"].sum())]


def _load(kind: Any, hf_dir: Path, what: str) -> Any:  # noqa: ANN401 - a class of transformers
    try:
        return kind.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(
            f"{hf_dir} has no processor for {what} that transformers can load: {reason}",
            "preprocessor_config.json of the model",
        ) from None


def _tiling(hf_dir: Path) -> Tiling:
    """The tiles that config.json asks for; one for each picture where it says nothing."""
    config = read_config(hf_dir)
    return Tiling(
        config.get("dynamic_image_size") is True,
        config.get("use_thumbnail") is True,
        int(config.get("min_dynamic_patch") or 1),
        int(config.get("max_dynamic_patch") or 12),
    )
