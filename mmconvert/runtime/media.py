"""Pictures, videos and sounds as the encoders take them, by transformers' own processors."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

from mmconvert.errors import RequestError
from mmconvert.runtime.families import Architecture

FRAMES = 16  # frames of a video at most, spread over its length
RATE = 16000  # samples a second that the audio encoder knows
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # InternVL's own preprocessing
WIDE = ("I", "F")  # Pillow's modes of 16 and 32 bits: convert("RGB") cuts them off at 255
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Media:
    """Turns files into tensors.

    Args:
        hf_dir: has preprocessor_config.json, if the model is no InternVL.
    """

    def __init__(self, arch: Architecture, hf_dir: Path) -> None:
        self._arch, self._hf_dir = arch, hf_dir
        self._images: Any = None
        self._sounds: Any = None

    def images(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor, list[int]]:
        """(pixels, grid, tokens of each picture); shapes as in :class:`Batch`."""
        if self._arch.intern:
            return self._tiles(pictures)
        if self._images is None:
            self._images = _load(transformers.AutoImageProcessor, self._hf_dir, "pictures")
        pixels, grids = [], []
        for picture in pictures:
            try:
                made = self._images(images=[picture.convert("RGB")], return_tensors="pt")
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

    def _tiles(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor, list[int]]:
        """One tile for each picture. The original may cut large pictures into more."""
        vision = self._arch.config.vision_config
        height, width = vision.image_size
        mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
        tiles: list[Tensor] = []
        for picture in pictures:
            small = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            raw = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
            tile = raw.view(height, width, 3).permute(2, 0, 1).float() / 255
            tiles.append((tile - mean) / std)
        patches = (height // vision.patch_size[0]) * (width // vision.patch_size[1])
        tokens = round(patches * self._arch.config.downsample_ratio**2)
        count = len(pictures)
        return torch.stack(tiles), torch.ones(count, 3, dtype=torch.int64), [tokens] * count

    def video(self, frames: Sequence[Image.Image]) -> tuple[Tensor, Tensor, int]:
        """(pixels, grid of one row, tokens): frames in pairs, as a temporal patch takes two."""
        chosen = list(frames)
        if len(chosen) > FRAMES:
            chosen = [chosen[i * len(chosen) // FRAMES] for i in range(FRAMES)]
        chosen += chosen[-1:] * (len(chosen) % 2)
        size = chosen[0].size
        pixels, grid, tokens = self.images([f.convert("RGB").resize(size) for f in chosen])
        patches = int(grid[0].prod())
        vision = self._arch.config.vision_config
        shape = (len(chosen), patches, -1, 2, vision.patch_size**2)
        each = pixels.view(*shape)
        pairs = torch.stack([each[0::2, :, :, 0], each[1::2, :, :, 1]], dim=3)
        times = len(chosen) // 2
        where = torch.tensor([[times, int(grid[0, 1]), int(grid[0, 2])]])
        return pairs.reshape(times * patches, -1), where, times * tokens[0]

    def sound(self, sound: Path | Tensor) -> Tensor:
        """(mel bins, frames) of a WAV file, or of samples at 16 kHz."""
        if self._sounds is None:
            self._sounds = _load(transformers.WhisperFeatureExtractor, self._hf_dir, "sounds")
        samples = read_wav(sound) if isinstance(sound, Path) else sound
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


def open_picture(path: Path) -> Image.Image:
    """A picture file.

    Raises:
        RequestError: it is none.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(WIDE):
                raise RequestError(
                    f"{path}: mode {picture.mode}", "8 bits for each colour; more are not scaled"
                )
            return picture.convert("RGB")
    except Image.DecompressionBombError as error:
        raise RequestError(f"{path}: {error}", "a smaller picture") from None
    except (OSError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or "not a picture"
        raise RequestError(f"{path}: {reason}", "a picture file") from None


def open_video(path: Path) -> list[Image.Image]:
    """The frames of a video: a folder of pictures in the order of their names, or an animation.

    Raises:
        RequestError: it is neither.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if files:
            return [open_picture(file) for file in files]
    else:
        try:
            with Image.open(path) as animation:
                return [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
        except (OSError, UnidentifiedImageError):
            pass
    raise RequestError(
        f"{path} is no video that can be read",
        "a folder of pictures, one for each frame, or an animated GIF, PNG or WebP file",
    )


def read_wav(path: Path) -> Tensor:
    """Samples in [-1, 1] at 16 kHz, channels averaged.

    Another rate is brought to 16 kHz by linear interpolation, good enough for a check; for
    training, resample files beforehand.

    Raises:
        RequestError: the file is no PCM WAV file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = bytearray(file.readframes(file.getnframes()))
    except (OSError, wave.Error, EOFError) as error:
        raise RequestError(f"{path} cannot be read: {error}", "a PCM WAV file") from None
    kinds = {
        1: (torch.uint8, 128.0, 128.0),
        2: (torch.int16, 0.0, 32768.0),
        4: (torch.int32, 0.0, 2.0**31),
    }
    if width not in kinds or not raw:
        raise RequestError(
            f"{path}: {8 * width} bits, {len(raw)} bytes", "8, 16 or 32 bit PCM samples"
        )
    dtype, zero, most = kinds[width]
    samples = torch.frombuffer(raw, dtype=dtype).float()
    mono = ((samples - zero) / most).view(-1, channels).mean(1)
    if rate != RATE:
        length = max(1, round(len(mono) * RATE / rate))
        mono = F.interpolate(mono[None, None], size=length, mode="linear")[0, 0]
    return mono


def drawn_picture(side: int = 112) -> Image.Image:
    """The built-in picture: a red disc on a ground that goes from blue to yellow."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ground = torch.stack([x * 255 // side, x * 255 // side, 255 - x * 255 // side], dim=-1)
    disc = (x - side // 2) ** 2 + (y - side // 2) ** 2 < (side // 4) ** 2
    ground[disc] = torch.tensor([200, 20, 20])
    return Image.frombytes("RGB", (side, side), bytes(ground.to(torch.uint8).flatten().tolist()))


def drawn_sound(seconds: float = 0.5) -> Tensor:
    """The built-in sound: a tone that rises, as samples at 16 kHz."""
    time = torch.arange(int(seconds * RATE)) / RATE
    return 0.3 * torch.sin(2 * torch.pi * (300 + 600 * time) * time)
