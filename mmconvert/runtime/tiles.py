"""InternVL's tiles: a picture cut by its shape, as OpenGVLab's dynamic_preprocess does it."""

from __future__ import annotations

from PIL import Image

from mmconvert.runtime.prepare import Tiling

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # InternVL's own preprocessing


def tiles(picture: Image.Image, size: int, how: Tiling, most: int) -> list[Image.Image]:
    """The tiles of a picture, each ``size`` x ``size``, row by row, the thumbnail last.

    Args:
        most: tiles at most; ``how.most`` shared by all pictures of a sample.
    """
    if not how.dynamic:
        square = _padded(picture) if how.square else picture
        return [square.resize((size, size), Image.Resampling.BICUBIC)]
    across, down = _shape(picture, size, how.least, max(how.least, most))
    large = picture.resize((across * size, down * size), Image.Resampling.BICUBIC)
    found = [
        large.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(down)
        for x in range(across)
    ]
    if how.thumbnail and len(found) > 1:
        found.append(picture.resize((size, size), Image.Resampling.BICUBIC))
    return found


def _shape(picture: Image.Image, size: int, least: int, most: int) -> tuple[int, int]:
    """(tiles across, tiles down): the shape nearest to the picture's own.

    Of two that are as near, the later one wins if the picture has more than half of its pixels.
    """
    shapes = {
        (i, j)
        for i in range(1, most + 1)
        for j in range(1, most + 1)
        if least <= i * j <= most
    }  # fmt: skip
    width, height = picture.size
    best, nearest = (1, 1), float("inf")
    for shape in sorted(shapes, key=lambda s: (s[0] * s[1], s)):
        away = abs(width / height - shape[0] / shape[1])
        large = width * height > 0.5 * size * size * shape[0] * shape[1]
        if away < nearest or (away == nearest and large):
            best, nearest = shape, away
    return best


def _padded(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a square of ImageNet's mean colour: Pad2Square."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    colour = tuple(int(255 * mean) for mean in IMAGENET[0])
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square
