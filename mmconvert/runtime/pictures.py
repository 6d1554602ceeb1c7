"""Picture files, opened and brought to size; videos as folders of pictures or animations."""

# Some functions of Pillow and torch have no types, or types that are open.
# pyright: reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageSequence, PngImagePlugin, UnidentifiedImageError

from mmconvert.errors import RequestError

Picture = Image.Image

# Pillow's own threshold of suspicion. A picture of 3 bytes a pixel needs 270 MB then.
MOST_PIXELS = 89_478_485
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 25  # bytes of a comment: Pillow refuses 1 MiB
WIDE = ("I", "F")  # Pillow's modes of 16 and 32 bits: convert("RGB") cuts them off at 255
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SMALLEST, WIDEST, WIDE_AS = 28, 200, 180  # Qwen: sides and ratios that are brought to others


def open_picture(path: Path, *, upright: bool = False) -> Image.Image:
    """A picture file, as it is stored: a turn that EXIF asks for is not made, as in MindSpeed-MM.

    Args:
        upright: make that turn, as MindFormers does.

    Raises:
        RequestError: it is none, or larger than any that is taken.
    """
    try:
        with Image.open(path) as picture:
            _check(picture, path)
            return (ImageOps.exif_transpose(picture) if upright else picture).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{path}: {error}", "a smaller picture") from None
    except RequestError:
        raise
    except Exception as error:  # decoders raise what they like: SyntaxError, struct.error, ...
        raise RequestError(f"{path}: {_reason(error)}", "a picture file") from None


def _check(picture: Image.Image, path: Path) -> None:
    if picture.mode.startswith(WIDE):
        raise RequestError(
            f"{path}: more than 8 bits for each colour (mode {picture.mode})",
            "a picture with 8 bits for each colour",
            "convert it first: mmconvert does not guess how to scale its values",
        )
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise RequestError(
            f"{path}: {width} x {height} pixels are too many",
            f"a picture of at most {MOST_PIXELS} pixels",
        )


def _reason(error: Exception) -> str:
    """What is wrong with a file, in Pillow's words or the system's."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def squared(picture: Image.Image, side: int) -> Image.Image:
    """A picture in RGB brought to a square, bicubic, whatever its ratio."""
    return picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def scaled(picture: Image.Image, least: int, most: int) -> Image.Image:
    """A picture with a number of pixels in limits, as MindSpeed-MM's mm_plugin.py makes it.

    Nearest neighbour, whole pixels downwards; for Qwen's processor no side is below 28 and no
    ratio above 200.
    """
    width, height = picture.size
    for limit, beyond in ((most, width * height > most), (least, width * height < least)):
        if limit and beyond:
            factor = math.sqrt(limit / (width * height))
            width, height = max(1, int(width * factor)), max(1, int(height * factor))
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
    if min(width, height) < SMALLEST:
        width, height = max(width, SMALLEST), max(height, SMALLEST)
    if width / height > WIDEST:
        width = height * WIDE_AS
    if height / width > WIDEST:
        height = width * WIDE_AS
    if (width, height) == picture.size:
        return picture
    return picture.resize((width, height), Image.Resampling.NEAREST)


def natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts names as people do: frame 2 before frame 10."""
    words = re.split(r"(\d+)", path.name)
    return [(0, int(w[:18]), w) if w.isdecimal() else (1, 0, w.casefold()) for w in words]


def frames_of(path: Path) -> list[Image.Image] | None:
    """The frames of a folder of pictures, in natural order, or of an animation; None if neither."""
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in SUFFIXES), key=natural)
        return [open_picture(file) for file in files] or None
    try:
        with Image.open(path) as animation:
            return list(_animated(animation, path))
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(f"{path}: {error}", "a smaller picture") from None
    except UnidentifiedImageError:
        return None
    except Exception as error:  # decoders raise what they like: SyntaxError, struct.error, ...
        raise RequestError(f"{path}: {_reason(error)}", "an animation") from None


MOST_FRAMES = 4096  # of an animation: each frame is held


def _animated(animation: Image.Image, path: Path) -> Iterator[Image.Image]:
    _check(animation, path)
    width, height = animation.size
    for number, frame in enumerate(ImageSequence.Iterator(animation)):
        if number == MOST_FRAMES or number * width * height > 4 * MOST_PIXELS:
            raise RequestError(f"{path}: more than {number} frames", "a shorter animation")
        yield frame.convert("RGB")


def drawn_picture(side: int = 112) -> Image.Image:
    """The built-in picture: a red disc on a ground that goes from blue to yellow."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ground = torch.stack([x * 255 // side, x * 255 // side, 255 - x * 255 // side], dim=-1)
    disc = (x - side // 2) ** 2 + (y - side // 2) ** 2 < (side // 4) ** 2
    ground[disc] = torch.tensor([200, 20, 20])
    return Image.frombytes("RGB", (side, side), bytes(ground.to(torch.uint8).flatten().tolist()))
